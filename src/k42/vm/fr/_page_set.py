"""A set of pages, compact: a third of a byte a page where they lie together, and at most 300 bytes for one alone."""

from __future__ import annotations

from collections.abc import Iterator

_PAGES = 1024  # of one chunk


class PageSet:
    """Pages by number. Not for several threads at once."""

    def __init__(self) -> None:
        self._chunks: dict[int, int] = {}  # first page / _PAGES: a bit for each page; never 0

    def add(self, first: int, count: int) -> None:
        """These pages are in it."""
        for chunk, bits in _pieces(first, count):
            self._chunks[chunk] = self._chunks.get(chunk, 0) | bits

    def discard(self, first: int, count: int) -> None:
        """These pages are not in it."""
        end = first + count
        if count > 2 * _PAGES * len(self._chunks):  # as when a large, nearly empty region ends
            inside = range(-(-first // _PAGES), end // _PAGES)
            for chunk in [chunk for chunk in self._chunks if chunk in inside]:
                del self._chunks[chunk]
            pieces = [*_pieces(first, min(count, -first % _PAGES)), *_pieces(end - end % _PAGES, end % _PAGES)]
        else:
            pieces = list(_pieces(first, count))
        for chunk, bits in pieces:
            if rest := self._chunks.get(chunk, 0) & ~bits:
                self._chunks[chunk] = rest
            else:
                self._chunks.pop(chunk, None)

    def runs(self, first: int, count: int) -> Iterator[tuple[int, int, bool]]:
        """The range in pieces (first page, pages, whether they are in it), alternately in it and not."""
        start, inside = first, None
        for page in range(first, first + count):
            now = bool(self._chunks.get(page // _PAGES, 0) >> page % _PAGES & 1)
            if now is not inside:
                if inside is not None:
                    yield start, page - start, inside
                start, inside = page, now
        if inside is not None:
            yield start, first + count - start, inside

    def __len__(self) -> int:
        return sum(bits.bit_count() for bits in self._chunks.values())


def _pieces(first: int, count: int) -> Iterator[tuple[int, int]]:
    end = first + count
    while first < end:
        chunk, at = divmod(first, _PAGES)
        pages = min(_PAGES - at, end - first)
        yield chunk, ((1 << pages) - 1) << at
        first += pages
