"""The FR of a store that a user wrote, as a Python class. Which classes there are is up to who installs them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol, TypeVar

import k42
from k42.vm.errors import StoreError, Unsupported
from k42.vm.fr import _frames
from k42.vm.fr.interface import FileRepresentative, Traits
from k42.vm.protocol import PAGE

T = TypeVar("T")

GROUP = "k42.stores"
"""The group of entry points in which a package announces its stores: scheme = module:class."""


class Store(Protocol):
    """What a store of one's own must have. It is made by ``class(url, **options)``, in the kernel's process.

    Its methods are called on several threads at a time. Any exception of theirs becomes a `StoreError` for who
    accesses the pages. It may have besides:

    - ``write_from(offset, buffer)``: writes it all; without it the store is read-only;
    - ``sync()``: returns when what was written is safe;
    - ``resize(size)``: in bytes;
    - ``version()``: something hashable that changes whenever the content is changed by others; without it the content
      is taken to stay as it is;
    - ``close()``;
    - ``traits``: a `Traits`.
    """

    def size(self) -> int:
        """Bytes in it."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills all of the buffer with what is there from `offset` on, which is all inside `size`."""


def find(scheme: str) -> Callable[..., Store] | None:
    """The class that an installed package announces for URLs of this scheme.

    Raises:
        StoreError: it cannot be imported.
    """
    for point in importlib.metadata.entry_points(group=GROUP, name=scheme):
        try:
            found: Callable[..., Store] = point.load()
        except Exception as error:
            raise StoreError(f"{point.value} cannot be imported: {error!r}", url=f"{scheme}:") from error
        return found
    return None


class UserFR(FileRepresentative):
    """Goes to a user's store.

    Args of ``create``:
        make: the class, see `Store`.
        url: what to open.
        options: for the class.

    Raises:
        StoreError: the store cannot be opened.
    """

    class Root(k42.SharedRoot):
        """Holds the user's object, and the size and the version that were opened."""

        def __init__(self, make: Callable[..., Store], url: str, options: Mapping[str, Any]) -> None:
            self.name = url
            self.store: Any = self.call(None, make, url, **options)
            self.size = self.call(None, self.store.size)
            if not isinstance(self.size, int) or self.size < 0:
                raise StoreError(f"its size() is {self.size!r}, not a number of bytes", url=url)
            self.version = self.now()
            self.traits = getattr(self.store, "traits", Traits())

        def now(self) -> Hashable:
            """The version that the store says."""
            if not hasattr(self.store, "version"):
                return "constant"
            version: Hashable = self.call(None, self.store.version)
            return version

        def call(self, offset: int | None, method: Callable[..., T], *args: Any, **kwargs: Any) -> T:
            """Calls the user's code; whatever it raises comes out as a `StoreError`."""
            try:
                return method(*args, **kwargs)
            except OSError as error:
                raise StoreError.of(error, self.name, offset) from error
            except Exception as error:
                raise StoreError(f"{type(error).__name__}: {error}", url=self.name, offset=offset) from error

        def optional(self, name: str) -> Any:
            """A method that not every store has."""
            method = getattr(self.store, name, None)
            if method is None:
                raise Unsupported(f"{self.name} is read-only: its class has no {name}()")
            return method

    root: Root

    def name(self) -> str:
        """The URL."""
        return self.root.name

    def size(self) -> int:
        """In bytes when it was opened, or of the last `resize`."""
        return self.root.size

    def version(self) -> Hashable:
        """What the store said when it was opened."""
        return self.root.version

    def changed(self) -> bool:
        """Whether it says another version now."""
        return self.root.now() != self.root.version

    def traits(self) -> Traits:
        """The store's, or the usual."""
        return self.root.traits

    def fill(self, memfd: int, first: int, count: int) -> None:
        """Has the store fill a buffer; see `FileRepresentative.fill`."""
        root = self.root
        offset, end = first * PAGE, (first + count) * PAGE
        while offset < end:
            piece = min(_frames.CHUNK, end - offset)
            # A buffer of its own each time: the store may keep it, or fill only some of it.
            view = memoryview(bytearray(max(0, min(piece, root.size - offset))))
            if len(view):
                filled = root.call(offset, root.store.read_into, offset, view)
                if filled is not None and filled != len(view):
                    raise StoreError(f"it filled {filled} of {len(view)} bytes", url=root.name, offset=offset)
                if not self.writable() and self.changed():  # of one that is written the version changes by us
                    raise StoreError("it changed since it was opened", url=root.name, offset=offset)
            _frames.put_padded(memfd, offset, view, offset + piece)
            offset += piece

    def writable(self) -> bool:
        """Whether the class has ``write_from``."""
        return hasattr(self.root.store, "write_from")

    def write_back(self, memfd: int, first: int, count: int) -> None:
        """Gives the store what to write; see `FileRepresentative.write_back`."""
        root = self.root
        write = root.optional("write_from")
        offset, end = first * PAGE, min((first + count) * PAGE, root.size)
        while offset < end:
            piece = min(_frames.CHUNK, end - offset)
            view = memoryview(bytes(_frames.take(memfd, offset, piece)))
            root.call(offset, write, offset, view)
            offset += piece

    def resize(self, size: int) -> None:
        """Tells the store; see `FileRepresentative.resize`."""
        root = self.root
        root.call(None, root.optional("resize"), size)
        root.size = size

    def sync(self) -> None:
        """Tells the store."""
        if hasattr(self.root.store, "sync"):
            self.root.call(None, self.root.store.sync)

    def close(self) -> None:
        """Tells the store."""
        if hasattr(self.root.store, "close"):
            self.root.call(None, self.root.store.close)
