"""The FR of anonymous memory without swap space: pages of zeros."""

from __future__ import annotations

import os
from collections.abc import Hashable

import k42
from k42.vm.errors import StoreError
from k42.vm.fr.interface import FileRepresentative, Traits
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

    def version(self) -> Hashable:
        """Zeros are zeros."""
        return "zeros"

    def traits(self) -> Traits:
        """There is nothing to wait for, so nothing to read ahead."""
        return Traits(concurrency=1, cluster=1, read_ahead=0)

    def fill(self, memfd: int, first: int, count: int) -> None:
        """Makes frames of zeros; see `FileRepresentative.fill`."""
        try:
            os.posix_fallocate(memfd, first * PAGE, count * PAGE)
        except OSError as error:
            raise StoreError(
                f"Linux gave no memory: {error.strerror}", url=self.name(), offset=first * PAGE, errno=error.errno
            ) from error

    def resize(self, size: int) -> None:
        """Sets the size; see `FileRepresentative.resize`."""
        self.root.size = size

    def close(self) -> None:
        """Nothing to let go of."""
