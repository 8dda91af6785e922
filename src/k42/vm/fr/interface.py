"""What every file representative can do."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import k42
from k42.vm.errors import Unsupported


@dataclass(frozen=True)
class Traits:
    """What a store is good at: how it wants to be asked.

    Attributes:
        concurrency: requests that it serves at once with profit; never more are made.
        cluster: pages to read at once where one is missing, as reading on costs little there.
        read_ahead: the largest read-ahead window, in pages.
        retries: how often a request is made again after an error that may pass.
        backoff: seconds before the first retry; doubled each time.
        timeout: seconds after which a request without an answer has failed.
    """

    concurrency: int = 4
    cluster: int = 16
    read_ahead: int = 256
    retries: int = 0
    backoff: float = 0.1
    timeout: float = 30.0

    def __post_init__(self) -> None:
        limits = {"concurrency": 1, "cluster": 1, "read_ahead": 0, "retries": 0, "backoff": 0.0, "timeout": 0.001}
        for name, least in limits.items():
            value = getattr(self, name)
            if type(value) not in (int, type(least)) or not least <= value < 1 << 32:
                raise ValueError(f"{name} is a number of at least {least}, not {value!r}")


class FileRepresentative(k42.Object):
    """The interface: one file, or one source of pages. Shared by all processors.

    Its methods are called on I/O threads, several at a time, and may block; never on a fault server's thread.
    Pages are of 4 KiB. The last page of a file may be partial: it fills with zeros past the end of the file, and what
    frames hold there is never written back.
    """

    def name(self) -> str:
        """What to call it in messages: a path or a URL."""
        raise NotImplementedError

    def size(self) -> int:
        """Its size in bytes: as of when it was opened, or of the last `resize`."""
        raise NotImplementedError

    def version(self) -> Hashable:
        """Which content it is that fills pages: size and times, an ETag, … Two equal ones mean the same bytes."""
        raise NotImplementedError

    def changed(self) -> bool:
        """Whether the store holds another content by now than that of `version`. Asks the store.

        Raises:
            StoreError: the store does not answer.
        """
        return False

    def steady(self) -> bool:
        """Whether what `fill` has read so far is all of one version. Asks nobody who is far away."""
        return True

    def traits(self) -> Traits:
        """How it wants to be asked."""
        return Traits()

    def fill(self, memfd: int, first: int, count: int) -> None:
        """Puts `count` pages, from page `first`, into the frames; zeros past the end of the file.

        Raises:
            StoreError: the store cannot be read, or holds another content than when it was opened. Frames of the
                range may have been written to: the caller gives them back.
        """
        raise NotImplementedError

    def read_range(self, offset: int, length: int) -> bytes | bytearray:
        """Bytes of the version that was opened, all inside of it, for an FR that keeps something of its own in there.

        Raises:
            StoreError: they are not to be had, or it changed.
            Unsupported: this kind of store gives pages only.
        """
        raise Unsupported(f"{self.name()} is no store for something else to lie in")

    def writable(self) -> bool:
        """Whether `write_back` and `resize` are there."""
        return False

    def write_back(self, memfd: int, first: int, count: int) -> None:
        """Writes `count` pages, from page `first`, out of the frames; nothing past the end of the file.

        Raises:
            StoreError: the store cannot be written; any part of the range may have been.
            Unsupported: it is read-only.
        """
        raise Unsupported(f"{self.name()} is read-only")

    def resize(self, size: int) -> None:
        """Makes it this long, in bytes; what it grows by is zeros. No write-back past the new end may be under way.

        Raises:
            StoreError: the store cannot be resized.
            Unsupported: it is read-only.
        """
        raise Unsupported(f"{self.name()} is read-only")

    def sync(self) -> None:
        """Returns when all that was written back survives a power failure, as far as the store can promise that.

        Raises:
            StoreError: it does not.
        """

    def forget(self, first: int, count: int) -> None:
        """These pages will never be asked for again as they are: swap space gives up their room."""

    def native_descriptor(self) -> int:
        """A descriptor that native code may fill pages from by ``pread``; -1: there is none. Stays the FR's."""
        return -1

    def cancel(self) -> None:
        """Who waits for the store gives up soon, with a `StoreError`, now and from now on: the FR is to be closed."""

    def close(self) -> None:
        """Lets go of the store; nobody is inside any method, and nobody will be."""
        raise NotImplementedError
