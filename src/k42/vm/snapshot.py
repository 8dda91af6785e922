"""Snapshots: file caches that read what they do not have themselves from another file cache, copy-on-write.

A client's window shows one memfd, so a frame cannot be in two file caches: a page is copied, when it is first touched
in a snapshot, or when what the snapshot is of is about to change it.

A file cache and its snapshots, and theirs, are a list. Each *node* reads from its *source* what it lacks. Its *heir*,
the one that reads from it, is the youngest snapshot of it: an older one reads through the younger. So

    a page that a node lacks is, at any time, the same as its source's,

which holds because no page of a node changes before its heir has it: the new snapshot protects all pages of its source
in the windows of all clients (`FileCache.share`), at one moment as the writers see it, since the gates of the regions
are stopped meanwhile; a write to a page comes here then (`Node.preserve`), once for each page and snapshot.

A node whose region has gone hands what it has over to its heir and leaves the list, so that this is as long as there
are mappings. The first of the list, a file, stays as long as it has an heir.

The list dies with its kernel. The next one goes on with each snapshot as an *orphan*: it has the pages that were copied
or its own by then, which the journal knows; what it lacks could have changed in its source since, and is an error.

Order of locks: `Tree.changing`; stripes, in ascending order; `Tree.links`; then the native locks. Who has a page in I/O
or a frame may wait for a stripe; so who holds a stripe waits neither for the end of I/O in a file cache, nor for
frames, but only for stores. All reading is from a node towards the first of its list.
"""

from __future__ import annotations

import contextlib
import enum
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import k42
from k42.vm.errors import StoreError
from k42.vm.fr import SwapFR, Traits, _frames
from k42.vm.fr._page_set import PageSet
from k42.vm.io import IoQueue
from k42.vm.pm import Backing, GlobalPageManager
from k42.vm.protocol import PAGE

if TYPE_CHECKING:
    from k42 import _native
    from k42.vm.fcm import FileCacheManager

_THREADS = 4  # that preserve pages of one list
_STRIPES = 64
_STRIPE_PAGES = 8  # pages that are read at once have one stripe
_PATIENCE = 100  # ms between two looks at a page that others have in I/O
_TRIES = 1000  # ms that a client may keep Linux from protecting its pages, by changing its mappings


class _Owned(enum.IntEnum):
    """Whether a snapshot has a page; as ``FileCache::Owned``."""

    LACKS = 0
    OWNED = 1
    BUSY = 2


class Tree:
    """What the nodes of one list have in common."""

    def __init__(self) -> None:
        self.changing = threading.Lock()  # one who takes a node away at a time
        self.links = threading.Lock()  # protects who is whose source and heir; new snapshots are made with it
        # Each protects pages of the same numbers in all nodes: who holds it finds that no node comes to own one, but
        # by a write of its client, and that no node goes.
        self._stripes = [threading.RLock() for _ in range(_STRIPES)]
        self._queue = IoQueue("snapshots", _THREADS)
        self._nodes = 0

    def submit(self, job: Callable[[], object]) -> None:
        """Has a page preserved, by a thread that may wait."""
        self._queue.submit(job)

    @contextlib.contextmanager
    def pages(self, first: int, count: int) -> Iterator[None]:
        """Holds the stripes of these pages."""
        chunks = range(first // _STRIPE_PAGES, (first + count - 1) // _STRIPE_PAGES + 1)
        with contextlib.ExitStack() as stack:
            for index in sorted({chunk % _STRIPES for chunk in chunks[:_STRIPES]}):
                stack.enter_context(self._stripes[index])
            yield

    def all_pages(self) -> contextlib.AbstractContextManager[None]:
        """Holds all stripes."""
        return self.pages(0, _STRIPES * _STRIPE_PAGES)

    def join(self) -> None:
        """One node more."""
        with self.links:
            self._nodes += 1

    def leave(self) -> None:
        """One node less; with the last its threads end."""
        with self.links:
            self._nodes -= 1
            last = not self._nodes
        if last:
            self._queue.close()


class Node:
    """A file cache as one of a list.

    Args:
        fcm: the file cache.
        tree: the list's; None: a new one.
        global_pm: the frames.
        backing: who stands behind its frames.
    """

    def __init__(
        self, fcm: FileCacheManager, tree: Tree | None, global_pm: GlobalPageManager, backing: Backing
    ) -> None:
        self.tree = tree or Tree()
        self.fcm = fcm
        self.cache: _native.FileCache = fcm.native()
        self.source: Node | None = None
        self.heir: Node | None = None
        self.lost: dict[int, str] = {}  # pages that cannot be read as they were, and why; under their stripes
        self._global_pm = global_pm
        self._backing = backing
        self.tree.join()

    def alone(self) -> bool:
        """Whether there is neither a snapshot of it, nor what it is one of."""
        with self.tree.links:
            return self.source is None and self.heir is None

    def clear(self) -> None:
        """It has left, and its file cache is closed: lets go of that."""
        del self.fcm
        self.tree.leave()

    def insert(self, made: Node) -> None:
        """Makes `made` the youngest snapshot of this. No fault is inside any region that shows this.

        Raises:
            StoreError: a client keeps Linux from protecting its pages. `made` is to `leave`.
        """
        with self.tree.links:
            made.source, made.heir = self, self.heir
            if made.heir is not None:
                made.heir.source = made
                made.cache.share()
            self.heir = made
            for _ in range(_TRIES):
                if self.cache.share():
                    return
                time.sleep(0.001)
        raise StoreError("the pages of a mapping could not be protected", url=self.fcm.fr().name())

    def preserve(self, page: int, *, must: bool = False) -> None:
        """Returns when the heir has the page, so that it may change here; or when it is known that nobody can read it
        as it was, in which case reading it there is a `StoreError` from now on.

        Args:
            page: its number.
            must: that is an error here instead.

        Raises:
            OutOfFrames, StoreError: the heir cannot have it.
        """
        frames = 0
        heir: Node | None = None
        try:
            while True:
                with self.tree.pages(page, 1):
                    with self.tree.links:
                        other, generation = self.heir, self.cache.generation()
                    if other is not heir and frames:
                        frames -= 1
                        assert heir is not None
                        heir._release()
                    heir = other
                    if heir is None:
                        return
                    seen = heir.cache.endings()
                    owned = _Owned.OWNED if page in heir.lost else heir.cache.own(page)
                    if owned == _Owned.LACKS and frames and heir.cache.begin_io(page, page, 1)[1]:
                        frames = 0  # with the page, or given back
                        try:
                            heir.fcm.take_over(page)
                        except StoreError as error:
                            if must:
                                raise
                            heir.lost[page] = str(error)
                        owned = _Owned.OWNED
                    if owned == _Owned.OWNED:
                        self.cache.allow(page, generation)
                        return
                if owned == _Owned.BUSY:
                    heir.cache.wait_ending(seen, _PATIENCE)
                elif not frames:
                    heir._global_pm.allocate(1, heir._backing)
                    frames = 1
        finally:
            if frames and heir is not None:
                heir._release()

    def _release(self) -> None:
        self._global_pm.release(1, self._backing)

    @contextlib.contextmanager
    def cutting(self, first: int, end: int) -> Iterator[None]:
        """Lets the caller change the pages [first, end) as it likes inside: the heir has them, and none comes.

        Raises:
            OutOfFrames, StoreError: the heir cannot have them.
        """
        while True:
            with self.tree.links:
                generation = self.cache.generation()
                heir = self.heir
            if heir is not None:
                for page in range(first, min(end, heir.cache.pages())):
                    self.preserve(page)
            with self.tree.links:
                if generation == self.cache.generation():
                    yield
                    return

    def fetch(self, memfd: int, page: int) -> None:
        """Puts a page that this node lacks into a frame. With the page's stripe held.

        Raises:
            StoreError: it is not to be had.
        """
        self._refuse(page)
        node = self.source
        while node is not None:
            node._refuse(page)
            if node.cache.pin(page, 1):
                try:
                    _frames.put(memfd, page * PAGE, _frames.take(node.cache.memfd(), page * PAGE, PAGE))
                finally:
                    node.cache.unpin(page, 1)
                break
            # Not resident: its store has it, since it would not be dirty without the stripe.
            fr = k42.local(node.fcm.fr())
            if node.source is None or node.cache.stored(page):
                if isinstance(fr, SnapshotFR):
                    fr.fill_own(memfd, page, 1)
                else:
                    node.fcm.fr().fill(memfd, page, 1)
                break
            node = node.source
        else:
            _frames.put_zeros(memfd, page * PAGE, (page + 1) * PAGE)
            return
        if node.source is None and not node.fcm.fr().steady():
            reason = "others changed it since, and this page of the snapshot was not read before"
            raise StoreError(reason, url=node.fcm.fr().name(), offset=page * PAGE)

    def _refuse(self, page: int) -> None:
        if reason := self.lost.get(page):
            raise StoreError(reason, url=self.fcm.fr().name(), offset=page * PAGE)

    def leave(self) -> Node | None:
        """Hands what it has over to its heir, if there is one, and leaves the list; no region shows it any more.

        Returns:
            Its source.

        Raises:
            OutOfFrames, StoreError: the heir cannot have a page. It stays in the list; try again.
        """
        done: set[int] = set()
        with self.tree.changing:
            while True:
                heir = self.heir  # a snapshot of this cannot come any more
                if heir is not None:
                    for page in self._owned(heir) - done:
                        self.preserve(page, must=True)
                        done.add(page)
                with self.tree.all_pages():
                    if heir is not None and self._owned(heir) - done:
                        continue  # its source has preserved more here meanwhile
                    if heir is not None:
                        for page, reason in self.lost.items():
                            if heir.cache.own(page) != _Owned.OWNED:
                                heir.lost[page] = reason
                    with self.tree.links:
                        source = self.source
                        if heir is not None:
                            heir.source = source
                        if source is not None:
                            source.heir = heir
                            if heir is None:
                                source.cache.unshare()
                        self.source = self.heir = None
                        return source

    def _owned(self, heir: Node) -> set[int]:
        pages = heir.cache.pages()
        # Of the first of the list, which may be memory whose changes nobody tracks, all that is there.
        return {page for page in self.cache.owned(self.source is None) if page < pages}


class SnapshotFR(SwapFR):
    """The FR of a snapshot: swap space for what is its own; all else is its source's.

    Args of ``create``:
        size: in bytes.
    """

    class Root(SwapFR.Root):
        """Holds the swap file, and whose it is."""

        def __init__(self, size: int, descriptor: int | None = None) -> None:
            super().__init__(size, descriptor)
            self.node: Node | None = None
            self.title = "a snapshot"
            self.orphaned = False  # its source is not known any more

    root: Root

    def belong(self, node: Node, title: str) -> None:
        """Tells which node's it is, and what to call it."""
        self.root.node, self.root.title = node, title

    def orphan(self, title: str) -> None:
        """Its kernel died, and nobody knows what it is of: what it does not have itself is an error."""
        self.root.title, self.root.orphaned = title, True

    def orphaned(self) -> bool:
        """Whether it is an orphan."""
        return self.root.orphaned

    def keep(self, pages: Iterable[int]) -> None:
        """Of an orphan: the pages that are in the file as the journal has it, which is the truth."""
        with self.root.lock:
            self.root.pages = PageSet()
            for page in pages:
                self.root.pages.add(page, 1)

    def name(self) -> str:
        """What to call it in messages."""
        return self.root.title

    def traits(self) -> Traits:
        """Those of swap space; an orphan is asked page by page, since of its neighbours one may be lacking."""
        traits = super().traits()
        return replace(traits, cluster=1) if self.root.orphaned else traits

    def version(self) -> Hashable:
        """Nobody else has it."""
        return "snapshot"

    def fill(self, memfd: int, first: int, count: int) -> None:
        """Reads what is in the file, and the rest from the source; see `FileRepresentative.fill`."""
        if self.root.orphaned:
            for start, _, inside in self.holds(first, count):
                if not inside:
                    reason = "its kernel died, and this page of the snapshot was not read or written before"
                    raise StoreError(reason, url=self.name(), offset=start * PAGE)
            self.fill_own(memfd, first, count)
            return
        node = self.root.node
        assert node is not None
        with node.tree.pages(first, count):
            for start, pages, inside in self.holds(first, count):
                if inside:
                    self.fill_own(memfd, start, pages)
                else:
                    for page in range(start, start + pages):
                        node.fetch(memfd, page)

    def fill_own(self, memfd: int, first: int, count: int) -> None:
        """Reads what is in the file, zeros for the rest; without a source."""
        super().fill(memfd, first, count)
