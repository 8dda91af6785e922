"""File Cache Manager (FCM): the resident pages of one file, or of one piece of anonymous memory (paper 4.4).

Everybody who maps the file goes through the same FCM, so that there is one frame a page. The frames are in a memfd,
which clients map; the page descriptors are in the native half.

What is local, what is shared?
    `SharedFCM` has one representative: its page table, under one lock, is shared.
How are representatives made, when do they join?
    One, at the first call.
How do local and global operations synchronise?
    By the lock of each page's descriptor: a page is mapped, filled, written back and taken away under it. A page in I/O
    is marked so; only the fault that marked it fills it, the others are woken at the end.
How are they organised?
    The descriptors are hashed by page index; pages that can be given back also stand in the order of replacement.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ClassVar

import k42
from k42 import _native
from k42.vm.errors import OutOfFrames, StoreError
from k42.vm.fault import Fault
from k42.vm.fr import FileRepresentative, SwapFR, ZeroFR
from k42.vm.hat import Hat
from k42.vm.io import IoQueue
from k42.vm.pm import ANYBODYS, Backing, GlobalPageManager, PageManager
from k42.vm.protocol import MAX_GROUP, PAGE, Message, pages_of
from k42.vm.readahead import Advice, Ahead, ReadAhead
from k42.vm.snapshot import Node, SnapshotFR

log = logging.getLogger("k42.kernel")

_WRITE_PAGES = 256  # pages written at once: 1 MiB
_RETRY = 1.0  # seconds until a store that failed to take pages is tried again
_PATIENCE = 100  # ms between two looks at pages that others have in I/O
_FEW_FRAMES = 1024  # with less no native thread reads: here it is known what may wait for what


class Policy(enum.IntEnum):
    """Which pages are given back first; see ``native/core/vm/replacement.hpp``."""

    FIFO = 0
    """In the order in which they came, with a second chance for those that are used (the paper's working set)."""
    CLOCK = 1
    """A ring; who was used goes round once more."""
    S3FIFO = 2
    """A small queue for pages that are new, a main queue for those that come again."""

    @classmethod
    def named(cls, name: str) -> Policy:
        """The policy of this name.

        Raises:
            ValueError: there is none.
        """
        try:
            return cls[name.upper()]
        except KeyError:
            known = ", ".join(policy.name.lower() for policy in cls)
            raise ValueError(f"there is no policy of replacement {name!r}; there are: {known}") from None


def asked_policy(message: Message) -> Policy | None:
    """The policy that a request names; None: it names none.

    Raises:
        ValueError: there is no such policy.
    """
    name = message.get("policy")
    return None if name is None else Policy.named(str(name))


class Tables(enum.IntEnum):
    """What the page table is."""

    SHARED = 0
    REPLICATED = 1
    PARTITIONED = 2


class Outcome(enum.IntEnum):
    """What became of a fault in the native half."""

    MAPPED = 0
    ZERO_FILLED = 1
    QUEUED = 2
    ABSENT = 3
    NO_FRAME = 4
    FAILED = 5
    SHARED = 6


class FileCacheManager(k42.Object):
    """The interface. Pages are counted in 4 KiB, from the start of the file."""

    def native(self) -> _native.FileCache:
        """The native half: what the fault engine goes through."""
        raise NotImplementedError

    def fr(self) -> FileRepresentative:
        """The store."""
        raise NotImplementedError

    def memfd(self) -> int:
        """The descriptor of the frames; the FCM's own."""
        raise NotImplementedError

    def map_page(
        self,
        fault: Fault,
        hat: Hat,
        pm: PageManager,
        page: int,
        group: tuple[int, int],
        mappable: tuple[int, int],
        inside: Callable[[], AbstractContextManager[bool]],
    ) -> Callable[[], None] | None:
        """Finishes a fault on `page`: finds or makes the page, and maps it. Called inside the region's gate.

        Args:
            fault: where it happened.
            hat: where to map.
            pm: whom to ask for frames.
            page: index in the file.
            group: (first page, pages) that one fault on this region brings in.
            mappable: [first, end) pages that the region shows.
            inside: while its context is entered with True the window stays as it was at the fault.

        Returns:
            None; or what remains to be done, to be called outside of the gate: the page is in I/O.
        """
        raise NotImplementedError

    def hinted(self, page: int, pages: int, pm: PageManager) -> None:
        """A fault mapped a page that bears the marker of read-ahead: the next window is due.

        Args:
            page: of the fault.
            pages: it bears no marker, but so many pages from there on are to be read ahead: native threads found no
                frames for them.
            pm: on whose account it is.
        """
        raise NotImplementedError

    def replaceable(self) -> bool:
        """Whether its pages can be given back while somebody shows them."""
        raise NotImplementedError

    def lasting(self) -> bool:
        """Whether its store outlives it, so that dirty pages are to be written back before they have to go."""
        raise NotImplementedError

    def dirty_pages(self) -> int:
        """How many pages the store does not have."""
        raise NotImplementedError

    def give_back(self, frames: int, whose: int = ANYBODYS) -> int:
        """Evicts up to so many pages by the policy of replacement, dirty ones after their write-back; how many.

        Args:
            frames: how many.
            whose: `ABOVE_SHARE`, `ANYBODYS`, or the number of an account, whose pages alone go.
        """
        raise NotImplementedError

    def write_back(self, pages: int) -> int:
        """Writes up to so many dirty pages to the store; how many are written. What fails stays dirty."""
        raise NotImplementedError

    def flush(self, first: int, end: int) -> None:
        """Returns when what was written to the pages [first, end) before the call is in the store.

        Raises:
            StoreError: the store did not take a page; it stays dirty.
        """
        raise NotImplementedError

    def prefetch(self, first: int, end: int, pm: PageManager) -> int:
        """Brings pages in, as many as find room; how many are resident now. Waits for the store.

        Raises:
            StoreError: the store did not give a page.
        """
        raise NotImplementedError

    def resize(self, size: int) -> None:
        """Makes the file, and what it can show, `size` bytes long; pages behind the new end are lost.

        Raises:
            StoreError: the store cannot.
            ValueError: no bytes at all, or too many.
        """
        raise NotImplementedError

    def pin(self, first: int, end: int, pm: PageManager) -> None:
        """Brings pages in and keeps their frames until as many calls of `unpin`.

        Raises:
            OutOfFrames: they do not fit.
            StoreError: the store did not give a page.
        """
        raise NotImplementedError

    def unpin(self, first: int, end: int) -> None:
        """Ends one pin of each of these pages."""
        raise NotImplementedError

    def advise(self, first: int, end: int, advice: Advice, pm: PageManager) -> None:
        """Takes a hint about the accesses to come."""
        raise NotImplementedError

    def node(self) -> Node | None:
        """Its place among snapshots and what they are of; None: there never was a snapshot."""
        raise NotImplementedError

    def set_node(self, node: Node) -> None:
        """Tells its place; before the first snapshot of it can be seen by anybody."""
        raise NotImplementedError

    def take_over(self, page: int) -> None:
        """Of a snapshot: brings in a page, which is marked as in I/O, to keep it as its own; a frame was taken.

        Raises:
            StoreError: it is not to be had; the page is absent again, and its frame given back.
        """
        raise NotImplementedError

    def discard_clean(self) -> None:
        """Forgets the pages that the store has, since it has others by now; dirty ones stay."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives all frames back and closes the store; no region shows the file any more. Dirty pages are lost."""
        raise NotImplementedError

    def stat(self) -> dict[str, int | str]:
        """Name, resident pages, and counts of what happened so far."""
        raise NotImplementedError


class SharedFCM(FileCacheManager):
    """The non-distributed FCM: one page table under one lock.

    Args of ``create``:
        global_pm: the frames.
        fr: what fills absent pages, and takes dirty ones.
        backing: who stands behind the frames.
        cpus: how many CPUs faults come from.
        policy: which pages go first.
        hints: where the fault path says that read-ahead is due; None: there is no read-ahead.
        id: names this FCM there.
        left: of a kernel that has gone: descriptors of frames and journal, which are taken over, and how many pages
            the file has. None: a new cache.
    """

    transfers: ClassVar[tuple[str, ...]] = ("pages",)

    class Root(k42.SharedRoot):
        """Holds the frames and the native half."""

        tables: ClassVar[Tables] = Tables.SHARED

        def __init__(
            self,
            global_pm: GlobalPageManager | None = None,
            fr: FileRepresentative | None = None,
            backing: Backing = Backing.FILE,
            cpus: int = 1,
            policy: Policy = Policy.FIFO,
            hints: _native.HintQueue | None = None,
            id: int = 0,
            left: tuple[int, int, int] | None = None,
        ) -> None:
            if global_pm is None or fr is None:
                return  # they come with the state of another implementation
            self.global_pm = global_pm
            self.fr = fr
            self.backing = backing
            self.policy = policy
            self.hints = hints
            self.id = id
            self.anonymous = isinstance(k42.local(fr), ZeroFR | SwapFR)
            traits = fr.traits()
            self.cluster = min(global_pm.cluster(), traits.cluster) if backing is Backing.FILE else 1
            self.queue = IoQueue(os.path.basename(fr.name()), traits.concurrency)
            limit = 0 if hints is None or self.anonymous else min(traits.read_ahead, global_pm.prefetchable() // 4)
            self.piece = min(traits.cluster, MAX_GROUP)  # pages that are read ahead by one request, at least
            self.read_ahead = ReadAhead(pages_of(fr.size()), limit, traits.cluster)
            self.node: Node | None = None  # among snapshots
            self.failed_until = 0.0  # monotonic time until which the store is not asked to take pages
            self.flushing = threading.Lock()  # protects the order of resize and flush; before all native locks
            frames, journal, pages = left or (-1, -1, pages_of(fr.size()))
            try:
                if left is None:
                    frames = os.memfd_create("k42:" + os.path.basename(fr.name())[:48], os.MFD_CLOEXEC)
                    journal = os.memfd_create("k42-journal", os.MFD_CLOEXEC)
                os.ftruncate(frames, pages * PAGE)
                os.ftruncate(journal, max(pages, os.fstat(journal).st_size))
                if backing is Backing.FILE:
                    os.fchmod(frames, 0o400)  # a reader cannot get a writable descriptor by way of /proc
                fill = 2 if isinstance(k42.local(fr), SnapshotFR) else 0 if self.anonymous else 1
                self.cache = _native.FileCache(
                    global_pm.native(), frames, journal, pages, fill, backing, policy, cpus, self.tables
                )
                frames = journal = -1  # its own
                if left is not None:
                    global_pm.allocate(self.cache.restore(), backing)
            except BaseException:
                for descriptor in (frames, journal):
                    if descriptor >= 0:
                        os.close(descriptor)
                raise
            if (source := fr.native_descriptor()) >= 0 and global_pm.usage()["budget"] >= _FEW_FRAMES:
                self.cache.read_from(source, fr.size(), self.cluster, self.read_ahead.native, hints, id)

        def export_state(self, form: str) -> SharedFCM.Root:
            """Return the whole: what it refers to goes on."""
            return self

        def import_state(self, form: str, state: SharedFCM.Root) -> None:
            """Go on with the native half of another implementation, whose page table is changed while faults come."""
            own = ("rep_class", "ref", "_made")  # of each root
            self.__dict__.update({name: value for name, value in state.__dict__.items() if name not in own})
            self.cache.replicate(self.tables is Tables.REPLICATED)

    root: Root

    def native(self) -> _native.FileCache:
        """The native half."""
        return self.root.cache

    def fr(self) -> FileRepresentative:
        """The store."""
        return self.root.fr

    def memfd(self) -> int:
        """The descriptor of the frames."""
        return self.root.cache.memfd()

    def map_page(
        self,
        fault: Fault,
        hat: Hat,
        pm: PageManager,
        page: int,
        group: tuple[int, int],
        mappable: tuple[int, int],
        inside: Callable[[], AbstractContextManager[bool]],
    ) -> Callable[[], None] | None:
        """Finishes a fault; see `FileCacheManager.map_page`."""
        cache, native_hat = self.root.cache, hat.native()
        at = (native_hat, fault.cpu, fault.address, fault.write, fault.tracked)

        def failed(error: Exception) -> None:
            # An access that is not there any more has nothing to be told.
            with contextlib.suppress(k42.Destroyed), inside() as shown:
                if shown:
                    hat.fail(fault.cpu, fault.address, str(error))

        def preserve(node: Node) -> None:
            try:
                node.preserve(page)
            except Exception as error:
                if not isinstance(error, StoreError | OutOfFrames):
                    log.exception("page %d of %s, for its snapshot", page, self.root.fr.name())
                failed(error)
                return
            with contextlib.suppress(k42.Destroyed), inside() as shown:
                settled = (Outcome.MAPPED, Outcome.ZERO_FILLED, Outcome.QUEUED, Outcome.FAILED)
                if shown and cache.resolve(*at, page, *group) not in settled:
                    hat.wake(fault.cpu, fault.address)  # it went, or another snapshot came: the fault happens again

        while True:
            outcome = cache.resolve(*at, page, *group)
            if outcome == Outcome.SHARED and (node := self.root.node) is not None:
                return functools.partial(node.tree.submit, functools.partial(preserve, node))
            if outcome not in (Outcome.ABSENT, Outcome.NO_FRAME):
                return None
            first, count = cache.begin_io(page, *self._cluster(page, group, pm))
            if count:
                break  # else another fault was faster: look again

        def done(owner: int) -> None:
            completed = False
            with contextlib.suppress(k42.Destroyed), inside() as shown:
                if shown:
                    cache.complete_io(*at, page, first, count, *mappable, owner)
                    completed = True
            if not completed:
                cache.complete_prefetch(first, count, False, owner)

        def submit() -> None:
            try:
                self.root.queue.submit(lambda: self._fill(first, count, pm, done, failed))
            except RuntimeError as error:
                # There is no thread; or the region went since we left its gate, and with it the last user of the cache.
                cache.abort_io(first, count, 0, 0)
                failed(StoreError(str(error)))
                return
            self._look_ahead(self.root.read_ahead.missed(first, count), pm)

        return submit

    def _look_ahead(self, ahead: Ahead | None, pm: PageManager) -> None:
        """Has pages read that will be wanted soon."""
        root = self.root
        if ahead is None or root.hints is None:
            return
        root.cache.set_marker(root.hints, root.id, ahead.marker)
        # Several requests at a time, as large as leaves that many: what they cost beside the bytes is paid at once.
        step = max(root.piece, min(ahead.pages // max(2, root.fr.traits().concurrency // 2), MAX_GROUP))
        for first in range(ahead.first, ahead.first + ahead.pages, step):
            self._submit_ahead(first, min(first + step, ahead.first + ahead.pages), pm)

    def _submit_ahead(self, first: int, end: int, pm: PageManager) -> None:
        with contextlib.suppress(RuntimeError):  # no thread for it, or the cache is being closed
            self.root.queue.submit(functools.partial(self._read_ahead, first, end, pm), urgent=False)

    def _read_ahead(self, first: int, end: int, pm: PageManager) -> None:
        end = min(end, self.root.cache.pages())
        with contextlib.suppress(StoreError, OutOfFrames, k42.Destroyed):  # whoever touches the pages will be told
            try:
                owner = pm.account().number()
            except ValueError:
                return  # the client has gone
            first = self.root.cache.read_in(first, min(end, first + pm.prefetchable()), owner)
            self._bring_in(first, end, pm)

    def hinted(self, page: int, pages: int, pm: PageManager) -> None:
        """Reads ahead; see `FileCacheManager.hinted`."""
        if pages:
            self._submit_ahead(page, page + pages, pm)
        else:
            self._look_ahead(self.root.read_ahead.touched(page), pm)

    def replaceable(self) -> bool:
        """Whether its pages can be given back."""
        return self.root.backing is Backing.FILE

    def lasting(self) -> bool:
        """Whether its store outlives it."""
        return not self.root.anonymous

    def dirty_pages(self) -> int:
        """How many pages the store does not have."""
        return self.root.cache.counts()["dirty"]

    def _fill(
        self,
        first: int,
        count: int,
        pm: PageManager | GlobalPageManager,
        done: Callable[[int], None],
        failed: Callable[[Exception], None],
    ) -> None:
        """Fills a run that is marked as in I/O: frames, then bytes; calls `failed`, or `done` with the account."""
        root = self.root
        frames = owner = 0
        try:
            owner = pm.allocate(count, root.backing)
            frames = count
            root.fr.fill(root.cache.memfd(), first, count)
        except BaseException as error:
            root.cache.abort_io(first, count, frames, owner)
            if not isinstance(error, Exception):
                raise
            # Destroyed: the client has gone. Others who wait for these pages try for themselves.
            if not isinstance(error, StoreError | OutOfFrames | k42.Destroyed):
                log.exception("pages %d to %d of %s", first, first + count, root.fr.name())
                error = StoreError(f"the kernel failed: {type(error).__name__}: {error}")
            failed(error)
        else:
            done(owner)

    def _cluster(self, page: int, group: tuple[int, int], pm: PageManager | GlobalPageManager) -> tuple[int, int]:
        """What to read at once: the group, or more where reading single pages would cost more than reading on."""
        cluster = 1 if self.root.read_ahead.advice is Advice.RANDOM else min(self.root.cluster, pm.cluster())
        if cluster <= group[1]:
            return group
        first = page - page % cluster
        return first, min(cluster, self.root.cache.pages() - first)

    def prefetch(self, first: int, end: int, pm: PageManager | GlobalPageManager) -> int:
        """Brings pages in; see `FileCacheManager.prefetch`."""
        cache = self.root.cache
        end = min(end, cache.pages())
        self._bring_in(first, end, pm)
        return cache.present(first, end)

    def _bring_in(self, first: int, end: int, pm: PageManager | GlobalPageManager) -> None:
        root = self.root
        cache = root.cache
        failures: list[Exception] = []
        room = pm.prefetchable()
        while first < end and room > 0:
            within = min(end - first, MAX_GROUP, room)
            begun, got = cache.begin_fill(first, within)
            if not got:  # others bring it in, or have
                first += within
                continue
            done = functools.partial(cache.complete_prefetch, begun, got, False)
            self._fill(begun, got, pm, done, failures.append)
            if failures:
                raise failures[0]
            first, room = begun + got, room - got

    def give_back(self, frames: int, whose: int = ANYBODYS) -> int:
        """Evicts pages; see `FileCacheManager.give_back`."""
        cache = self.root.cache
        thorough = self.root.read_ahead.advice is not Advice.SEQUENTIAL  # once is enough, in order
        given, _ = cache.reclaim(frames, thorough, whose)
        while given < frames and self._store_is_well():
            first, count = cache.take_laundry(min(_WRITE_PAGES, max(1, frames - given)))
            if not count:
                break
            with contextlib.suppress(StoreError):
                given += self._write(first, count, evict=True)
        return given

    def write_back(self, pages: int) -> int:
        """Writes dirty pages; see `FileCacheManager.write_back`."""
        cache, written = self.root.cache, 0
        if not self._store_is_well():
            return 0
        for start, length in cache.dirty_runs(0, cache.pages()):
            first, end = start, start + length
            while first < end and written < pages:
                at, count, _ = cache.begin_write(first, min(end - first, _WRITE_PAGES))
                if not count:
                    break
                with contextlib.suppress(StoreError):
                    self._write(at, count, evict=False)
                    written += count
                if not self._store_is_well():
                    return written
                first = at + count
        return written

    def _store_is_well(self) -> bool:
        return time.monotonic() >= self.root.failed_until

    def _write(self, first: int, count: int, *, evict: bool) -> int:
        """Writes a run that `begin_write` or `take_laundry` gave us; frames given back."""
        root = self.root
        root.cache.writing_source(True)
        try:
            root.fr.write_back(root.cache.memfd(), first, count)
        except BaseException as error:
            root.cache.end_write(first, count, False, False)
            root.failed_until = time.monotonic() + _RETRY
            log.warning("%s: pages %d to %d stay dirty: %s", root.fr.name(), first, first + count, error)
            raise
        finally:
            root.cache.writing_source(False)
        return root.cache.end_write(first, count, True, evict)

    def flush(self, first: int, end: int) -> None:
        """Writes dirty pages of a range; see `FileCacheManager.flush`."""
        cache = self.root.cache
        failure: StoreError | None = None
        todo = [(start, start + count) for start, count in cache.dirty_runs(first, end)]
        while todo:
            seen = cache.endings()
            busy: list[tuple[int, int]] = []
            for start, stop in todo:
                while start < stop:
                    at, count, waiting = cache.begin_write(start, min(stop - start, _WRITE_PAGES))
                    if waiting:
                        # Others write these, perhaps as they were before the last write to them: look again.
                        busy.append((start, at if count else min(start + _WRITE_PAGES, stop)))
                    if not count:
                        start = min(start + _WRITE_PAGES, stop)
                        continue
                    try:
                        self._write(at, count, evict=False)
                    except StoreError as error:
                        failure = failure or error
                    start = at + count
            if failure:
                raise failure
            todo = busy
            if todo:
                cache.wait_ending(seen, _PATIENCE)
        self.root.fr.sync()

    def resize(self, size: int) -> None:
        """Changes the length; see `FileCacheManager.resize`."""
        root = self.root
        cache, pages = root.cache, pages_of(size)
        if size < 1:
            raise ValueError(f"a mapped file has at least one byte, not {size}")
        with root.flushing:
            try:
                self._resize(size, pages)
            finally:
                root.read_ahead.resize(cache.pages())

    def _resize(self, size: int, pages: int) -> None:
        root = self.root
        cache, before = root.cache, root.cache.pages()
        if size < root.fr.size():
            # From the page of the new end on; its snapshots, and what they see there, stay as they are.
            with contextlib.nullcontext() if root.node is None else root.node.cutting(size // PAGE, before):
                self._resize_store(size)
                cache.resize(pages)
            self._discard(pages, before)
            if size % PAGE:
                self._clear_tail(size)
            os.ftruncate(cache.memfd(), pages * PAGE)
        else:
            self._resize_store(size)
            os.ftruncate(cache.journal(), max(pages, os.fstat(cache.journal()).st_size))
            os.ftruncate(cache.memfd(), pages * PAGE)
            cache.resize(pages)

    def _clear_tail(self, size: int) -> None:
        """Makes zeros of what the last page has behind the end: of a longer file they will be seen, and stored."""
        cache, page = self.root.cache, size // PAGE
        while True:
            seen = cache.endings()
            if cache.pin(page, 1):
                break
            if not cache.present(page, page + 1):
                return
            cache.wait_ending(seen, _PATIENCE)  # in I/O: it may have been read before the cut
        try:
            os.pwrite(cache.memfd(), bytes(PAGE - size % PAGE), size)
            if self.lasting():
                with contextlib.suppress(StoreError):
                    self.flush(page, page + 1)  # a write-back that took the old bytes has ended after it
        finally:
            cache.unpin(page, 1)

    def _resize_store(self, size: int) -> None:
        root = self.root
        root.cache.source_size(0)  # what is read meanwhile is the FR's, which knows
        try:
            root.fr.resize(size)
        finally:
            root.cache.source_size(root.fr.size())

    def _discard(self, first: int, end: int) -> None:
        cache = self.root.cache
        while True:
            seen = cache.endings()
            if not cache.discard(first, end, True):
                return
            cache.wait_ending(seen, _PATIENCE)

    def pin(self, first: int, end: int, pm: PageManager) -> None:
        """Keeps frames; see `FileCacheManager.pin`."""
        cache, done = self.root.cache, first
        try:
            while done < end:
                count = min(end - done, MAX_GROUP)
                for _ in range(8):  # pages may go again before they are pinned
                    if cache.pin(done, count):
                        break
                    self._bring_in(done, done + count, pm)
                else:
                    raise OutOfFrames(f"{end - first} pages to pin do not fit the kernel's budget")
                done += count
        except BaseException:
            if done > first:
                self.unpin(first, done)
            raise

    def unpin(self, first: int, end: int) -> None:
        """Ends pins; see `FileCacheManager.unpin`."""
        for start in range(first, end, MAX_GROUP):
            self.root.cache.unpin(start, min(MAX_GROUP, end - start))

    def advise(self, first: int, end: int, advice: Advice, pm: PageManager) -> None:
        """Takes a hint; see `FileCacheManager.advise`."""
        root = self.root
        match advice:
            case Advice.NORMAL | Advice.RANDOM | Advice.SEQUENTIAL:
                root.read_ahead.advise(advice)
            case Advice.WILL_NEED:
                self.prefetch(first, end, pm)
            case Advice.DONT_NEED:
                if root.backing is Backing.FILE:
                    self.flush(first, end)
                    root.cache.discard(first, end, False)

    def node(self) -> Node | None:
        """Its place among snapshots; see `FileCacheManager.node`."""
        return self.root.node

    def set_node(self, node: Node) -> None:
        """Tells its place; see `FileCacheManager.set_node`."""
        self.root.node = node

    def take_over(self, page: int) -> None:
        """Brings a page in; see `FileCacheManager.take_over`."""
        root = self.root
        try:
            root.fr.fill(root.cache.memfd(), page, 1)
        except BaseException:
            root.cache.abort_io(page, 1, 1, 0)
            raise
        root.cache.complete_prefetch(page, 1, True, 0)

    def discard_clean(self) -> None:
        """Forgets clean pages; see `FileCacheManager.discard_clean`."""
        self.root.cache.discard(0, self.root.cache.pages(), False)

    def close(self) -> None:
        """Gives all frames back; see `FileCacheManager.close`."""
        self.root.fr.cancel()  # else the queue waits for as long as a store that does not answer is tried again
        self.root.queue.close()
        self.root.cache.drain_source()
        self._discard(0, self.root.cache.pages())
        self.root.fr.close()
        k42.destroy(self.root.fr)

    def stat(self) -> dict[str, int | str]:
        """Name, resident pages, counts; see `FileCacheManager.stat`."""
        descriptors, table_bytes = self.root.cache.sizes()
        return {
            "name": self.root.fr.name(),
            "backing": self.root.backing.name.lower(),
            "pages": self.root.cache.pages(),
            "policy": self.root.policy.name.lower(),
            "descriptors": descriptors,
            "table_bytes": table_bytes,
            **self.root.cache.counts(),
            **{f"io_{name}": count for name, count in self.root.queue.counts().items() if name != "threads_started"},
        }


class ReplicatedFCM(SharedFCM):
    """The replicated FCM: each processor has copies of the descriptors of the pages that it has mapped (the DHash).

    - What is local: a table of copies, which a fault on a page that was mapped before goes by alone.
    - What is shared: the master table, and the records of who has copies of what.
    - How local tables are made and join: by the first page that is mapped on a processor.
    - How local and global operations synchronise: what takes a page away has its descriptor locked in the master, and
      recalls the copies from each processor that has one.
    - How they are organised: each page's record lists its copies.

    Section 4.4 of the paper. It pages as the shared one does, and can be swapped with it. For the args of ``create``
    see `SharedFCM`.
    """

    class Root(SharedFCM.Root):
        """Holds the frames and the native half."""

        tables = Tables.REPLICATED

    root: Root


class PartitionedFCM(SharedFCM):
    """The partitioned FCM: spans of 2 MiB of the file in turn belong to one of 16 tables with a lock each.

    Nothing is local to a processor; processors that use different parts of the file share nothing. Section 4.4 of the
    paper. It pages, each part in an order of its own. It is what it is for life: its descriptors are in other places
    than those of the others. For the args of ``create`` see `SharedFCM`.
    """

    transfers: ClassVar[tuple[str, ...]] = ("partitioned pages",)

    class Root(SharedFCM.Root):
        """Holds the frames and the native half."""

        tables = Tables.PARTITIONED

    root: Root
