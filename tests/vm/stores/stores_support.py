"""What the tests of stores share: frames as a file cache has them, and bytes that say where they are."""

from __future__ import annotations

import os
from typing import Any

from vm_support import words

PAGE = 4096

__all__ = ["PAGE", "Frames", "padded", "words"]


class Frames:
    """A memfd of so many pages that are absent."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.memfd = os.memfd_create("test", os.MFD_CLOEXEC)
        os.ftruncate(self.memfd, pages * PAGE)

    def filled(self, fr: Any, first: int, count: int) -> bytes:
        """What the FR puts into pages."""
        # Not zeros, so that a page that is not filled shows.
        os.pwrite(self.memfd, b"\xee" * (count * PAGE), first * PAGE)
        fr.fill(self.memfd, first, count)
        return os.pread(self.memfd, count * PAGE, first * PAGE)

    def put(self, data: bytes, first: int = 0) -> None:
        """What clients write into pages."""
        os.pwrite(self.memfd, data, first * PAGE)

    def read(self) -> bytes:
        return os.pread(self.memfd, self.pages * PAGE, 0)

    def close(self) -> None:
        os.close(self.memfd)


def padded(data: bytes, pages: int) -> bytes:
    return data.ljust(pages * PAGE, b"\0")
