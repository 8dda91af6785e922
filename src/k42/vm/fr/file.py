"""The FR of a local file, read through the descriptor that a client opened: Linux has checked the permission."""

from __future__ import annotations

import os

import k42
from k42.vm.errors import StoreError
from k42.vm.fr.interface import FileRepresentative
from k42.vm.protocol import PAGE


class FileFR(FileRepresentative):
    """Reads a regular file.

    Args of ``create``:
        descriptor: open for reading; taken over.
        name: the path, for messages.
    """

    class Root(k42.SharedRoot):
        """Holds the descriptor, and the size at the time of opening."""

        def __init__(self, descriptor: int, name: str) -> None:
            self.descriptor = descriptor
            self.name = name
            self.size = os.fstat(descriptor).st_size

    root: Root

    def name(self) -> str:
        """The path."""
        return self.root.name

    def size(self) -> int:
        """Its size in bytes when it was opened."""
        return self.root.size

    def fill(self, memfd: int, first: int, count: int) -> None:
        """Reads pages; see `FileRepresentative.fill`."""
        offset, length = first * PAGE, count * PAGE
        wanted = min(length, self.root.size - offset)
        buffer = bytearray(length)  # so that what lies past the end of the file is zeros
        view = memoryview(buffer)
        done = 0
        try:
            while done < wanted:
                got = os.preadv(self.root.descriptor, [view[done:wanted]], offset + done)
                if got == 0:
                    raise StoreError(
                        f"{self.root.name} ends at {offset + done} bytes, before its size of {self.root.size} when it "
                        "was opened: it was truncated while it was mapped, or is no stored file"
                    )
                done += got
            done = 0
            while done < length:
                done += os.pwrite(memfd, view[done:], offset + done)
        except StoreError:
            raise
        except OSError as error:
            message = f"{self.root.name}, offset {offset}: {error.strerror}"
            raise StoreError(error.errno, message) from error

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self.root.descriptor)
