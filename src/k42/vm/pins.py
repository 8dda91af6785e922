"""What a client has pinned through one mapping: it can unpin no more than that, and it ends with the mapping.

However it ends: by ``close``, by the end of the client, or by its death.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable

from k42.vm.errors import ProtocolError
from k42.vm.fcm import FileCacheManager
from k42.vm.pm import PageManager

_MOST_TOLD = 4096  # runs: what a record holds

Runs = list[tuple[int, int, int]]
"""(first page, end, pins of each page), ascending and disjoint."""


class Pins:
    """The pins of one region.

    Args:
        fcm: of the file that it shows.
        tell: has the next kernel know of them.
    """

    def __init__(self, fcm: FileCacheManager, tell: Callable[[Runs], None]) -> None:
        self._fcm = fcm
        self._tell = tell
        self._lock = threading.Lock()  # protects all below, and the order of what is told; before the ledger's
        self._steps: Counter[int] = Counter()  # page: how many more pins it has than the one before
        self._closed = False

    def restore(self, runs: Iterable[Iterable[int]]) -> None:
        """They were made through a kernel before; the pages are still pinned."""
        with self._lock:
            for first, end, pins in runs:
                self._add(first, end, pins)
            self._tell(self._runs()[:_MOST_TOLD])

    def pin(self, first: int, end: int, pm: PageManager) -> None:
        """Keeps pages; see `FileCacheManager.pin`."""
        self._fcm.pin(first, end, pm)
        with self._lock:
            if not self._closed:
                self._add(first, end, 1)
                self._tell(self._runs()[:_MOST_TOLD])
                return
        self._fcm.unpin(first, end)
        raise ProtocolError("the region went meanwhile")

    def unpin(self, first: int, end: int) -> None:
        """Ends one pin of each page that has any from here."""
        with self._lock:
            pinned = [(max(first, a), min(end, b)) for a, b, _ in self._runs() if a < end and first < b]
            for a, b in pinned:
                self._add(a, b, -1)
            self._tell(self._runs()[:_MOST_TOLD])
            for a, b in pinned:
                self._fcm.unpin(a, b)

    def close(self) -> None:
        """Ends all."""
        with self._lock:
            self._closed = True
            for first, end, pins in self._runs():
                for _ in range(pins):
                    self._fcm.unpin(first, end)
            self._steps.clear()

    def _add(self, first: int, end: int, pins: int) -> None:
        for page, step in ((first, pins), (end, -pins)):
            self._steps[page] += step
            if not self._steps[page]:
                del self._steps[page]

    def _runs(self) -> Runs:
        pages = sorted(self._steps)
        levels = itertools.accumulate(self._steps[page] for page in pages)
        return [(a, b, pins) for (a, b), pins in zip(itertools.pairwise(pages), levels, strict=False) if pins]
