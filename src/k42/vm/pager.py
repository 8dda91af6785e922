"""The pager: keeps some frames free before anybody needs them, and writes dirty pages back before they have to go.

One thread. It wakes up when frames run low, and visits the file caches in turn, each for a part of what it has; and
once in a while, to write back what has been dirty for that long (K42's scanner; paper 4.2).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Callable

import k42
from k42.vm.errors import StoreError
from k42.vm.fcm import FileCacheManager
from k42.vm.pm import GlobalPageManager

log = logging.getLogger("k42.kernel")

_PERIOD = 5.0  # seconds between two rounds that write back all that is dirty
_DIRTY_SHARE = 8  # of the budget: when more than an eighth is dirty the round comes at once
_ROUND = 4096  # pages written back of one cache before the next has its turn
_LOOK = 0.5  # seconds between two looks at how much is dirty


class Pager(threading.Thread):
    """The thread.

    Args:
        global_pm: the frames.
        fcms: returns the file caches that can give pages back.
    """

    def __init__(self, global_pm: GlobalPageManager, fcms: Callable[[], list[FileCacheManager]]) -> None:
        super().__init__(name="k42-pager", daemon=True)
        self._global_pm = global_pm
        self._fcms = fcms
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._lock = threading.Lock()  # protects _wanted; a leaf
        self._wanted: dict[FileCacheManager, None] = {}  # to be written back at once
        self._ending = False
        self._next_round = time.monotonic() + _PERIOD
        self._turn = 0

    def write_soon(self, fcm: FileCacheManager) -> None:
        """Has the dirty pages of a cache written back at once: its last writer has gone."""
        with self._lock:
            self._wanted[fcm] = None
        self._wake()

    def stop(self) -> None:
        """Ends the thread."""
        self._ending = True
        self._wake()
        self.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"x")

    def run(self) -> None:
        """Works until `stop`."""
        low = self._global_pm.native().low_event()
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        poll.register(low, select.POLLIN)
        while not self._ending:
            for descriptor, _ in poll.poll(_LOOK * 1000):
                with contextlib.suppress(BlockingIOError):
                    os.read(descriptor, 4096 if descriptor == self._wake_read else 8)
            try:
                self._refill()
                self._write()
            except Exception:
                log.exception("the pager")

    def _refill(self) -> None:
        """Frees frames until the level is no longer low; or until a round gave nothing."""
        while not self._ending and (wanted := self._global_pm.lacking()):
            if not self._global_pm.reclaim(wanted):
                return  # all is in I/O, pinned, or cannot be written: who waits for frames asks again

    def _write(self) -> None:
        with self._lock:
            wanted = list(self._wanted)
            self._wanted.clear()
        now = time.monotonic()
        everywhere = now >= self._next_round
        fcms = self._fcms()
        if not everywhere:
            dirty = 0
            for fcm in fcms:
                with contextlib.suppress(k42.Destroyed):
                    dirty += fcm.dirty_pages()
            everywhere = dirty * _DIRTY_SHARE > self._global_pm.usage()["budget"]
        if everywhere:
            self._next_round = now + _PERIOD
            wanted = fcms
        for fcm in wanted:
            if self._ending:
                return
            with contextlib.suppress(k42.Destroyed, StoreError):
                if fcm.lasting():
                    fcm.write_back(_ROUND)
