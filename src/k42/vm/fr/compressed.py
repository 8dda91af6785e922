"""The FR of a compressed file: groups of pages are compressed one by one, so that each can be read alone.

The format is that of `seekable zstd`_, which ``zstd -d`` unpacks like any other: frames, and at the end a table of
their sizes, in a frame that is skipped.

.. _seekable zstd: https://github.com/facebook/zstd/blob/dev/contrib/seekable_format/zstd_seekable_compression_format.md
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import secrets
import struct
from array import array
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import k42
from k42.vm.errors import StoreError, Unsupported
from k42.vm.fr import _frames
from k42.vm.fr.interface import FileRepresentative, Traits
from k42.vm.protocol import PAGE

_SKIPPED = 0x184D2A5E  # the magic number of the frame that holds the table
_SEEKABLE = 0x8F92EAB1  # the last four bytes of the file
_HEADER = struct.Struct("<II")  # of a skipped frame: magic number, bytes that follow
_ENTRY = struct.Struct("<II")  # bytes of a frame, bytes that it unpacks to
_FOOTER = struct.Struct("<IBI")  # frames, flags, magic number
_HAS_CHECKSUMS = 0x80
_MAX_FRAME = 64 << 20  # bytes unpacked: a fault must not make the kernel take any amount of memory
MAX_GROUP = _MAX_FRAME // PAGE
"""Pages that can be compressed together."""
_GROUP = 32  # pages: 128 KiB


def _zstd() -> ModuleType:
    with contextlib.suppress(ImportError):
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # Python 3.14

        return zstd  # type: ignore[no-any-return, unused-ignore]
    try:
        from backports import zstd
    except ImportError as error:
        raise Unsupported("compressed stores need zstd: pip install 'k42[zstd]'") from error
    return zstd  # type: ignore[no-any-return, unused-ignore]


class CompressedFR(FileRepresentative):
    """Reads what `compress`, or any writer of seekable zstd, wrote.

    Args of ``create``:
        inner: the compressed file; taken over.

    Raises:
        StoreError: it cannot be read, or is not of the format.
        Unsupported: zstd is not installed.
    """

    class Root(k42.SharedRoot):
        """Holds the file, and where its frames are."""

        def __init__(self, inner: FileRepresentative) -> None:
            self.inner = inner
            self.zstd = _zstd()
            sizes = _read_table(inner)
            # Where each frame begins, and the end: in the file, and in what it unpacks to.
            self.packed = array("Q", itertools.accumulate((packed for packed, _ in sizes), initial=0))
            self.unpacked = array("Q", itertools.accumulate((unpacked for _, unpacked in sizes), initial=0))
            group = sizes[0][1] if sizes else PAGE
            cluster = group // PAGE if group % PAGE == 0 and group else 16
            traits = inner.traits()
            self.traits = replace(traits, cluster=cluster, read_ahead=max(traits.read_ahead, 2 * cluster))

    root: Root

    def name(self) -> str:
        """The name of the compressed file, and that it is one."""
        return f"zstd+{self.root.inner.name()}"

    def size(self) -> int:
        """Bytes unpacked."""
        return self.root.unpacked[-1]

    def version(self) -> Hashable:
        """That of the compressed file."""
        return self.root.inner.version()

    def changed(self) -> bool:
        """Whether the compressed file changed."""
        return self.root.inner.changed()

    def traits(self) -> Traits:
        """Those of the compressed file, in whole groups."""
        return self.root.traits

    def fill(self, memfd: int, first: int, count: int) -> None:
        """Unpacks the frames that have these pages; see `FileRepresentative.fill`."""
        root = self.root
        offset, limit = first * PAGE, (first + count) * PAGE
        end = min(limit, self.size())
        frame = bisect.bisect_right(root.unpacked, offset) - 1
        while offset < end:
            # As many frames as fit one request.
            last = bisect.bisect_left(root.unpacked, end)
            while last > frame + 1 and root.packed[last] - root.packed[frame] > _frames.CHUNK:
                last -= 1
            start = root.packed[frame]
            data = memoryview(root.inner.read_range(start, root.packed[last] - start))
            for at in range(frame, last):
                unpacked = self._unpack(at, data[root.packed[at] - start : root.packed[at + 1] - start])
                begin = root.unpacked[at]
                piece = memoryview(unpacked)[offset - begin : end - begin]
                _frames.put(memfd, offset, piece)
                offset += len(piece)
            frame = last
        _frames.put_zeros(memfd, max(end, first * PAGE), limit)

    def _unpack(self, frame: int, data: memoryview) -> bytes:
        root = self.root
        wanted = root.unpacked[frame + 1] - root.unpacked[frame]
        decompressor = root.zstd.ZstdDecompressor()
        try:
            unpacked: bytes = decompressor.decompress(data, max_length=wanted)
            if not decompressor.eof:  # the end of a frame may come after its last byte
                unpacked += decompressor.decompress(b"", max_length=1)
        except root.zstd.ZstdError as error:
            raise StoreError(f"damaged: {error}", url=self.name(), offset=root.unpacked[frame]) from error
        if not decompressor.eof or decompressor.unused_data or len(unpacked) != wanted:
            reason = "damaged: a frame is not as long as the table says"
            raise StoreError(reason, url=self.name(), offset=root.unpacked[frame])
        return unpacked

    def cancel(self) -> None:
        """Ends what is under way."""
        self.root.inner.cancel()

    def close(self) -> None:
        """Closes the compressed file."""
        self.root.inner.close()
        k42.destroy(self.root.inner)


def _read_table(inner: FileRepresentative) -> list[tuple[int, int]]:
    """(bytes, bytes unpacked) of each frame."""
    total = inner.size()

    def wrong(reason: str) -> StoreError:
        return StoreError(f"no seekable zstd file: {reason}; `k42.vm.fr.compress` makes one", url=inner.name())

    if total < _HEADER.size + _FOOTER.size:
        raise wrong("too short")
    frames, flags, magic = _FOOTER.unpack(inner.read_range(total - _FOOTER.size, _FOOTER.size))
    if magic != _SEEKABLE:
        raise wrong("it does not end in a table")
    entry = _ENTRY.size + (4 if flags & _HAS_CHECKSUMS else 0)
    length = frames * entry + _FOOTER.size
    if length + _HEADER.size > total:
        raise wrong("its table is larger than the file")
    table = inner.read_range(total - length - _HEADER.size, length + _HEADER.size)
    if _HEADER.unpack_from(table) != (_SKIPPED, length):
        raise wrong("its table does not begin where it should")
    sizes = [_ENTRY.unpack_from(table, _HEADER.size + n * entry) for n in range(frames)]
    if sum(packed for packed, _ in sizes) != total - length - _HEADER.size:
        raise wrong("its table does not fit the file")
    if any(unpacked == 0 for _, unpacked in sizes):
        raise wrong("it has empty frames")
    if any(unpacked > _MAX_FRAME for _, unpacked in sizes):
        raise wrong(f"it has frames of more than {_MAX_FRAME} bytes")
    return sizes


def compress(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    group: int = _GROUP,
    level: int = 3,
    overwrite: bool = True,
    progress: Callable[[int], object] = lambda read: None,
) -> tuple[int, int]:
    """Writes a compressed copy of a file, for ``zstd+file:``, ``zstd+https:`` and so on; ``zstd -d`` unpacks it, too.

    Args:
        source: what to compress.
        target: where to write; it is there, or replaced, in one step when all is written, and else nothing is.
        group: pages of 4 KiB that are compressed together, and later read together; at most 16384.
        level: of zstd, from fast (1) to small (19).
        overwrite: replace what is at the target; else it must not be there when all is written.
        progress: called with the bytes read, after each group.

    Returns:
        (bytes read, bytes written).

    Raises:
        FileExistsError: the target is there, and is not to be overwritten.
        OSError: a file cannot be read or written.
        Unsupported: zstd is not installed.
    """
    if not 1 <= group <= MAX_GROUP:
        raise ValueError(f"a group is of 1 to {MAX_GROUP} pages, not {group}")
    zstd = _zstd()
    options = {zstd.CompressionParameter.compression_level: level, zstd.CompressionParameter.checksum_flag: 1}
    target = Path(target)
    sizes = []
    # Its name is known before it is there, so that Ctrl-C leaves nothing behind at any moment.
    unfinished = target.parent / f".{secrets.token_hex(16)}.k42"
    try:
        with open(source, "rb") as reader, open(unfinished, "xb", opener=_private) as writer:
            while data := reader.read(group * PAGE):
                packed = zstd.compress(data, options=options)
                writer.write(packed)
                sizes.append((len(packed), len(data)))
                progress(len(data))
            writer.write(_HEADER.pack(_SKIPPED, len(sizes) * _ENTRY.size + _FOOTER.size))
            for entry in sizes:
                writer.write(_ENTRY.pack(*entry))
            writer.write(_FOOTER.pack(len(sizes), 0, _SEEKABLE))
            os.fchmod(writer.fileno(), os.fstat(reader.fileno()).st_mode & 0o777)
            writer.flush()
            os.fsync(writer.fileno())
            written = writer.tell()
            if overwrite:
                os.replace(unfinished, target)
            else:
                os.link(unfinished, target)  # fails where somebody else has made it meanwhile
                os.unlink(unfinished)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return sum(unpacked for _, unpacked in sizes), written


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
