"""File Cache Manager (FCM): the resident pages of one file, or of one piece of anonymous memory (paper 4.4).

Everybody who maps the file goes through the same FCM, so that there is one frame a page. The frames are in a memfd,
which clients map; the page descriptors are in the native half.

What is local, what is shared?
    `SharedFCM` has one representative: its page table, under one lock, is shared.
How are representatives made, when do they join?
    One, at the first call.
How do local and global operations synchronise?
    By the lock of each page's descriptor: a page is mapped, filled and taken away under it. A page in I/O is marked
    so; only the fault that marked it fills it, the others are woken at the end.
How are they organised?
    The descriptors are hashed by page index; pages that can be given back also stand in order of arrival.
"""

from __future__ import annotations

import enum
import os

import k42
from k42 import _native
from k42.vm.fault import Fault
from k42.vm.fr import FileRepresentative, ZeroFR
from k42.vm.hat import Hat
from k42.vm.pm import Backing, GlobalPageManager, PageManager
from k42.vm.protocol import PAGE, pages_of


class Outcome(enum.IntEnum):
    """What became of a fault in the native half."""

    MAPPED = 0
    ZERO_FILLED = 1
    QUEUED = 2
    ABSENT = 3
    NO_FRAME = 4
    FAILED = 5


class FileCacheManager(k42.Object):
    """The interface."""

    def native(self) -> _native.FileCache:
        """The native half: what the fault engine goes through."""
        raise NotImplementedError

    def memfd(self) -> int:
        """The descriptor of the frames; the FCM's own."""
        raise NotImplementedError

    def map_page(
        self,
        fault: Fault,
        hat: Hat,
        pm: PageManager,
        page: int,
        group: tuple[int, int],
        mappable: tuple[int, int],
    ) -> None:
        """Finishes a fault on `page`: finds or makes the page, and maps it.

        Args:
            fault: where it happened.
            hat: where to map.
            pm: whom to ask for frames.
            page: index in the file.
            group: (first page, pages) that one fault on this region brings in.
            mappable: [first, end) pages that the region shows.

        Raises:
            OutOfFrames: no frame is to be had; the page stays absent.
            StoreError: the file could not be read; the page stays absent.
        """
        raise NotImplementedError

    def give_back(self, frames: int) -> int:
        """Evicts up to so many clean pages, oldest first; the number evicted."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives all frames back and closes the store; no region shows the file any more."""
        raise NotImplementedError

    def stat(self) -> dict[str, int | str]:
        """Name, resident pages, and counts of what happened so far."""
        raise NotImplementedError


class SharedFCM(FileCacheManager):
    """The non-distributed FCM: one page table under one lock.

    Args of ``create``:
        global_pm: the frames.
        fr: what fills absent pages.
        backing: who stands behind the frames.
    """

    class Root(k42.SharedRoot):
        """Holds the frames and the native half."""

        def __init__(self, global_pm: GlobalPageManager, fr: FileRepresentative, backing: Backing) -> None:
            self.global_pm = global_pm
            self.fr = fr
            self.backing = backing
            self.pages = pages_of(fr.size())
            self.cluster = global_pm.cluster() if backing is Backing.FILE else 1
            memfd = os.memfd_create("k42:" + os.path.basename(fr.name())[:48], os.MFD_CLOEXEC)
            try:
                os.ftruncate(memfd, self.pages * PAGE)
                if backing is Backing.FILE:
                    os.fchmod(memfd, 0o400)  # a reader cannot get a writable descriptor by way of /proc
                fill = 0 if isinstance(k42.local(fr), ZeroFR) else 1
                self.cache = _native.FileCache(global_pm.native(), memfd, self.pages, fill, backing)
            except BaseException:
                os.close(memfd)
                raise

    root: Root

    def native(self) -> _native.FileCache:
        """The native half."""
        return self.root.cache

    def memfd(self) -> int:
        """The descriptor of the frames."""
        return self.root.cache.memfd()

    def map_page(
        self,
        fault: Fault,
        hat: Hat,
        pm: PageManager,
        page: int,
        group: tuple[int, int],
        mappable: tuple[int, int],
    ) -> None:
        """Finishes a fault; see `FileCacheManager.map_page`."""
        root, cache, native_hat = self.root, self.root.cache, hat.native()
        while True:
            outcome = cache.resolve(native_hat, fault.cpu, fault.address, page, *group)
            if outcome not in (Outcome.ABSENT, Outcome.NO_FRAME):
                return
            first, count = cache.begin_io(page, *self._cluster(page, group))
            if count:
                break  # else another fault was faster: look again
        frames = 0
        try:
            pm.allocate(count, root.backing)
            frames = count
            root.fr.fill(cache.memfd(), first, count)
        except BaseException:
            cache.abort_io(first, count)  # before the release: what was filled already still takes frames
            pm.release(frames, root.backing)
            raise
        cache.complete_io(native_hat, fault.cpu, fault.address, page, first, count, *mappable)

    def _cluster(self, page: int, group: tuple[int, int]) -> tuple[int, int]:
        """What to read at once: the group, or more where reading single pages would cost more than reading on."""
        cluster = self.root.cluster
        if cluster <= group[1]:
            return group
        first = page - page % cluster
        return first, min(cluster, self.root.pages - first)

    def give_back(self, frames: int) -> int:
        """Evicts clean pages; see `FileCacheManager.give_back`."""
        return self.root.cache.give_back(frames)

    def close(self) -> None:
        """Gives all frames back; see `FileCacheManager.close`."""
        self.root.cache.give_back(self.root.pages)
        self.root.fr.close()
        k42.destroy(self.root.fr)

    def stat(self) -> dict[str, int | str]:
        """Name, resident pages, counts; see `FileCacheManager.stat`."""
        descriptors, table_bytes = self.root.cache.sizes()
        return {
            "name": self.root.fr.name(),
            "backing": self.root.backing.name.lower(),
            "pages": self.root.pages,
            "descriptors": descriptors,
            "table_bytes": table_bytes,
            **self.root.cache.counts(),
        }
