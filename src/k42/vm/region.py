"""Region: a range of a process's addresses that shows part of a file (paper section 4.3).

It turns an address into a file page, and keeps faults apart from the operations that would pull the region away
under them, by its gate.

There are two, and each can be put in the other's place by `k42.swap` while faults come: the native half, with the gate,
stays the same object; what the gate is made of changes (``native/core/vm/region_gate.hpp``).

What is local, what is shared?
    `SharedRegion`: one request counter, written by every fault on every processor, which alone is enough to degrade
    (figure 9). `DistributedRegion`: a request counter for each processor, which its faults alone write (figure 10). The
    state of the gate is shared, on a line that faults only read; and so is what never changes: addresses, file, HAT.
How are representatives made, when do they join?
    The shared one at the first call. Of the distributed one, each processor's counter at its first fault. One that
    joins while the region is stopped finds it stopped, since it looks at the state as all do.
How do local and global operations synchronise?
    Faults enter and leave the gate; who takes the region or a window away stops it or shuts it down, and waits for
    those inside. A fault counts itself in, then looks at the state; a stopper sets the state, then looks at the counts.
How are they organised?
    The counters stand in a list, which who stops goes through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, ClassVar

import k42
from k42 import _native
from k42.vm.fault import Fault
from k42.vm.hat import Hat
from k42.vm.pm import PageManager

if TYPE_CHECKING:
    from k42.vm.fcm import FileCacheManager


class Region(k42.Object):
    """The interface."""

    def native(self) -> _native.Region:
        """The native half: what the fault engine goes through."""
        raise NotImplementedError

    def handle_fault(self, fault: Fault, hat: Hat, pm: PageManager) -> None:
        """Finishes a fault in this region, or ends the access with SIGBUS."""
        raise NotImplementedError

    def shutdown(self) -> None:
        """Rejects faults from now on, and returns when those inside have left."""
        raise NotImplementedError


class _State:
    """What the roots have in common: the native half, and what it refers to.

    Args of ``create``:
        fcm: the file cache it shows.
        hat: the address translation of the process.
        start: address, in bytes; a page's.
        pages: length, in pages of 4 KiB.
        first_page: the file's page at `start`.
        group: the region's page size, in pages of 4 KiB.
        around: of so many pages of 4 KiB around a fault, those that are resident are mapped with it; 0: of 16, and up
            to 512 where faults follow each other.
        tracked: its windows share the frames and can be written to: writes to clean pages are faults.

    Without arguments they come with the state of another implementation.
    """

    distributed: ClassVar[bool]
    fcm: FileCacheManager
    region: _native.Region
    range: tuple[int, int]

    def __init__(
        self,
        fcm: FileCacheManager | None = None,
        hat: Hat | None = None,
        start: int = 0,
        pages: int = 0,
        first_page: int = 0,
        group: int = 1,
        around: int = 1,
        tracked: bool = False,
    ) -> None:
        if fcm is None or hat is None:
            return
        self.fcm = fcm
        self.region = _native.Region(fcm.native(), hat.native(), start, pages, first_page, group, around, tracked)
        self.region.distribute(self.distributed)
        self.range = (first_page, first_page + pages)

    def export_state(self, form: str) -> _State:
        """Return the whole: what it refers to goes on."""
        return self

    def import_state(self, form: str, state: _State) -> None:
        """Go on with the native half of another implementation; its gate is changed while faults pass."""
        self.fcm, self.region, self.range = state.fcm, state.region, state.range
        self.region.distribute(self.distributed)


class _Region(Region):
    """What both implementations do alike."""

    transfers: ClassVar[tuple[str, ...]] = ("region",)

    root: _State

    def native(self) -> _native.Region:
        """The native half."""
        return self.root.region

    def handle_fault(self, fault: Fault, hat: Hat, pm: PageManager) -> None:
        """Finishes a fault; see `Region.handle_fault`."""
        root = self.root

        def inside() -> AbstractContextManager[bool]:
            return self._inside(fault, hat)

        with inside() as shown:
            if not shown:
                hat.wake(fault.cpu, fault.address)  # being unmapped: the engine ends the access when it happens again
                return
            page, first, count = root.region.group_of(fault.canonical)
            at = fault._replace(tracked=root.region.tracked())
            rest = root.fcm.map_page(at, hat, pm, page, (first, count), root.range, inside)
        if rest:
            rest()

    @contextlib.contextmanager
    def _inside(self, fault: Fault, hat: Hat) -> Iterator[bool]:
        """Inside the gate the window stays. Before, it may have gone, and another come to its addresses."""
        region = self.root.region
        if not region.enter():
            yield False
            return
        try:
            yield hat.shows(fault.cpu, fault.address, fault.canonical)
        finally:
            region.leave()

    def shutdown(self) -> None:
        """Rejects faults from now on; see `Region.shutdown`."""
        self.root.region.shutdown()


class SharedRegion(_Region):
    """The non-distributed Region: one request counter (figure 9). For the args of ``create`` see `_State`."""

    class Root(_State, k42.SharedRoot):
        """Holds the native half."""

        distributed = False


class DistributedRegion(_Region):
    """The distributed Region: a request counter for each processor (figure 10). As `SharedRegion` otherwise."""

    class Root(_State, k42.DistributedRoot):
        """Holds the native half."""

        distributed = True
