"""The FR of anonymous memory that may be evicted: swap space in a file that has no name.

A page lies at its own offset in a sparse file, so neighbours lie together and no table of places is needed: the file
system allocates, and takes back. What is kept is one bit a page: whether it is there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
import threading
from collections.abc import Callable, Hashable
from pathlib import Path

import k42
from k42.vm import protocol
from k42.vm.errors import StoreError
from k42.vm.fr import _frames
from k42.vm.fr._page_set import PageSet
from k42.vm.fr.interface import FileRepresentative, Traits
from k42.vm.protocol import PAGE

_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}
_TRAITS = Traits(concurrency=4, cluster=8, read_ahead=64)
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02  # linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class SwapFR(FileRepresentative):
    """Keeps what is written back; a page that never was fills with zeros.

    Args of ``create``:
        size: in bytes.
        descriptor: a swap file of a kernel that has gone, with what is in it; taken over. None: a new one is made when
            the first page is written back.
    """

    class Root(k42.SharedRoot):
        """Holds the file, and which pages are in it."""

        def __init__(self, size: int, descriptor: int | None = None) -> None:
            self.size = size
            # Protects `descriptor` and `pages`; not held in I/O. The last in the order of locks.
            self.lock = threading.Lock()
            self.descriptor = descriptor
            self.made: Callable[[int], None] | None = None  # is told the descriptor of a new file before it is used
            self.folder = "swap space"
            self.pages = PageSet()
            if descriptor is not None:
                _find_pages(descriptor, self.pages)

    root: Root

    def name(self) -> str:
        """What to call it in messages."""
        return "anonymous memory"

    def size(self) -> int:
        """Its size in bytes."""
        return self.root.size

    def version(self) -> Hashable:
        """Nobody else has it."""
        return "swap"

    def traits(self) -> Traits:
        """A local disk."""
        return _TRAITS

    def descriptor(self) -> int | None:
        """The file's, which stays the FR's; None: nothing was written back yet. For who shall take it over."""
        with self.root.lock:
            return self.root.descriptor

    def swapped(self) -> int:
        """How many pages are in the file."""
        with self.root.lock:
            return len(self.root.pages)

    def holds(self, first: int, count: int) -> list[tuple[int, int, bool]]:
        """The range in runs (first page, pages, whether they are in the file)."""
        with self.root.lock:
            return list(self.root.pages.runs(first, count))

    def fill(self, memfd: int, first: int, count: int) -> None:
        """Reads what is in the file, zeros for what is not; see `FileRepresentative.fill`."""
        for start, pages, inside in self.holds(first, count):
            if inside:
                self._read(memfd, start * PAGE, (start + pages) * PAGE)
            else:
                _frames.put_zeros(memfd, start * PAGE, (start + pages) * PAGE)

    def _read(self, memfd: int, offset: int, end: int) -> None:
        descriptor = self.root.descriptor
        assert descriptor is not None
        while offset < end:
            view = _frames.buffer(min(_frames.CHUNK, end - offset))
            try:
                got = os.preadv(descriptor, [view], offset)
            except OSError as error:
                raise self._failed(error, offset) from error
            if got == 0:
                raise StoreError("the swap file is shorter than it was", url=self._where(), offset=offset)
            _frames.put(memfd, offset, view[:got])
            offset += got

    def writable(self) -> bool:
        """Always."""
        return True

    def write_back(self, memfd: int, first: int, count: int) -> None:
        """Writes pages to the file; see `FileRepresentative.write_back`.

        Raises:
            StoreError: no room, or no folder for the file.
        """
        descriptor = self._file(count * PAGE)
        offset, end = first * PAGE, (first + count) * PAGE
        while offset < end:
            view = _frames.take(memfd, offset, min(_frames.CHUNK, end - offset))
            done = 0
            while done < len(view):
                try:
                    done += os.pwrite(descriptor, view[done:], offset + done)
                except OSError as error:
                    raise self._failed(error, offset) from error
            offset += len(view)
        with self.root.lock:
            self.root.pages.add(first, count)

    def resize(self, size: int) -> None:
        """Sets the size; pages past it are forgotten. See `FileRepresentative.resize`."""
        root = self.root
        old, new = protocol.pages_of(root.size), protocol.pages_of(size)
        root.size = size
        if new < old:
            self.forget(new, old - new)

    def forget(self, first: int, count: int) -> None:
        """Gives the room of pages back to the file system; they fill with zeros from now on."""
        root = self.root
        with root.lock:
            held = [(start, pages) for start, pages, inside in root.pages.runs(first, count) if inside]
            root.pages.discard(first, count)
            for start, pages in held:
                # Under the lock: else a page could be written back in between, and be lost. Where the file system has
                # no holes the room is kept; the bit says that it is not used.
                mode = _PUNCH_HOLE | _KEEP_SIZE
                _libc.fallocate(root.descriptor, mode, start * PAGE, pages * PAGE)

    def close(self) -> None:
        """Gives all room back."""
        if self.root.descriptor is not None:
            os.close(self.root.descriptor)

    def _file(self, needed: int) -> int:
        root = self.root
        with root.lock:
            if root.descriptor is None:
                folder = swap_folder(max(needed, min(root.size, 1 << 40)))
                root.folder = str(folder)
                try:
                    with tempfile.TemporaryFile(prefix="k42-swap-", dir=folder, buffering=0) as file:
                        if root.made:
                            root.made(file.fileno())
                        root.descriptor = os.dup(file.fileno())
                except OSError as error:
                    raise self._failed(error, None) from error
            return root.descriptor

    def _where(self) -> str:
        return f"swap file in {self.root.folder}"

    def _failed(self, error: OSError, offset: int | None) -> StoreError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"{error.strerror}: set K42_SWAP_DIR to a folder with more room"
            return StoreError(reason, url=self._where(), offset=offset, errno=error.errno)
        return StoreError.of(error, self._where(), offset)


def swap_folder(needed: int) -> Path:
    """Where to make a swap file of so many bytes: ``K42_SWAP_DIR``, else the best of the usual places.

    That is one on a disk before one in memory, one with enough room before one without, then the one with most room.

    Raises:
        StoreError: there is no folder at all.
    """
    if chosen := os.environ.get("K42_SWAP_DIR"):
        return Path(chosen)
    kinds = _file_systems()
    found: list[tuple[bool, bool, int, Path]] = []
    for folder in (Path("/var/tmp"), Path(tempfile.gettempdir()), protocol.runtime_folder()):
        try:
            device, room = folder.stat().st_dev, os.statvfs(folder)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            free = room.f_bavail * room.f_frsize
            found.append((kinds.get(device) not in _IN_MEMORY, free >= needed, free, folder))
    if not found:
        raise StoreError("no folder for a swap file: set K42_SWAP_DIR", url="swap space")
    return max(found, key=lambda place: place[:3])[3]


def _file_systems() -> dict[int, str]:
    """The kinds of mounted file systems, by device."""
    kinds = {}
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split()
        major, minor = fields[2].split(":")
        kinds[os.makedev(int(major), int(minor))] = fields[fields.index("-") + 1]
    return kinds


def _find_pages(descriptor: int, pages: PageSet) -> None:
    """Which pages a swap file holds: a hole is a page that was not written, or that was forgotten."""
    end, at = os.fstat(descriptor).st_size, 0
    while at < end:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        at = os.lseek(descriptor, start, os.SEEK_HOLE)
        pages.add(start // PAGE, protocol.pages_of(at) - start // PAGE)
