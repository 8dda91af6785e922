"""The FR of a local file, by the descriptor that a client opened: Linux has checked the permission.

Reads are ``preadv`` through Linux's page cache. A large read of what is not there goes around it (``O_DIRECT``),
which spares a copy and a second cache. Measured on ext4 on a virtual disk, Linux 6.18, in µs a page of 4 KiB:

    ========= ============ ========== ==============
    at once   state        buffered   ``O_DIRECT``
    ========= ============ ========== ==============
    4 KiB     cached       12         69
    64 KiB    cached       3.4        15
    1 MiB     cached       3.3        7.9
    4 KiB     not cached   89         90
    64 KiB    not cached   14         15
    1 MiB     not cached   13         7.2
    ========= ============ ========== ==============

Each read has a thread that waits for it anyway, so io_uring would save one system call of 0.3 µs of the 54 µs that
64 KiB take: it is not used.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Hashable

import k42
from k42.vm.errors import StoreError, Unsupported
from k42.vm.fr import _frames
from k42.vm.fr.interface import FileRepresentative, Traits
from k42.vm.protocol import PAGE

_DIRECT = 256 * PAGE  # bytes at once from which O_DIRECT pays where the file is not cached
_ATTEMPTS = 8  # to read a range that others write to at the same time
_TRAITS = Traits(concurrency=8, cluster=16, read_ahead=256)


def version_of(status: os.stat_result) -> tuple[int, int, int]:
    """What tells one content of a file from another: size and times."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


class FileFR(FileRepresentative):
    """Reads a regular file, and writes it when its descriptor can.

    Pages follow the file as Linux's own mappings do: what others write shows in pages that are read later. But a read
    during which the file's times changed is made again, so that what is read at once was there at once.

    Args of ``create``:
        descriptor: open for reading, or for both; taken over.
        name: the path, for messages.
    """

    class Root(k42.SharedRoot):
        """Holds the descriptor, the size, and the version."""

        def __init__(self, descriptor: int, name: str) -> None:
            status = os.fstat(descriptor)
            self.descriptor = descriptor  # its number stays; what it leads to may become writable
            self.direct: int | None = None  # a second one for O_DIRECT, once it is needed; -1: it cannot be had
            self.name = name
            # Protects what follows, and that no two write at a time. The last in the order of locks. Fills read
            # without it.
            self.lock = threading.Lock()
            self.size = status.st_size
            self.version = version_of(status)  # of the content that pages are filled from, our own writes included
            self.seen = self.version  # of the content that was there last
            self.own = 0  # odd while we write: times that change are then no sign of others
            self.writable = _is_writable(descriptor)

    root: Root

    def name(self) -> str:
        """The path."""
        return self.root.name

    def size(self) -> int:
        """Its size in bytes; see `FileRepresentative.size`."""
        return self.root.size

    def version(self) -> Hashable:
        """Size and times when it was opened, or after our own last write; see `version_of`."""
        with self.root.lock:
            return self.root.version

    def steady(self) -> bool:
        """Not once others changed it, since pages follow the file; see `FileRepresentative.steady`."""
        return not self.changed()

    def changed(self) -> bool:
        """Whether others changed it; see `FileRepresentative.changed`. Waits for a write of ours that is under way."""
        with self.root.lock:
            return version_of(os.fstat(self.root.descriptor)) != self.root.version

    def traits(self) -> Traits:
        """A local disk."""
        return _TRAITS

    def fill(self, memfd: int, first: int, count: int) -> None:
        """Reads pages; see `FileRepresentative.fill`."""
        offset, end = first * PAGE, (first + count) * PAGE
        while offset < end:
            piece = min(_frames.CHUNK, end - offset)
            self._fill_piece(memfd, offset, piece)
            offset += piece

    def read_range(self, offset: int, length: int) -> bytes:
        """Bytes of the version that was opened; see `FileRepresentative.read_range`."""
        pieces = []
        end = offset + length
        for start in range(offset, end, _frames.CHUNK):
            pieces.append(bytes(self._read(start, min(_frames.CHUNK, end - start))))
        if self.changed():
            raise StoreError("it changed since it was opened", url=self.root.name, offset=offset)
        return b"".join(pieces)

    def _fill_piece(self, memfd: int, offset: int, length: int) -> None:
        root = self.root
        before = root.seen
        for _ in range(_ATTEMPTS):
            own = root.own
            view = self._read(offset, min(length, max(0, root.size - offset)))
            after = version_of(os.fstat(root.descriptor))
            # Writes of ours are of pages that are resident, so not of these.
            if after == before or own & 1 or own != root.own:
                _frames.put_padded(memfd, offset, view, offset + length)
                return
            before = root.seen = after
        raise StoreError("others write to it all the time, it cannot be read", url=root.name, offset=offset)

    def _read(self, offset: int, wanted: int) -> memoryview:
        """So many bytes of the file, in this thread's buffer; fewer if we make the file shorter meanwhile."""
        root = self.root
        view = _frames.buffer(wanted)
        try:
            done = self._read_direct(view, offset) if wanted >= _DIRECT else 0
            while done < wanted:
                got = os.preadv(root.descriptor, [view[done:]], offset + done)
                if got == 0:
                    if root.size <= offset + done:
                        return view[:done]
                    raise StoreError(
                        f"it ends at {offset + done} bytes, before its size of {root.size} when it was opened: "
                        "it was truncated while it was mapped, or is no stored file",
                        url=root.name,
                        offset=offset,
                    )
                done += got
        except StoreError:
            raise
        except OSError as error:
            raise StoreError.of(error, root.name, offset) from error
        return view

    def _read_direct(self, view: memoryview, offset: int) -> int:
        """Reads around Linux's page cache if the bytes are not in it; the number read, 0 for leaving it to others."""
        try:
            cached = os.preadv(self.root.descriptor, [view], offset, os.RWF_NOWAIT)
        except OSError:  # EAGAIN: not cached; EOPNOTSUPP: Linux cannot say
            cached = 0
        if cached >= PAGE or (direct := self._direct_descriptor()) < 0:
            return cached
        try:
            return os.preadv(direct, [view], offset) // PAGE * PAGE  # what follows the end is the buffered read's
        except OSError:
            return 0  # such as an alignment that this device asks for: the other way works everywhere

    def _direct_descriptor(self) -> int:
        root = self.root
        if root.direct is None:
            with root.lock:
                if root.direct is None:
                    try:
                        flags = os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC
                        root.direct = os.open(f"/proc/self/fd/{root.descriptor}", flags)
                    except OSError:
                        root.direct = -1
        assert root.direct is not None
        return root.direct

    def writable(self) -> bool:
        """Whether its descriptor is open for writing."""
        return self.root.writable

    def make_writable(self, descriptor: int) -> None:
        """Takes over a descriptor of the same file that is open for reading and writing. Reads go on meanwhile.

        Raises:
            ValueError: it is another file, or not open for both; the descriptor stays the caller's.
        """
        root = self.root
        old, new = os.fstat(root.descriptor), os.fstat(descriptor)
        if (old.st_dev, old.st_ino) != (new.st_dev, new.st_ino) or not _is_writable(descriptor):
            raise ValueError(f"not a descriptor of {root.name} that is open for reading and writing")
        with root.lock:
            os.dup2(descriptor, root.descriptor, inheritable=False)  # in one step: others use the number all the time
            root.writable = True
        os.close(descriptor)

    def write_back(self, memfd: int, first: int, count: int) -> None:
        """Writes pages; see `FileRepresentative.write_back`."""
        root = self.root
        if not root.writable:
            raise Unsupported(f"{root.name} is open for reading only")
        offset, end = first * PAGE, (first + count) * PAGE
        while offset < end:
            piece = min(_frames.CHUNK, end - offset)
            view = _frames.take(memfd, offset, piece)
            with _Writing(root, offset):
                self._expect_whole(offset)
                done, wanted = 0, min(piece, max(0, root.size - offset))
                while done < wanted:
                    done += os.pwrite(root.descriptor, view[done:wanted], offset + done)
            offset += piece

    def _expect_whole(self, offset: int) -> None:
        """A write must not make longer again what others have truncated: there would be zeros nobody wrote."""
        root = self.root
        now = os.fstat(root.descriptor).st_size
        if now < root.size:
            message = f"it has {now} bytes, not {root.size}: it was truncated while it was mapped"
            raise StoreError(message, url=root.name, offset=offset)

    def resize(self, size: int) -> None:
        """Truncates or extends it; see `FileRepresentative.resize`."""
        root = self.root
        if not root.writable:
            raise Unsupported(f"{root.name} is open for reading only")
        with _Writing(root, None):
            before = root.size
            root.size = min(size, before)  # first: a fill that finds less then knows that it was us
            try:
                os.ftruncate(root.descriptor, size)
            except BaseException:
                root.size = before
                raise
            root.size = size

    def sync(self) -> None:
        """Waits for the disk; see `FileRepresentative.sync`."""
        try:
            os.fdatasync(self.root.descriptor)  # with the size, if it changed
        except OSError as error:
            raise StoreError.of(error, self.root.name) from error

    def native_descriptor(self) -> int:
        """The descriptor itself; its number stays the same when the file becomes writable."""
        return self.root.descriptor

    def close(self) -> None:
        """Closes the descriptors."""
        os.close(self.root.descriptor)
        if self.root.direct is not None and self.root.direct >= 0:
            os.close(self.root.direct)


class _Writing:
    """For the time of a write of ours: nobody else of us writes, and the new times of the file are known as ours."""

    def __init__(self, root: FileFR.Root, offset: int | None) -> None:
        self._root = root
        self._offset = offset

    def __enter__(self) -> None:
        root = self._root
        root.lock.acquire()
        root.own += 1
        # What others changed before stays visible: the version then no longer follows.
        self._ours = version_of(os.fstat(root.descriptor)) == root.version

    def __exit__(self, kind: object, value: BaseException | None, trace: object) -> None:
        root = self._root
        root.seen = version_of(os.fstat(root.descriptor))
        if self._ours:
            root.version = root.seen
        root.own += 1
        root.lock.release()
        if isinstance(value, OSError) and not isinstance(value, StoreError):
            raise StoreError.of(value, root.name, self._offset) from value


def _is_writable(descriptor: int) -> bool:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
