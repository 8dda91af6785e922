"""What `mmap.mmap` can do, on memory whose pages may first have to be fetched, or may not be had at all.

Every access here is made by native code that lets other threads run while a page is fetched. Where one cannot be had,
the access raises, and the next one asks for the page anew. (An access through a pointer, of numpy say, ends in SIGBUS.)
"""

from __future__ import annotations

import operator
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar, overload

from k42 import _native

if TYPE_CHECKING:
    from typing_extensions import Buffer

_T = TypeVar("_T")

# How often one access has pages shown again. More than one page of it may be marked; at a budget of few frames a page
# may go before it is shown, and then comes a little later.
_TRIES = 1000


class MemoryFile(_native.Window):
    """The part of `mmap.mmap`'s protocol that concerns bytes and the position; errors are those of `mmap.mmap`."""

    _can_write = False
    _position = 0
    _position_lock: threading.RLock  # protects _position; held during an access. Again by a signal handler's own access

    def _failure(self, failure: _native.AccessFailed) -> Exception:
        """What to raise for an access that failed."""
        raise NotImplementedError

    def _ask_again(self, offset: int) -> None:
        """Has the kernel try to show this page once more, in place of the mark of an earlier failure."""
        raise NotImplementedError

    def _again(self, failure: _native.AccessFailed, call: Callable[..., _T], *args: Any) -> _T:
        """Goes on with an access that failed: raises, or makes it again if that was due to an earlier failure."""
        for _ in range(_TRIES):
            offset, _, marked, _ = failure.args
            if not marked:
                break
            self._ask_again(offset)
            try:
                return call(self, *args)
            except _native.AccessFailed as next_failure:
                failure = next_failure
        raise self._failure(failure) from None

    def _get(self, start: int, count: int, step: int = 1) -> bytes:
        if count == 0:
            return b""
        try:
            return _native.copy_out(self, start, count, step)
        except _native.AccessFailed as failure:
            return self._again(failure, _native.copy_out, start, count, step)

    def _put(self, start: int, data: Buffer, step: int = 1) -> None:
        try:
            _native.copy_in(self, start, step, data)
        except _native.AccessFailed as failure:
            self._again(failure, _native.copy_in, start, step, data)

    def _refuse_writes(self) -> None:
        if not self._can_write:
            raise TypeError("can't modify a read-only mapping")

    # As a sequence.

    def _at(self, key: SupportsIndex) -> int:
        """The offset that an index means."""
        try:
            index = operator.index(key)
        except TypeError:
            raise TypeError("mapping indices must be integers") from None
        size = len(self)
        if index < 0:
            index += size
        if not 0 <= index < size:
            raise IndexError("mapping index out of range")
        return index

    @overload
    def __getitem__(self, key: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> bytes: ...
    def __getitem__(self, key: SupportsIndex | slice) -> int | bytes:
        if not isinstance(key, slice):
            return self._get(self._at(key), 1)[0]
        start, stop, step = key.indices(len(self))
        return self._get(start, len(range(start, stop, step)), step)

    @overload
    def __setitem__(self, key: SupportsIndex, value: SupportsIndex) -> None: ...
    @overload
    def __setitem__(self, key: slice, value: Buffer) -> None: ...
    def __setitem__(self, key: SupportsIndex | slice, value: SupportsIndex | Buffer) -> None:
        size = len(self)
        self._refuse_writes()
        if not isinstance(key, slice):
            at = self._at(key)
            try:
                byte = operator.index(value)  # type: ignore[arg-type]
            except TypeError:
                raise TypeError("a mapping's item must be an int") from None
            if not 0 <= byte < 256:
                raise ValueError("a mapping's item must be in range(0, 256)")
            self._put(at, bytes((byte,)))
            return
        start, stop, step = key.indices(size)
        with _bytes_like(value) as view:
            if view.nbytes != len(range(start, stop, step)):
                raise IndexError("slice assignment to a mapping is of the wrong size")
            if view.nbytes:
                self._put(start, view, step)

    def __delitem__(self, key: SupportsIndex | slice) -> None:
        size = len(self)
        self._refuse_writes()
        if isinstance(key, slice):
            key.indices(size)
        else:
            self._at(key)
        raise TypeError("a mapping doesn't support deletion")

    def __iter__(self) -> Iterator[bytes]:
        """The bytes, one by one, as ``bytes`` of length one (which is what iterating over an `mmap.mmap` gives)."""
        at = 0
        while at < len(self):
            yield self._get(at, 1)
            at += 1

    def __contains__(self, value: object) -> bool:
        """Whether a single byte, as ``bytes`` of length one, is in the mapping; as in `mmap.mmap`. See `find`."""
        size = len(self)
        if not isinstance(value, bytes | bytearray | memoryview):
            return any(value == byte for byte in self)
        return len(value) == 1 and self._find(bytes(value), 0, size, backwards=False) >= 0

    # Searching.

    def _find(self, sub: Buffer, start: int, end: int, *, backwards: bool) -> int:
        try:
            return _native.find(self, sub, start, end, backwards)
        except _native.AccessFailed as failure:
            return self._again(failure, _native.find, sub, start, end, backwards)

    def _search(self, sub: Buffer, bounds: tuple[SupportsIndex, ...], *, backwards: bool) -> int:
        size = len(self)
        if len(bounds) > 2:
            raise TypeError(f"find takes at most 3 arguments ({1 + len(bounds)} given)")
        with _bytes_like(sub) as view:
            start, end = (*(to_word(bound) for bound in bounds), *(self._position, size)[len(bounds) :])
            start, end, _ = slice(start, end).indices(size)
            return self._find(view, start, end, backwards=backwards)

    def find(self, sub: Buffer, /, *bounds: SupportsIndex) -> int:
        """Where the bytes first stand.

        Args:
            sub: what to look for.
            bounds: start (default: the position) and end (default: the end), as of a slice.

        Returns:
            Its offset; -1 when it is not there.

        Raises:
            StoreError: a page could not be had.
        """
        return self._search(sub, bounds, backwards=False)

    def rfind(self, sub: Buffer, /, *bounds: SupportsIndex) -> int:
        """Where the bytes last stand; otherwise as `find`."""
        return self._search(sub, bounds, backwards=True)

    # As a file.

    def tell(self) -> int:
        """The position, in bytes."""
        len(self)
        return self._position

    def seek(self, pos: SupportsIndex, whence: int = os.SEEK_SET, /) -> int:
        """Sets the position, and returns it.

        Args:
            pos: bytes from the place that `whence` names.
            whence: the start, the position, or the end (``os.SEEK_SET``, ``os.SEEK_CUR``, ``os.SEEK_END``).

        Raises:
            ValueError: the new position would lie outside.
        """
        size = len(self)
        distance = to_word(pos)
        with self._position_lock:
            origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: size}
            if whence not in origins:
                raise ValueError("unknown seek type")
            target = origins[whence] + distance
            if not 0 <= target <= size:
                raise ValueError("seek out of range")
            self._position = target
            return target

    def seekable(self) -> bool:
        """True."""
        return True

    def read(self, n: SupportsIndex | None = None, /) -> bytes:
        """The next bytes, and moves the position past them.

        Args:
            n: how many at most; None or negative: all to the end.

        Raises:
            StoreError: a page could not be had; the position stays.
        """
        size = len(self)
        try:
            wanted = -1 if n is None else to_word(n)
        except TypeError:
            raise TypeError(f"argument should be integer or None, not {type(n).__name__!r}") from None
        with self._position_lock:
            there = max(0, size - self._position)
            data = self._get(self._position, there if wanted < 0 else min(wanted, there)) if there else b""
            self._position += len(data)
            return data

    def read_byte(self) -> int:
        """The next byte; ValueError at the end."""
        size = len(self)
        with self._position_lock:
            if self._position >= size:
                raise ValueError("read byte out of range")
            [byte] = self._get(self._position, 1)
            self._position += 1
            return byte

    def readline(self) -> bytes:
        """The bytes up to and with the next newline, or to the end."""
        size = len(self)
        with self._position_lock:
            if self._position >= size:
                return b""
            newline = self._find(b"\n", self._position, size, backwards=False)
            line = self._get(self._position, (size if newline < 0 else newline + 1) - self._position)
            self._position += len(line)
            return line

    def write(self, data: Buffer, /) -> int:
        """Writes at the position, and moves it; how many bytes.

        Raises:
            TypeError: the mapping is read-only.
            ValueError: it would go past the end; nothing is written.
            StoreError: a page could not be had; a part may have been written, and the position stays.
        """
        size = len(self)
        with _bytes_like(data) as view, self._position_lock:
            self._refuse_writes()
            if view.nbytes > size - self._position:
                raise ValueError("data out of range")
            self._put(self._position, view)
            self._position += view.nbytes
            return view.nbytes

    def write_byte(self, byte: SupportsIndex, /) -> None:
        """Writes one byte at the position, and moves it; ValueError at the end."""
        size = len(self)
        value = operator.index(byte)
        if not 0 <= value < 256:
            raise OverflowError("unsigned byte integer is out of range")
        with self._position_lock:
            self._refuse_writes()
            if self._position >= size:
                raise ValueError("write byte out of range")
            self._put(self._position, bytes((value,)))
            self._position += 1

    def move(self, dest: SupportsIndex, src: SupportsIndex, count: SupportsIndex, /) -> None:
        """Copies `count` bytes within the mapping, as if by way of other memory.

        Raises:
            TypeError: the mapping is read-only.
            ValueError: a part would lie outside; nothing is copied.
            StoreError: a page could not be had; a part may have been copied.
        """
        size = len(self)
        target, source, length = to_word(dest), to_word(src), to_word(count)
        self._refuse_writes()
        if min(target, source, length) < 0 or size - max(target, source) < length:
            raise ValueError("source, destination, or count out of range")
        try:
            _native.move_within(self, target, source, length)
        except _native.AccessFailed as failure:
            self._again(failure, _native.move_within, target, source, length)


def to_word(value: SupportsIndex) -> int:
    """An integer that C can hold."""
    number = operator.index(value)
    if not -sys.maxsize - 1 <= number <= sys.maxsize:
        raise OverflowError("Python int too large to convert to C ssize_t")
    return number


def _bytes_like(value: object) -> memoryview:
    try:
        return memoryview(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"a bytes-like object is required, not {type(value).__name__!r}") from None
