"""What a client has pinned through one mapping: it can unpin no more than that, and it ends with the mapping.

However it ends: by ``close``, by the end of the client, or by its death.
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from k42.vm.errors import ProtocolError
from k42.vm.fcm import FileCacheManager
from k42.vm.pm import PageManager

_MOST_TOLD = 4096  # runs: what a record holds
_REMEMBERED = 64  # requests of a region: more than a client has on their way at once

Runs = list[tuple[int, int, int]]
"""(first page, end, pins of each page), ascending and disjoint."""


class Pins:
    """The pins of one region.

    Args:
        fcm: of the file that it shows.
        tell: has the next kernel know of them.
    """

    def __init__(self, fcm: FileCacheManager, tell: Callable[[dict[str, Any]], None]) -> None:
        self._fcm = fcm
        self._tell = tell
        self._lock = threading.Lock()  # protects all below, and the order of what is told; before the ledger's
        self._steps: Counter[int] = Counter()  # page: how many more pins it has than the one before
        self._closed = False
        self._requests: collections.deque[int | None] = collections.deque(maxlen=_REMEMBERED)  # the last ones

    def restore(self, told: Any) -> None:
        """They were made through a kernel before, which told this; the pages are still pinned."""
        if told is None:
            return
        with self._lock:
            for first, end, pins in told["runs"]:
                self._add(first, end, pins)
            self._requests.extend(told["requests"])
            self._tell(self._record())

    def pin(self, first: int, end: int, pm: PageManager, request: int | None = None) -> None:
        """Keeps pages; see `FileCacheManager.pin`. A request that a kernel before has served is served once."""
        self._fcm.pin(first, end, pm)
        with self._lock:
            repeated = request is not None and request in self._requests
            if not self._closed and not repeated:
                self._requests.append(request)
                self._add(first, end, 1)
                self._tell(self._record())
                return
        self._fcm.unpin(first, end)
        if not repeated:
            raise ProtocolError("the region went meanwhile")

    def unpin(self, first: int, end: int, request: int | None = None) -> None:
        """Ends one pin of each page that has any from here; a request as of `pin`."""
        with self._lock:
            if request is not None and request in self._requests:
                return
            self._requests.append(request)
            pinned = [(max(first, a), min(end, b)) for a, b, _ in self._runs() if a < end and first < b]
            for a, b in pinned:
                self._add(a, b, -1)
            self._tell(self._record())
            for a, b in pinned:
                self._fcm.unpin(a, b)

    def known(self) -> Counter[int] | None:
        """How often each page is pinned; None: a record had no room for all that the kernel before knew."""
        with self._lock:
            runs = self._runs()
        if len(runs) >= _MOST_TOLD:
            return None
        return Counter({page: pins for first, end, pins in runs for page in range(first, end)})

    def close(self) -> None:
        """Ends all."""
        with self._lock:
            self._closed = True
            for first, end, pins in self._runs():
                for _ in range(pins):
                    self._fcm.unpin(first, end)
            self._steps.clear()

    def _record(self) -> dict[str, Any]:
        return {"runs": self._runs()[:_MOST_TOLD], "requests": list(self._requests)}

    def _add(self, first: int, end: int, pins: int) -> None:
        for page, step in ((first, pins), (end, -pins)):
            self._steps[page] += step
            if not self._steps[page]:
                del self._steps[page]

    def _runs(self) -> Runs:
        pages = sorted(self._steps)
        levels = itertools.accumulate(self._steps[page] for page in pages)
        return [(a, b, pins) for (a, b), pins in zip(itertools.pairwise(pages), levels, strict=False) if pins]
