"""Adaptive read-ahead: which pages to bring in before anybody touches them, from the trend of faults.

The policy is native (``native/core/vm/read_ahead.hpp``, which says how it works): threads of the core read local files
ahead by it, and the FCM all others.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from k42 import _native

_FIRST_WINDOW = 4  # pages


class Advice(enum.StrEnum):
    """What a client says of its accesses to come; as ``madvise`` has them. The first three are about read-ahead."""

    NORMAL = "normal"
    SEQUENTIAL = "sequential"
    RANDOM = "random"
    WILL_NEED = "willneed"
    DONT_NEED = "dontneed"


_PATTERNS = (Advice.NORMAL, Advice.SEQUENTIAL, Advice.RANDOM)  # in the order of ReadAhead::Pattern


class Ahead(NamedTuple):
    """What to read ahead."""

    first: int
    """First page."""
    pages: int
    """Pages; those that are there already are to be left out."""
    marker: int
    """The page at whose first touch `ReadAhead.touched` is to be called; it is in the range."""


class ReadAhead:
    """The read-ahead of one file. May be called by several threads.

    Args:
        pages: of the file.
        limit: the largest window, in pages; 0: never reads ahead.
        least: the first window, in pages: large where a request takes long, however little it asks for.
    """

    def __init__(self, pages: int, limit: int, least: int = _FIRST_WINDOW) -> None:
        self.native = _native.ReadAhead(pages, limit, least)

    @property
    def advice(self) -> Advice:
        """What was advised last. With `RANDOM` neighbours of a missing page should not be brought in either."""
        return _PATTERNS[self.native.pattern()]

    def advise(self, advice: Advice) -> None:
        """Says how the file will be read; what was learnt before is forgotten."""
        self.native.advise(_PATTERNS.index(advice))

    def resize(self, pages: int) -> None:
        """The file has so many pages now."""
        self.native.resize(pages)

    def missed(self, first: int, count: int = 1) -> Ahead | None:
        """A fault found a page absent, and brings in `count` pages from `first`. What to read beyond them, if any."""
        ahead = self.native.missed(first, count)
        return None if ahead is None else Ahead(*ahead)

    def touched(self, page: int) -> Ahead | None:
        """A page with a marker was touched, and its marker is gone. What to read next, if any."""
        ahead = self.native.touched(page)
        return None if ahead is None else Ahead(*ahead)
