"""The FR of anonymous memory: pages of zeros."""

from __future__ import annotations

import os

import k42
from k42.vm.errors import StoreError
from k42.vm.fr.interface import FileRepresentative
from k42.vm.protocol import PAGE


class ZeroFR(FileRepresentative):
    """Fills pages with zeros.

    Args of ``create``:
        size: in bytes.
    """

    class Root(k42.SharedRoot):
        """Holds the size."""

        def __init__(self, size: int) -> None:
            self.size = size

    root: Root

    def name(self) -> str:
        """What to call it in messages."""
        return "anonymous memory"

    def size(self) -> int:
        """Its size in bytes."""
        return self.root.size

    def fill(self, memfd: int, first: int, count: int) -> None:
        """Makes frames of zeros; see `FileRepresentative.fill`."""
        try:
            os.posix_fallocate(memfd, first * PAGE, count * PAGE)
        except OSError as error:
            raise StoreError(error.errno, f"Linux gave no memory: {error.strerror}") from error

    def close(self) -> None:
        """Nothing to let go of."""
