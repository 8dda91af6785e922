"""Process: the regions of one client process, and the way of its faults to them (paper section 4.1).

What is local, what is shared?
    `SharedProcess` has one representative: the region map with its lock is shared by all processors. That lock
    is the first bottleneck of figure 6.
How are representatives made, when do they join?
    One, at the first call; every processor is given the same.
How do local and global operations synchronise?
    By the lock in the region map. A region's own operations synchronise in its gate.
How are they organised?
    The map is ordered by address: look-up is logarithmic (the paper's is a list).
"""

from __future__ import annotations

import k42
from k42 import _native
from k42.vm.fault import Fault
from k42.vm.hat import Hat
from k42.vm.pm import PageManager
from k42.vm.region import Region


class Process(k42.Object):
    """The interface."""

    def region_map(self) -> _native.RegionMap:
        """The native half: what the fault engine searches."""
        raise NotImplementedError

    def attach_hat(self, hat: Hat) -> None:
        """Tells the process its HAT; once, before any fault."""
        raise NotImplementedError

    def attach_region(self, start: int, region: Region) -> bool:
        """Adds a region at the address `start`; False, and nothing changed, when it overlaps another."""
        raise NotImplementedError

    def detach_region(self, start: int) -> None:
        """Removes the region at `start`. The caller has shut it down; faults to come find nothing here."""
        raise NotImplementedError

    def handle_fault(self, fault: Fault) -> None:
        """Finishes a fault, or ends the access with SIGBUS; the faulting thread is never left waiting."""
        raise NotImplementedError


class SharedProcess(Process):
    """The non-distributed Process: one map under one lock (figure 5, left).

    Args of ``create``:
        pm: the process's page manager.
    """

    class Root(k42.SharedRoot):
        """Holds the page manager."""

        def __init__(self, pm: PageManager) -> None:
            self.pm = pm

    root: Root

    def __init__(self) -> None:
        self._map = _native.RegionMap()
        self._regions: dict[int, Region] = {}
        self._hat: Hat | None = None

    def region_map(self) -> _native.RegionMap:
        """The native half."""
        return self._map

    def attach_hat(self, hat: Hat) -> None:
        """Tells the process its HAT."""
        self._hat = hat

    def attach_region(self, start: int, region: Region) -> bool:
        """Adds a region; see `Process.attach_region`."""
        # First into the dictionary: a fault that finds it in the map must find it here.
        if self._regions.setdefault(start, region) is not region:
            return False
        if self._map.insert(region.native()):
            return True
        del self._regions[start]
        return False

    def detach_region(self, start: int) -> None:
        """Removes a region; see `Process.detach_region`."""
        self._map.remove(start)
        self._regions.pop(start, None)

    def handle_fault(self, fault: Fault) -> None:
        """Finishes a fault; see `Process.handle_fault`."""
        assert self._hat is not None
        start = self._map.lookup(fault.canonical)
        region = None if start is None else self._regions.get(start)
        if region is None:
            # Unmapped since; the address may be another mapping's by now. The engine will see when it happens again.
            self._hat.wake(fault.cpu, fault.address)
            return
        region.handle_fault(fault, self._hat, self.root.pm)
