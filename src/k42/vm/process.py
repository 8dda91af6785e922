"""Process: the regions of one client process, and the way of its faults to them (paper section 4.1).

There are two, of figure 5, and each can be put in the other's place by `k42.swap` while faults come. The native half,
which the fault engine searches, stays the same object; what is in it changes (``native/core/vm/region_map.hpp``).

What is local, what is shared?
    `SharedProcess`: all is shared; a look-up takes the lock of the region map. That lock is the first bottleneck of
    figure 6. `DistributedProcess`: each processor has copies of the regions that it has faulted on. The master map,
    with its lock, is shared.
How are representatives made, when do they join?
    The shared one at the first call. Of the distributed one each processor's at its first call, empty; a fault that
    finds nothing in the local copies asks the master, under its lock, and keeps a copy.
How do local and global operations synchronise?
    Attaching changes the master alone. Detaching holds the master's lock, marks the copies of all processors, and
    removes the region: a look-up that begins later does not find it. One that began before may have; then the gate of
    the region, which was shut down before, rejects it. A region's own operations synchronise in its gate.
How are they organised?
    The map is ordered by address: look-up is logarithmic (the paper's is a list). Each region lists its copies.
"""

from __future__ import annotations

import threading
from typing import ClassVar

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


class _State:
    """What the roots have in common.

    Args of ``create``:
        pm: the process's page manager. None: it comes with the state of another implementation.
    """

    replicated: ClassVar[bool]

    def __init__(self, pm: PageManager | None = None) -> None:
        self.pm = pm
        self.hat: Hat | None = None
        self.map = _native.RegionMap(self.replicated)
        self.lock = threading.Lock()  # protects the changes of regions, and of its copies in representatives; a leaf
        self.regions: dict[int, Region] = {}  # by start: what a fault calls, once the map has told the start

    def export_state(self, form: str) -> _State:
        """Return the whole: what it refers to goes on."""
        return self

    def import_state(self, form: str, state: _State) -> None:
        """Go on with the native half of another implementation, which is changed while faults look up."""
        self.pm, self.hat, self.map, self.regions = state.pm, state.hat, state.map, state.regions
        self.map.replicate(self.replicated)


class _Process(Process):
    """What both implementations do alike."""

    transfers: ClassVar[tuple[str, ...]] = ("process",)

    root: _State

    def region_map(self) -> _native.RegionMap:
        """The native half."""
        return self.root.map

    def attach_hat(self, hat: Hat) -> None:
        """Tells the process its HAT."""
        self.root.hat = hat

    def attach_region(self, start: int, region: Region) -> bool:
        """Adds a region; see `Process.attach_region`."""
        root = self.root
        # First into the dictionary: a fault that finds it in the map must find it here.
        with root.lock:
            if root.regions.setdefault(start, region) is not region:
                return False
        if root.map.insert(region.native()):
            return True
        with root.lock:
            del root.regions[start]
        return False

    def handle_fault(self, fault: Fault) -> None:
        """Finishes a fault; see `Process.handle_fault`."""
        root = self.root
        assert root.hat is not None
        assert root.pm is not None
        start = root.map.lookup(fault.canonical)
        region = None if start is None else self._region(start)
        if region is None:
            # Unmapped since; the address may be another mapping's by now. The engine will see when it happens again.
            root.hat.wake(fault.cpu, fault.address)
            return
        region.handle_fault(fault, root.hat, root.pm)

    def _region(self, start: int) -> Region | None:
        """The region that starts there."""
        raise NotImplementedError


class SharedProcess(_Process):
    """The non-distributed Process: one map under one lock (figure 5, left).

    Args of ``create``:
        pm: the process's page manager.
    """

    class Root(_State, k42.SharedRoot):
        """Holds the map."""

        replicated = False

    def detach_region(self, start: int) -> None:
        """Removes a region; see `Process.detach_region`."""
        self.root.map.remove(start)
        with self.root.lock:
            self.root.regions.pop(start, None)

    def _region(self, start: int) -> Region | None:
        return self.root.regions.get(start)


class DistributedProcess(_Process):
    """The distributed Process: copies of the regions for each processor that faults on them (figure 5, right).

    Args of ``create``:
        pm: the process's page manager.
    """

    class Root(_State, k42.DistributedRoot):
        """Holds the master."""

        replicated = True

    root: Root

    def __init__(self) -> None:
        self._copies: dict[int, Region] = {}  # written with the root's lock held; read by this processor alone

    def detach_region(self, start: int) -> None:
        """Removes a region; see `Process.detach_region`."""
        root = self.root
        root.map.remove(start)
        with root.lock:
            root.regions.pop(start, None)
            for rep in root.reps():
                rep._copies.pop(start, None)

    def _region(self, start: int) -> Region | None:
        region = self._copies.get(start)
        if region is None:
            root = self.root
            with root.lock:  # else a copy could be made of what is just being removed, and stay
                region = root.regions.get(start)
                if region is not None:
                    self._copies[start] = region
        return region
