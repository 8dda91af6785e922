"""The page manager of one process: forwards to the Global PM, and has what it takes charged (paper section 4.2).

What is local, what is shared?
    The account is native and counts by processor where the Global PM's pool does; its limit, if it has one, is handed
    out to the processors in chunks, and exact all the same (``native/core/vm/account.hpp``). Nothing else changes.
How are representatives made, when do they join?
    One, at the first call.
How do local and global operations synchronise?
    As in the pool of frames.
How are they organised?
    The accounts of all processes stand in a table of the pool, by the number that descriptors of pages keep.
"""

from __future__ import annotations

import k42
from k42 import _native
from k42.vm.pm.global_pm import Backing, GlobalPageManager


class PageManager(k42.Object):
    """The interface."""

    def allocate(self, frames: int, backing: Backing) -> int:
        """Takes frames of 4 KiB for this process; the number of the account that they are charged to.

        Raises:
            OutOfFrames: there are none to be had.
        """
        raise NotImplementedError

    def cluster(self) -> int:
        """How many pages to read at once from a file."""
        raise NotImplementedError

    def prefetchable(self) -> int:
        """How many frames one request may fill ahead of time."""
        raise NotImplementedError

    def account(self) -> _native.Account:
        """What the process has of the frames; who evicts a page gives its frame back to this account's number."""
        raise NotImplementedError

    def close(self) -> None:
        """The process is gone: nothing is charged to it any more."""
        raise NotImplementedError

    def stat(self) -> dict[str, int | None]:
        """Frames ``used``, the ``limit``, and the ``share``, below which others cannot push it."""
        raise NotImplementedError


class ProcessPM(PageManager):
    """Redirects to the Global PM, as the paper's does.

    Args of ``create``:
        global_pm: the frames.
        limit: how many frames the process may have; None: as many as there are.
    """

    class Root(k42.SharedRoot):
        """Holds the Global PM and the account."""

        def __init__(self, global_pm: GlobalPageManager, limit: int | None = None) -> None:
            self.global_pm = global_pm
            self.limit = limit
            self.account = _native.Account(global_pm.native(), limit)

    root: Root

    def allocate(self, frames: int, backing: Backing) -> int:
        """Takes frames; see `PageManager.allocate`."""
        return self.root.global_pm.allocate(frames, backing, self.root.account)

    def cluster(self) -> int:
        """How many pages to read at once: fewer under a tiny limit."""
        return self._within_limit(self.root.global_pm.cluster(), 4)

    def prefetchable(self) -> int:
        """How many frames one request may fill ahead of time: half of the limit at most."""
        return self._within_limit(self.root.global_pm.prefetchable(), 2)

    def _within_limit(self, frames: int, part: int) -> int:
        limit = self.root.limit
        return frames if limit is None else max(1, min(frames, limit // part))

    def account(self) -> _native.Account:
        """What the process has of the frames."""
        return self.root.account

    def close(self) -> None:
        """The process is gone."""
        self.root.account.close()

    def stat(self) -> dict[str, int | None]:
        """Frames used, the limit, the share; see `PageManager.stat`."""
        account = self.root.account
        return {"used": account.used(), "limit": account.limit(), "share": account.share()}
