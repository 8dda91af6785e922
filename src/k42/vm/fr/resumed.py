"""The FR of what a URL names, in a kernel that took over from one that died: opened again when it is first needed.

A store may be slow, or away for a while, and pages that are resident can be served without it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

import k42
from k42.vm.errors import StoreError
from k42.vm.fr.interface import FileRepresentative, Traits


class ResumedFR(FileRepresentative):
    """Opens the store at the first call that needs it, which must then hold the version that it held before.

    Args of ``create``:
        name: for messages.
        size: in bytes.
        version: what ``repr`` said of the version; None: it changes by our own writes, so any will do.
        traits: how it wants to be asked.
        writable: whether it can be written.
        opener: opens it.
    """

    class Root(k42.SharedRoot):
        """Holds the store once it is open."""

        def __init__(
            self,
            name: str,
            size: int,
            version: str | None,
            traits: Traits,
            writable: bool,
            opener: Callable[[], FileRepresentative],
        ) -> None:
            self.name = name
            self.size = size
            self.version = version
            self.traits = traits
            self.writable = writable
            self.opener = opener
            self.lock = threading.Lock()  # protects what follows; held while the store is opened. The last in order
            self.store: FileRepresentative | None = None
            self.cancelled = False

        def open(self) -> FileRepresentative:
            """The store."""
            with self.lock:
                if self.cancelled:
                    raise StoreError("it is being closed", url=self.name)
                if self.store is None:
                    store = self.opener()
                    if self.version is not None and (repr(store.version()), store.size()) != (self.version, self.size):
                        store.close()
                        k42.destroy(store)
                        raise StoreError("it changed since it was opened", url=self.name)
                    self.store = store
                return self.store

    root: Root

    def name(self) -> str:
        """The URL."""
        return self.root.name

    def size(self) -> int:
        """In bytes when it was opened first, or of the last `resize`."""
        return self.root.size

    def version(self) -> Hashable:
        """The one that it had when it was opened first, as text."""
        return self.root.version

    def changed(self) -> bool:
        """Whether it is another by now."""
        try:
            return self.root.open().changed()
        except StoreError:
            if self.root.store is None:
                return True  # or it is away: who opens it anew will be told
            raise

    def traits(self) -> Traits:
        """As before."""
        return self.root.traits

    def fill(self, memfd: int, first: int, count: int) -> None:
        """Asks the store; see `FileRepresentative.fill`."""
        self.root.open().fill(memfd, first, count)

    def read_range(self, offset: int, length: int) -> bytes | bytearray:
        """Asks the store; see `FileRepresentative.read_range`."""
        return self.root.open().read_range(offset, length)

    def writable(self) -> bool:
        """As before."""
        return self.root.writable

    def write_back(self, memfd: int, first: int, count: int) -> None:
        """Tells the store; see `FileRepresentative.write_back`."""
        self.root.open().write_back(memfd, first, count)

    def resize(self, size: int) -> None:
        """Tells the store; see `FileRepresentative.resize`."""
        self.root.open().resize(size)
        self.root.size = size

    def sync(self) -> None:
        """Tells the store, if it was asked for anything."""
        if self.root.store is not None:
            self.root.store.sync()

    def cancel(self) -> None:
        """Ends requests that are under way."""
        self.root.cancelled = True
        if self.root.store is not None:
            self.root.store.cancel()

    def close(self) -> None:
        """Closes it, if it is open."""
        if self.root.store is not None:
            self.root.store.close()
            k42.destroy(self.root.store)
