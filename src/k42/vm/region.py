"""Region: a range of a process's addresses that shows part of a file (paper section 4.3).

It turns an address into a file page, and keeps faults apart from the operations that would pull the region away
under them, by its gate.

What is local, what is shared?
    `SharedRegion` has one representative: its request counter is written by every fault on every processor, which
    alone is enough to degrade (figure 9).
How are representatives made, when do they join?
    One, at the first call.
How do local and global operations synchronise?
    Faults enter and leave the gate; destroying shuts it down and waits for those inside.
How are they organised?
    A single one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

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


class SharedRegion(Region):
    """The non-distributed Region: one request counter.

    Args of ``create``:
        fcm: the file cache it shows.
        hat: the address translation of the process.
        start: address, in bytes; a page's.
        pages: length, in pages of 4 KiB.
        first_page: the file's page at `start`.
        group: the region's page size, in pages of 4 KiB.
        around: of so many pages of 4 KiB around a fault, those that are resident are mapped with it.
        tracked: its windows share the frames and can be written to: writes to clean pages are faults.
    """

    class Root(k42.SharedRoot):
        """Holds the native half, and what it refers to."""

        def __init__(
            self,
            fcm: FileCacheManager,
            hat: Hat,
            start: int,
            pages: int,
            first_page: int,
            group: int,
            around: int = 1,
            tracked: bool = False,
        ) -> None:
            self.fcm = fcm
            self.tracked = tracked
            self.region = _native.Region(fcm.native(), hat.native(), start, pages, first_page, group, around, tracked)
            self.range = (first_page, first_page + pages)

    root: Root

    def native(self) -> _native.Region:
        """The native half."""
        return self.root.region

    def handle_fault(self, fault: Fault, hat: Hat, pm: PageManager) -> None:
        """Finishes a fault; see `Region.handle_fault`."""
        root = self.root
        fault = fault._replace(tracked=root.tracked)

        def inside() -> AbstractContextManager[bool]:
            return self._inside(fault, hat)

        with inside() as shown:
            if not shown:
                hat.wake(fault.cpu, fault.address)  # being unmapped: the engine ends the access when it happens again
                return
            page, first, count = root.region.group_of(fault.canonical)
            rest = root.fcm.map_page(fault, hat, pm, page, (first, count), root.range, inside)
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
