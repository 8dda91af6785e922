"""The Global Page Manager: all page frames of the kernel, under its budget (paper section 4.2, figure 7).

What is local, what is shared?
    `SharedGlobalPM` has one representative: the count of frames and the list of FCMs, each under a lock, are shared.
How are representatives made, when do they join?
    One, at the first call.
How do local and global operations synchronise?
    By the lock of the frame pool. Reclaiming asks one FCM after the other, with no lock of its own held.
How are they organised?
    FCMs stand in a ring, so that all give back in turn.
"""

from __future__ import annotations

import enum
import threading
import time
from typing import TYPE_CHECKING

import k42
from k42 import _native
from k42.vm.errors import OutOfFrames

if TYPE_CHECKING:
    from k42.vm.fcm import FileCacheManager


class Backing(enum.IntEnum):
    """Who stands behind a page."""

    FILE = 0
    """A file, which can give it back at any time."""
    RESERVED = 1
    """Anonymous memory whose frames were promised when it was made."""
    OVERCOMMITTED = 2
    """Anonymous memory that only gets what nobody else was promised."""


_GRANTED, _RECLAIM, _EXHAUSTED = range(3)
_CLUSTER = 16  # pages read at once from a file: 64 KiB
_PATIENCE = 30.0  # seconds to wait for frames that others have in I/O


class GlobalPageManager(k42.Object):
    """The interface."""

    def native(self) -> _native.FramePool:
        """The native half: the pool that the fault engine takes frames from."""
        raise NotImplementedError

    def allocate(self, frames: int, backing: Backing) -> None:
        """Takes frames of 4 KiB, getting file pages back if need be; may wait for pages in I/O.

        Raises:
            OutOfFrames: there are none to be had.
        """
        raise NotImplementedError

    def release(self, frames: int, backing: Backing) -> None:
        """Gives frames back."""
        raise NotImplementedError

    def reserve(self, frames: int) -> None:
        """Promises frames to anonymous memory.

        Raises:
            OutOfFrames: they are not to be had.
        """
        raise NotImplementedError

    def unreserve(self, frames: int) -> None:
        """Takes a promise back."""
        raise NotImplementedError

    def promise_file(self, frames: int) -> None:
        """Keeps room for file pages that are brought in `frames` at a time.

        Raises:
            OutOfFrames: anonymous memory leaves no such room.
        """
        raise NotImplementedError

    def attach_fcm(self, fcm: FileCacheManager) -> None:
        """This FCM's pages can be asked back."""
        raise NotImplementedError

    def detach_fcm(self, fcm: FileCacheManager) -> None:
        """This FCM is asked no more."""
        raise NotImplementedError

    def cluster(self) -> int:
        """How many pages to read at once from a file."""
        raise NotImplementedError

    def prefetchable(self) -> int:
        """How many frames one request may fill ahead of time, without pushing out what it has just brought in."""
        raise NotImplementedError

    def usage(self) -> dict[str, int]:
        """Frames in use and promised, by kind."""
        raise NotImplementedError


class SharedGlobalPM(GlobalPageManager):
    """The non-distributed Global PM: one pool, one lock (figure 7, left).

    Args of ``create``:
        budget: frames of 4 KiB.
    """

    class Root(k42.SharedRoot):
        """Holds the pool and the ring of FCMs."""

        def __init__(self, budget: int) -> None:
            self.budget = budget
            self.pool = _native.FramePool(budget)
            self.lock = threading.Lock()  # protects fcms; a leaf: no call into an FCM while it is held
            self.fcms: list[FileCacheManager] = []

    root: Root

    def native(self) -> _native.FramePool:
        """The native half."""
        return self.root.pool

    def allocate(self, frames: int, backing: Backing) -> None:
        """Takes frames; see `GlobalPageManager.allocate`."""
        pool = self.root.pool
        deadline = time.monotonic() + _PATIENCE
        while True:
            changes = pool.changes()
            grant = pool.allocate(frames, backing)
            if grant == _GRANTED:
                return
            if grant == _EXHAUSTED or time.monotonic() > deadline:
                raise OutOfFrames(
                    f"the kernel's budget ({self._text(self.root.budget)}) has no frame left for this page: "
                    "give it more with `k42 serve --budget`, or use less memory made with overcommit=True"
                )
            if not self._reclaim(frames):
                pool.wait(changes, 100)

    def _reclaim(self, frames: int) -> int:
        """Asks the FCMs in turn for at least `frames`, and for some more so as not to come again at once."""
        # Not all of what files have: an access that lies across two pages needs the one that came last.
        wanted = max(frames, min(self.root.budget // 16, self.usage()["file"] // 4, 512))
        given = 0
        with self.root.lock:
            ring = list(self.root.fcms)
        for fcm in ring:
            try:
                given += fcm.give_back(wanted - given)
            except k42.Destroyed:
                continue  # its file was closed since we looked: its frames are free
            with self.root.lock:
                if fcm in self.root.fcms:
                    self.root.fcms.remove(fcm)
                    self.root.fcms.append(fcm)
            if given >= wanted:
                break
        return given

    def release(self, frames: int, backing: Backing) -> None:
        """Gives frames back."""
        self.root.pool.release(frames, backing)

    def reserve(self, frames: int) -> None:
        """Promises frames; see `GlobalPageManager.reserve`."""
        if not self.root.pool.reserve(frames):
            free = self._unpromised()
            raise OutOfFrames(
                f"{self._text(frames)} of anonymous memory do not fit: of the kernel's budget of "
                f"{self._text(self.root.budget)}, {self._text(free)} are not promised to others. Start "
                "the kernel with a larger `--budget`, or ask for overcommit=True"
            )

    def unreserve(self, frames: int) -> None:
        """Takes a promise back."""
        self.root.pool.unreserve(frames)

    def promise_file(self, frames: int) -> None:
        """Keeps room for file pages; see `GlobalPageManager.promise_file`."""
        if not self.root.pool.promise_file(frames):
            raise OutOfFrames(
                f"a page of {self._text(frames)} does not fit beside the anonymous memory in the kernel's budget of "
                f"{self._text(self.root.budget)}: ask for a smaller page_size, or start it with a larger `--budget`"
            )

    def attach_fcm(self, fcm: FileCacheManager) -> None:
        """This FCM's pages can be asked back."""
        with self.root.lock:
            self.root.fcms.append(fcm)

    def detach_fcm(self, fcm: FileCacheManager) -> None:
        """This FCM is asked no more."""
        with self.root.lock:
            self.root.fcms.remove(fcm)

    def cluster(self) -> int:
        """How many pages to read at once: fewer when the budget is tiny."""
        return max(1, min(_CLUSTER, self.root.budget // 4))

    def prefetchable(self) -> int:
        """How many frames one request may fill ahead of time: half of what is not promised to others."""
        usage = self.usage()
        return max(1, (usage["budget"] - usage["reserved"] - usage["overcommitted"]) // 2)

    def usage(self) -> dict[str, int]:
        """Frames in use and promised, by kind."""
        return self.root.pool.usage()

    def _unpromised(self) -> int:
        usage = self.usage()
        return max(0, usage["budget"] - usage["promised_anonymous"] - usage["promised_file"] - usage["overcommitted"])

    @staticmethod
    def _text(frames: int) -> str:
        size = float(frames * 4)
        for unit in ("KiB", "MiB", "GiB"):
            if size < 1024:
                return f"{size:.4g} {unit}"
            size /= 1024
        return f"{size:.4g} TiB"
