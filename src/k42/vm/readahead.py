"""Adaptive read-ahead: which pages to bring in before anybody touches them, from the trend of faults.

As in Linux's ``mm/readahead.c``: a stream of misses that moves on gets a window of pages ahead of it, and one page of
the window bears a marker; when that page is touched the next window, twice as large, is asked for, so that a steady
reader never waits. Unlike there, the streams are found by where they are, not by who reads: several threads may read
several places of one file. Pure policy: no I/O, no clock.
"""

from __future__ import annotations

import enum
import threading
from dataclasses import dataclass
from typing import NamedTuple

_STREAMS = 8  # places read at a time; the least recent is forgotten
_FIRST_WINDOW = 4  # pages
_MAX_STRIDE = 32  # pages: of larger steps most of what were read would be for nothing


class Advice(enum.StrEnum):
    """What a client says of its accesses to come; as ``madvise`` has them. The first three are about read-ahead."""

    NORMAL = "normal"
    SEQUENTIAL = "sequential"
    RANDOM = "random"
    WILL_NEED = "willneed"
    DONT_NEED = "dontneed"


class Ahead(NamedTuple):
    """What to read ahead."""

    first: int
    """First page."""
    pages: int
    """Pages; those that are there already are to be left out."""
    marker: int
    """The page at whose first touch `ReadAhead.touched` is to be called; it is in the range."""


@dataclass(slots=True, eq=False)
class _Stream:
    last: int  # the page of its last miss or touched marker
    end: int  # what it was given reaches up to here
    stride: int = 0  # pages from miss to miss; 0: not known
    window: int = 0  # pages; 0: no trend is known yet
    marker: int = -1  # -1: none


class ReadAhead:
    """The read-ahead of one file. May be called by several threads.

    Args:
        pages: of the file.
        limit: the largest window, in pages; 0: never reads ahead.
        least: the first window, in pages: large where a request takes long, however little it asks for.
    """

    def __init__(self, pages: int, limit: int, least: int = _FIRST_WINDOW) -> None:
        self._lock = threading.Lock()  # protects what follows; the last in the order of locks
        self._pages = pages
        self._limit = limit
        self._least = least
        self._advice = Advice.NORMAL
        self._streams: list[_Stream] = []  # the most recent first

    @property
    def advice(self) -> Advice:
        """What was advised last. With `RANDOM` neighbours of a missing page should not be brought in either."""
        return self._advice

    def advise(self, advice: Advice) -> None:
        """Says how the file will be read; what was learnt before is forgotten."""
        with self._lock:
            self._advice = advice
            self._streams.clear()

    def resize(self, pages: int) -> None:
        """The file has so many pages now."""
        with self._lock:
            self._pages = pages

    def missed(self, first: int, count: int = 1) -> Ahead | None:
        """A fault found a page absent, and brings in `count` pages from `first`. What to read beyond them, if any."""
        with self._lock:
            if self._limit == 0 or self._advice is Advice.RANDOM:
                return None
            stream = self._find(first)
            if stream is None:
                stream = _Stream(first, first + count)
                del self._streams[_STREAMS - 1 :]
                if self._advice is Advice.SEQUENTIAL:
                    stream.window = self._limit
                    self._streams.insert(0, stream)
                    return self._ask(stream, stream.end)
                self._streams.insert(0, stream)
                if first == 0 and 1 < count < self._least:  # most who begin at the beginning go on
                    stream.window = self._first_window(count, 0)
                    return self._ask(stream, stream.end)
                return None
            self._streams.remove(stream)
            self._streams.insert(0, stream)
            return self._continue(stream, first, first + count)

    def touched(self, page: int) -> Ahead | None:
        """A page with a marker was touched, and its marker is gone. What to read next, if any."""
        with self._lock:
            for stream in self._streams:
                if stream.marker == page:
                    break
            else:
                return None  # of a stream that was forgotten
            self._streams.remove(stream)
            self._streams.insert(0, stream)
            stream.last = page
            stream.window = self._next_window(stream.window)
            return self._ask(stream, stream.end)

    def _first_window(self, count: int, stride: int) -> int:
        return min(max(self._least, 2 * count, 2 * stride), self._limit)

    def _next_window(self, window: int) -> int:
        """As Linux does it."""
        return min((4 if window < self._limit // 16 else 2) * window, self._limit)

    def _find(self, page: int) -> _Stream | None:
        """The stream that a miss belongs to: one that it continues for certain before one that it might."""
        possible = None
        for stream in self._streams:
            step = page - stream.last
            if stream.window:
                if -stream.window <= step and page <= stream.end + stream.window:
                    return stream
            elif page == stream.end or (step > 0 and step == stream.stride):
                return stream
            elif 0 < step <= _MAX_STRIDE and possible is None:
                possible = stream
        return possible

    def _continue(self, stream: _Stream, page: int, end: int) -> Ahead | None:
        if not stream.window:
            contiguous, step = page == stream.end, page - stream.last
            known = step == stream.stride
            stream.last, stream.end, stream.stride = page, end, step
            if not contiguous and not known:
                return None  # a first step: the next will tell
            if contiguous:
                stream.stride = 0
            stream.window = self._first_window(end - page, stream.stride)
            return self._ask(stream, end)
        if page <= stream.last:
            return None  # by threads that do not keep in step
        if page < stream.end:
            # It was given and is not there: dropped, or evicted before it was used. Less, then.
            stream.window //= 2
            stream.last, stream.end = page, end
            if stream.window < _FIRST_WINDOW:
                stream.window, stream.stride, stream.marker = 0, 0, -1
                return None
            return self._ask(stream, end)
        # It ran past what it was given, without having touched the marker.
        stream.window = self._next_window(stream.window)
        stream.last = page
        return self._ask(stream, end)

    def _ask(self, stream: _Stream, first: int) -> Ahead | None:
        count = min(stream.window, self._pages - first)
        if count <= 0:
            stream.marker = -1
            return None
        stream.end = first + count
        marker = first
        if stream.stride and (behind := (first - stream.last) % stream.stride):
            marker = first + stream.stride - behind  # the first page of the window that will be touched
        stream.marker = min(marker, stream.end - 1)
        return Ahead(first, count, stream.marker)
