"""The Global Page Manager: all page frames of the kernel, under its budget (paper section 4.2, figure 7).

There are two, and each can be put in the other's place by `k42.swap` while frames are taken and given. The native half,
which counts the frames, stays the same object (``native/core/vm/frame_pool.hpp``).

What is local, what is shared?
    `SharedGlobalPM`: the count of frames and the ring of FCMs, each under a lock, are shared. `DistributedGlobalPM`:
    each processor has a stock of free frames, and a ring of the FCMs that were attached there. The overflow, from
    which the stocks are filled, is shared; and so are the promises.
How are representatives made, when do they join?
    The shared one at the first call. Of the distributed one each processor's at its first call, with an empty ring; its
    stock when it first takes a frame.
How do local and global operations synchronise?
    A stock has at most a few frames, and what is too much goes to the overflow. Who finds no frame there takes what all
    stocks have, so that the budget can be used to the last frame, and it is exceeded at no moment. Reclaiming asks one
    FCM after the other, those of its own ring first, with no lock of its own held.
    Whose pages go: first of those clients that have more than their shares; if that gives none, the pages of the client
    that asks; anybody's only if that gives none either (``native/core/vm/account.hpp`` says what a share is).
How are they organised?
    FCMs stand in a ring, so that all give back in turn; a distributed one has its processor's, the home of the FCM.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

import k42
from k42 import _native
from k42.vm.errors import OutOfFrames
from k42.vm.protocol import text_of

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


class Level(enum.IntEnum):
    """How many frames are free."""

    CRITICAL = 0
    """Nearly none: who can wait should."""
    LOW = 1
    """Caches should give frames back until it is `MID`."""
    MID = 2
    """Enough."""
    HIGH = 3
    """Plenty; or the budget is too small to keep any frame free ahead of need."""


ABOVE_SHARE = 0
"""Whose pages to give back: of clients with more than their shares. Else the number of a client's account; or:"""
ANYBODYS = 1 << 16
"""Whoever's comes first."""

_GRANTED, _RECLAIM, _EXHAUSTED, _LIMITED = range(4)
_FEW = 16  # pages: who has no more must not be kept from making progress by giving back its own
_CLUSTER = 16  # pages read at once from a file: 64 KiB
_PATIENCE = 30.0  # seconds to wait for frames that others have in I/O


class GlobalPageManager(k42.Object):
    """The interface."""

    def native(self) -> _native.FramePool:
        """The native half: the pool that the fault engine takes frames from."""
        raise NotImplementedError

    def allocate(self, frames: int, backing: Backing, account: _native.Account | None = None) -> int:
        """Takes frames of 4 KiB, getting file pages back if need be; may wait for pages in I/O.

        Args:
            frames: how many.
            backing: who stands behind the pages.
            account: to which they are charged; None: to nobody's.

        Returns:
            The account's number.

        Raises:
            OutOfFrames: there are none to be had.
        """
        raise NotImplementedError

    def release(self, frames: int, backing: Backing) -> None:
        """Gives frames back that are charged to nobody."""
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

    def level(self) -> Level:
        """How many frames are free."""
        raise NotImplementedError

    def check(self) -> bool:
        """Whether all frames, promises and accounts add up, at one moment; true at any time."""
        raise NotImplementedError

    def lacking(self) -> int:
        """How many frames are missing to enough free ones; 0: it is not LOW."""
        raise NotImplementedError

    def reclaim(self, frames: int, whose: int | None = None) -> int:
        """Asks FCMs in turn for so many frames; how many they gave back. May wait for stores.

        Args:
            frames: how many.
            whose: whose pages go. None: of those with more than their shares; anybody's if there are none.
        """
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


class _Ring:
    """FCMs that are asked for pages in turn."""

    def __init__(self, fcms: Iterable[FileCacheManager] = ()) -> None:
        self.lock = threading.Lock()  # protects fcms; a leaf: no call into an FCM while it is held
        self.fcms: dict[FileCacheManager, None] = dict.fromkeys(fcms)  # whose turn comes first stands first

    def add(self, fcm: FileCacheManager) -> None:
        """Adds one that is not there."""
        with self.lock:
            self.fcms[fcm] = None

    def remove(self, fcm: FileCacheManager) -> bool:
        """Removes one; False when it is not there."""
        with self.lock:
            return fcm in self.fcms and self.fcms.pop(fcm) is None

    def had_its_turn(self, fcm: FileCacheManager) -> None:
        """It is asked after all others from now on."""
        with self.lock:
            if fcm in self.fcms:
                del self.fcms[fcm]
                self.fcms[fcm] = None

    def now(self) -> list[FileCacheManager]:
        """All, in the order of their turns."""
        with self.lock:
            return list(self.fcms)


class _State:
    """What the roots have in common: the pool.

    Args of ``create``:
        budget: frames of 4 KiB. None: it comes with the state of another implementation.
    """

    distributed: ClassVar[bool]
    pool: _native.FramePool

    def __init__(self, budget: int | None = None) -> None:
        if budget is not None:
            self.budget = budget
            self.pool = _native.FramePool(budget, self.distributed)

    def rings(self) -> list[_Ring]:
        """All rings of FCMs."""
        raise NotImplementedError

    def export_state(self, form: str) -> tuple[int, _native.FramePool, list[FileCacheManager]]:
        """Return the budget, the pool and the FCMs."""
        return self.budget, self.pool, [fcm for ring in self.rings() for fcm in ring.now()]

    def import_state(self, form: str, state: tuple[int, _native.FramePool, list[FileCacheManager]]) -> None:
        """Go on with another implementation's pool, which is changed while frames are taken and given."""
        self.budget, self.pool, fcms = state
        self.adopt(fcms)
        self.pool.distribute(self.distributed)

    def adopt(self, fcms: list[FileCacheManager]) -> None:
        """Takes these FCMs into its rings."""
        raise NotImplementedError


class _GlobalPM(GlobalPageManager):
    """What both implementations do alike."""

    transfers: ClassVar[tuple[str, ...]] = ("frames",)

    root: _State

    def _rings(self) -> list[_Ring]:
        """The rings in the order in which to ask."""
        return self.root.rings()

    def native(self) -> _native.FramePool:
        """The native half."""
        return self.root.pool

    def allocate(self, frames: int, backing: Backing, account: _native.Account | None = None) -> int:
        """Takes frames; see `GlobalPageManager.allocate`."""
        pool = self.root.pool
        deadline = time.monotonic() + _PATIENCE
        while True:
            changes = pool.changes()
            try:
                number = account.number() if account else 0
            except ValueError as error:
                raise OutOfFrames("the client has gone") from error
            grant = pool.allocate(frames, backing, number)
            if grant == _GRANTED:
                return number
            limit = account.limit() if account and grant == _LIMITED else None
            if grant == _EXHAUSTED or time.monotonic() > deadline:
                raise OutOfFrames(self._no_frame(limit))
            # Some more than is wanted, so as not to come again at once; but not all of what files have: an access that
            # lies across two pages needs the one that came last.
            wanted = max(frames, min(self.root.budget // 16, self.usage()["file"] // 4, 512))
            own = max(frames, min(wanted, account.used() // 4)) if account else 0
            if grant == _LIMITED:
                given = self.reclaim(own, number)
            else:
                given = self.reclaim(wanted, ABOVE_SHARE) if pool.refresh_shares() else 0
                if not given and account and account.used() >= max(_FEW, 2 * frames):
                    given = self.reclaim(own, number)
                given = given or self.reclaim(wanted, ANYBODYS)
            if not given:
                pool.wait(changes, 100)

    def _no_frame(self, limit: int | None) -> str:
        if limit is not None:
            return (
                f"the limit of this client ({text_of(limit)}) has no frame left for this page: give clients more "
                "with `k42 serve --client-limit`, or unpin or close something"
            )
        return (
            f"the kernel's budget ({text_of(self.root.budget)}) has no frame left for this page: "
            "give it more with `k42 serve --budget`, or use less memory made with overcommit=True"
        )

    def lacking(self) -> int:
        """How many frames are missing; see `GlobalPageManager.lacking`."""
        pool = self.root.pool
        return max(1, pool.enough() - pool.free()) if pool.level() <= Level.LOW else 0

    def reclaim(self, wanted: int, whose: int | None = None) -> int:
        """Asks FCMs in turn; see `GlobalPageManager.reclaim`."""
        if whose is None:
            whose = ABOVE_SHARE if self.root.pool.refresh_shares() else ANYBODYS
        given = 0
        for ring in self._rings():
            for fcm in ring.now():
                try:
                    given += fcm.give_back(wanted - given, whose)
                except k42.Destroyed:
                    continue  # its file was closed since we looked: its frames are free
                ring.had_its_turn(fcm)
                if given >= wanted:
                    return given
        return given

    def release(self, frames: int, backing: Backing) -> None:
        """Gives frames back."""
        self.root.pool.release(frames, backing, 0)

    def reserve(self, frames: int) -> None:
        """Promises frames; see `GlobalPageManager.reserve`."""
        if not self.root.pool.reserve(frames):
            free = self._unpromised()
            raise OutOfFrames(
                f"{text_of(frames)} of anonymous memory do not fit: of the kernel's budget of "
                f"{text_of(self.root.budget)}, {text_of(free)} are not promised to others. Start "
                "the kernel with a larger `--budget`, or ask for overcommit=True"
            )

    def unreserve(self, frames: int) -> None:
        """Takes a promise back."""
        self.root.pool.unreserve(frames)

    def promise_file(self, frames: int) -> None:
        """Keeps room for file pages; see `GlobalPageManager.promise_file`."""
        if not self.root.pool.promise_file(frames):
            raise OutOfFrames(
                f"a page of {text_of(frames)} does not fit beside the anonymous memory in the kernel's budget of "
                f"{text_of(self.root.budget)}: ask for a smaller page_size, or start it with a larger `--budget`"
            )

    def detach_fcm(self, fcm: FileCacheManager) -> None:
        """This FCM is asked no more."""
        if not any(ring.remove(fcm) for ring in self._rings()):
            raise ValueError("this FCM is not attached")

    def level(self) -> Level:
        """How many frames are free."""
        return Level(self.root.pool.level())

    def check(self) -> bool:
        """Whether all frames add up; see `GlobalPageManager.check`."""
        return self.root.pool.check()

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


class SharedGlobalPM(_GlobalPM):
    """The non-distributed Global PM: one pool, one lock (figure 7, left).

    Args of ``create``:
        budget: frames of 4 KiB.
    """

    class Root(_State, k42.SharedRoot):
        """Holds the pool and the ring of FCMs."""

        distributed = False

        def __init__(self, budget: int | None = None) -> None:
            super().__init__(budget)
            self.ring = _Ring()

        def rings(self) -> list[_Ring]:
            """The one ring."""
            return [self.ring]

        def adopt(self, fcms: list[FileCacheManager]) -> None:
            """Takes these FCMs into its ring."""
            self.ring = _Ring(fcms)

    root: Root

    def attach_fcm(self, fcm: FileCacheManager) -> None:
        """This FCM's pages can be asked back."""
        self.root.ring.add(fcm)


class DistributedGlobalPM(_GlobalPM):
    """The distributed Global PM: a stock of free frames and a ring of FCMs for each processor (figure 7, right).

    Args of ``create``:
        budget: frames of 4 KiB.
    """

    class Root(_State, k42.DistributedRoot):
        """Holds the pool, and the FCMs that no processor of this implementation has attached."""

        distributed = True

        def __init__(self, budget: int | None = None) -> None:
            super().__init__(budget)
            self.adopted = _Ring()

        def rings(self) -> list[_Ring]:
            """The ring of each processor, and that of those who were there before."""
            return [self.adopted, *(rep.ring for rep in self.reps())]

        def adopt(self, fcms: list[FileCacheManager]) -> None:
            """Takes these FCMs into a ring that is no processor's."""
            self.adopted = _Ring(fcms)

    root: Root

    def __init__(self) -> None:
        self.ring = _Ring()
        self._turn = 0  # which of the others' rings comes first

    def _rings(self) -> list[_Ring]:
        others = [ring for ring in self.root.rings() if ring is not self.ring]
        self._turn = (self._turn + 1) % len(others)
        return [self.ring, *others[self._turn :], *others[: self._turn]]

    def attach_fcm(self, fcm: FileCacheManager) -> None:
        """This FCM's pages can be asked back: first by the processor of the caller, the home of the FCM."""
        self.ring.add(fcm)
