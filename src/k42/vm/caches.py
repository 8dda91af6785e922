"""The kernel's table of file caches: which file, URL or piece of anonymous memory has which FCM, and who uses it.

All who open the same content go through the same FCM. One that nobody uses is kept for the next, up to a number.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import functools
import itertools
import json
import logging
import os
import stat as stat_module
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import k42
from k42.vm.errors import OutOfFrames, ProtocolError, StoreError, Unsupported
from k42.vm.fcm import FileCacheManager, Policy
from k42.vm.files import open_store
from k42.vm.fr import FileFR, FileRepresentative, ResumedFR, SwapFR, Traits, ZeroFR
from k42.vm.ledger import Ledger
from k42.vm.pm import Backing, GlobalPageManager
from k42.vm.protocol import PAGE, pages_of
from k42.vm.snapshot import Node, SnapshotFR

log = logging.getLogger("k42.kernel")

_UNUSED = 256  # file caches kept, without any mapping, for the next who opens the file
_CLOSERS = 2  # threads that close what nobody uses any more: a store may take long

_LONGEST_NAME = 4096  # characters of what is told to the next kernel, for its messages


class Make(Protocol):
    """Makes an FCM of a store, with a number; of frames that a kernel left which has gone, or of none.

    With a policy of replacement, or the kernel's own.
    """

    def __call__(
        self,
        fr: FileRepresentative,
        backing: Backing,
        number: int,
        policy: Policy | None = None,
        left: tuple[int, int, int] | None = None,
    ) -> FileCacheManager:
        """Makes it."""


@dataclass(eq=False)
class Cached:
    """A file cache in the table.

    Attributes:
        fcm: it.
        key: by which it is found; None: anonymous memory, which is found by nobody.
        reserved: frames promised to it.
        users: regions that show it, and requests that work on it.
        writers: regions of those through which its file is written.
        number: of the FCM.
        url: what names the store, if not a descriptor: URL, mode, options.
        policy: of replacement, as it was asked for; None: the kernel's own.
        node: its place among snapshots; None: there never was one.
        origin: of a snapshot, the file or URL that it is of in the end, of which it is a user.
    """

    fcm: FileCacheManager
    key: Hashable | None
    number: int
    url: tuple[str, str, Mapping[str, Any]] | None = None
    policy: Policy | None = None
    reserved: int = 0
    users: int = 0
    writers: int = 0
    node: Node | None = None
    origin: Cached | None = None


@dataclass(eq=False)
class _Turn:
    """Of those who open the same URL."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    waiting: int = 0  # including who has it; under the table's lock


class Caches:
    """The table.

    Args:
        global_pm: the frames.
        make: makes an FCM of a store, with a number of its own.
        wrote: called when the last writer of a cache has gone.
        ledger: what the next kernel is to know.
        swap: whether anonymous memory made with overcommit may be written to a swap file.
    """

    def __init__(
        self,
        global_pm: GlobalPageManager,
        make: Make,
        wrote: Callable[[FileCacheManager], None],
        ledger: Ledger,
        *,
        swap: bool,
    ) -> None:
        self._global_pm = global_pm
        self._ledger = ledger
        self._make = make
        self._wrote = wrote
        self.swap = swap
        # Protects the table, and the counts of users; before all locks but those of clients. No store is asked with it
        # but a local file.
        self._lock = threading.Lock()
        self._telling = threading.Lock()  # keeps what is told of one cache in order; after the table's
        self._all: dict[Cached, None] = {}
        self._numbers = itertools.count(1)
        self._by_number: dict[int, FileCacheManager] = {}
        self._by_key: dict[Hashable, Cached] = {}
        self._unused: collections.OrderedDict[Cached, None] = collections.OrderedDict()
        self._leaving: set[Cached] = set()  # nobody uses them, and they are to go once they are written back
        self._opening: dict[Hashable, _Turn] = {}  # of URLs that are being opened; one opens, others wait
        self._abandoned: set[Cached] = set()  # nodes without users that have not handed over all that they have
        self._closers = ThreadPoolExecutor(_CLOSERS, "k42-close")

    # What can be mapped. Each returns a cache with one user more, to be given to `let_go`.

    def file(self, descriptor: int, name: str, *, writer: bool, policy: Policy | None = None) -> tuple[Cached, bool]:
        """The cache of a local file, and whether its FR took the descriptor over.

        Raises:
            ProtocolError: not a regular file, or not open as it must be.
            ValueError: an empty file; one that is in use with another policy.
        """
        status = os.fstat(descriptor)
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        mode = flags & os.O_ACCMODE
        if not stat_module.S_ISREG(status.st_mode) or mode == os.O_WRONLY or flags & os.O_PATH:
            raise ProtocolError("a file mapping needs a regular file, open for reading")
        if writer and mode != os.O_RDWR:
            raise ProtocolError("a writable file mapping needs a file that is open for reading and writing")
        if status.st_size == 0:
            raise ValueError("cannot map an empty file")
        key = ("file", status.st_dev, status.st_ino)
        with self._lock:
            found = self._by_key.get(key)
            taken = False
            if found is not None and self._is_stale(found, policy):
                found = None
            if found is None:
                fr = FileFR.create(descriptor, name.replace("\0", "?"))
                taken = True
                found = self._add(key, *self._make_or_close(fr, Backing.FILE, policy), policy=policy)
            elif writer and not found.fcm.fr().writable():
                local = k42.local(found.fcm.fr())
                assert isinstance(local, FileFR)
                local.make_writable(descriptor)
                taken = True
                self.tell(found)
            self._use(found, writer=writer)
            return found, taken

    def url(
        self,
        url: str,
        mode: str,
        options: Mapping[str, Any],
        opener: Callable[[], FileRepresentative],
        policy: Policy | None = None,
    ) -> Cached:
        """The cache of a URL; may take as long as its store does.

        Raises:
            StoreError, Unsupported, ValueError: as `opener` raises them.
            ValueError: it is in use with another policy.
        """
        key = self.url_key(url, options)
        with self._turn(key):
            with self._lock:
                found = self._by_key.get(key)
                if found is not None:
                    self._use(found, writer=False)
            if found is not None:
                try:
                    same = self._has_policy(found, policy, users=1)
                    if same and not found.fcm.fr().changed() and (mode != "r+" or found.fcm.fr().writable()):
                        return found
                    if not same:
                        found.fcm.flush(0, 1 << 40)
                    self._retire(found, policy)
                    if not same:
                        self._flush_retired(found)
                except BaseException:
                    self.let_go(found)
                    raise
                self.let_go(found)
            fr = opener()
            with self._lock:
                made = self._make_or_close(fr, Backing.FILE, policy)
                found = self._add(key, *made, url=(url, mode, options), policy=policy)
                self._use(found, writer=False)
            return found

    @contextlib.contextmanager
    def _turn(self, key: Hashable) -> Iterator[None]:
        """One at a time for each key."""
        with self._lock:
            turn = self._opening.setdefault(key, _Turn())
            turn.waiting += 1
        try:
            with turn.lock:
                yield
        finally:
            with self._lock:
                turn.waiting -= 1
                if not turn.waiting:
                    del self._opening[key]

    @staticmethod
    def url_key(url: str, options: Mapping[str, Any]) -> Hashable:
        """Who asks with other options may see other content."""
        return ("url", url, json.dumps(options, sort_keys=True))

    def opened_url(self, url: str, options: Mapping[str, Any], *, writer: bool) -> Cached:
        """The cache of a URL that was opened a moment ago.

        Raises:
            StoreError: it is not there any more: open it again.
            Unsupported: it cannot be written.
        """
        with self._lock:
            found = self._by_key.get(self.url_key(url, options))
            if found is None:
                raise StoreError("it was closed meanwhile, for want of room: open it again", url=url)
            if writer and not found.fcm.fr().writable():
                raise Unsupported(f"{url} is read-only: open it with mode 'r', or 'c' for changes of your own")
            self._use(found, writer=writer)
            return found

    def anonymous(self, size: int, *, overcommit: bool) -> Cached:
        """New anonymous memory of `size` bytes, whole pages.

        Raises:
            OutOfFrames: it does not fit the budget.
        """
        backing = Backing.RESERVED if not overcommit else Backing.FILE if self.swap else Backing.OVERCOMMITTED
        reserved = size // PAGE if backing is Backing.RESERVED else 0
        store: type[FileRepresentative] = SwapFR if backing is Backing.FILE else ZeroFR
        with self._promised(backing, reserved):
            fcm, number = self._make_or_close(store.create(size), backing)
        with self._lock:
            made = self._add(None, fcm, number, reserved)
            self._use(made, writer=False)
            return made

    def snapshot(
        self, of: Cached, name: str, stopped: Callable[[Cached], contextlib.AbstractContextManager[None]]
    ) -> Cached:
        """A new cache that has the content of another, which is in use, as it is now.

        Args:
            of: the other.
            name: what to call it in messages.
            stopped: inside its context no fault is inside any region that shows `of`, and writes there are tracked.

        Raises:
            OutOfFrames: it does not fit the budget.
            StoreError: a client keeps Linux from protecting its pages.
            Unsupported: it is a snapshot itself, and was taken over from a kernel that died.
        """
        parent = k42.local(of.fcm.fr())
        if isinstance(parent, SnapshotFR) and parent.orphaned():
            raise Unsupported("a snapshot whose kernel has died has no snapshots: it may lack pages")
        size = of.fcm.fr().size()
        # Without swap space there must be a frame for each page that either side will write to.
        backing, reserved = (Backing.FILE, 0) if self.swap else (Backing.RESERVED, pages_of(size))
        with self._promised(backing, reserved):
            fr = SnapshotFR.create(size)
            fcm, number = self._make_or_close(fr, backing)
        if of.node is None:
            of.node = Node(of.fcm, None, self._global_pm, Backing.FILE)
            of.fcm.set_node(of.node)
        node = Node(fcm, of.node.tree, self._global_pm, backing)
        local = k42.local(fr)
        assert isinstance(local, SnapshotFR)
        local.belong(node, name)
        fcm.set_node(node)
        with self._lock:
            made = self._add(None, fcm, number, reserved)
            made.node = node
            self._use(made, writer=False)
            made.origin = of.origin if of.key is None else of
            if made.origin is not None:
                made.origin.users += 1
        try:
            with stopped(of):
                of.node.insert(node)
        except BaseException:
            self.let_go(made)
            raise
        return made

    # Their use.

    def hold(self, cached: Cached) -> bool:
        """One user more, if it has some; to be given to `let_go`."""
        with self._lock:
            if cached.users == 0:
                return False
            cached.users += 1
            return True

    def let_go(self, cached: Cached, *, writer: bool = False) -> None:
        """One user less. Anonymous memory goes with the last; a file stays for the next, if it is one of few."""
        closing: list[Cached] = []
        oldest: Cached | None = None
        with self._lock:
            cached.users -= 1
            cached.writers -= writer
            if writer and cached.writers == 0:
                self._wrote(cached.fcm)
            if cached.users:
                return
            if cached.key is None or self._by_key.get(cached.key) is not cached:
                closing.append(cached)  # nobody finds it any more
            else:
                self._unused[cached] = None
                if len(self._unused) > _UNUSED:
                    oldest, _ = self._unused.popitem(last=False)
                    self._leaving.add(oldest)
        if oldest is not None:
            with contextlib.suppress(RuntimeError):  # the kernel ends, and closes all
                self._closers.submit(self._leave, oldest)
        for each in closing:
            if each.key is None and (each.node is None or each.node.alone()):
                self._end(each)  # its memory is to be there for the next at once
            else:
                self._end_soon(each)

    def _leave(self, cached: Cached) -> None:
        """Closes a cache that nobody has opened for long. Until it is written back, who opens the file finds it."""
        with contextlib.suppress(StoreError):  # closing it tries again, and says what is lost
            cached.fcm.flush(0, 1 << 40)
        with self._lock:
            if cached not in self._leaving:
                return  # somebody has opened it
            self._leaving.remove(cached)
            if self._by_key.get(cached.key) is cached:
                del self._by_key[cached.key]
        self._end(cached)

    def _end_soon(self, cached: Cached) -> None:
        with contextlib.suppress(RuntimeError):  # the kernel ends, and closes all
            self._closers.submit(self._end, cached)

    def fcms(self) -> list[FileCacheManager]:
        """All of them."""
        with self._lock:
            return [cached.fcm for cached in self._all]

    def numbered(self, number: int) -> FileCacheManager | None:
        """The one that was made with this number; None: it has gone."""
        return self._by_number.get(number)

    def shut_down(self) -> None:
        """Writes back what is dirty, and closes all; nobody faults any more."""
        self._closers.shutdown()
        with self._lock:
            left = list(self._all)
        for cached in left:
            with contextlib.suppress(k42.Destroyed):
                self._close(cached)

    # What the next kernel is to know, if this one dies.

    def tell(self, cached: Cached) -> None:
        """Says what there is; again where that has changed."""
        with self._telling:
            cache, fr = cached.fcm.native(), k42.local(cached.fcm.fr())
            record: dict[str, Any] = {
                "name": fr.name()[-_LONGEST_NAME:],
                "size": fr.size(),
                "pages": cache.pages(),
                "reserved": cached.reserved,
                "url": cached.url,
                "policy": cached.policy,
            }
            files = []
            match fr:
                case FileFR():
                    record |= {"store": "file", "version": fr.version()}
                    files.append(fr.native_descriptor())
                case SwapFR():
                    record |= {"store": "snapshot" if isinstance(fr, SnapshotFR) else "swap"}
                    fr.root.made = functools.partial(self._tell_swap_file, cached.number)
                case ZeroFR():
                    record |= {"store": "zero"}
                case _:
                    version = fr.version() if isinstance(fr, ResumedFR) else repr(fr.version())
                    record |= {
                        "store": "url",
                        "version": None if fr.writable() else version,  # else it changes by our own writes
                        "traits": asdict(fr.traits()),
                        "writable": fr.writable(),
                    }
            self._ledger.tell(f"cache/{cached.number}", record, (cache.memfd(), cache.journal(), *files))

    def _tell_swap_file(self, number: int, descriptor: int) -> None:
        self._ledger.tell(f"swap/{number}", True, (descriptor,))

    def take_over(self, number: int, record: Mapping[str, Any], descriptors: list[int], swap: int | None) -> Cached:
        """Makes the cache of a record that a kernel left which has gone; nobody uses it yet.

        Args:
            number: of the FCM.
            record: what `tell` told.
            descriptors: and what it passed with it; taken over.
            swap: the swap file, if there is one; taken over.
        """
        frames, journal, *files = descriptors
        name, size, url = record["name"], record["size"], record["url"]
        key: Hashable | None = None
        backing = Backing.FILE
        fr: FileRepresentative
        match record["store"]:
            case "file":
                status = os.fstat(files[0])
                key = ("file", status.st_dev, status.st_ino)
                fr = FileFR.create(files[0], name)
                k42.local(fr).root.size = size  # what it is to us: if others truncate it, that is an error as before
            case "swap":
                fr = SwapFR.create(size, swap)
                self._promise(backing, 0)
            case "snapshot":
                fr = SnapshotFR.create(size, swap)
                local = k42.local(fr)
                assert isinstance(local, SnapshotFR)
                local.orphan(name)
                backing = Backing.RESERVED if record["reserved"] else Backing.FILE
                self._promise(backing, record["reserved"])
            case "zero":
                fr = ZeroFR.create(size)
                backing = Backing.RESERVED if record["reserved"] else Backing.OVERCOMMITTED
                self._promise(backing, record["reserved"])
            case _:
                traits = Traits(**record["traits"])
                opener = functools.partial(open_store, *url)
                fr = ResumedFR.create(name, size, record["version"], traits, record["writable"], opener)
        if url is not None:
            key = self.url_key(url[0], url[2])
        policy = None if record["policy"] is None else Policy(record["policy"])
        fcm = self._make(fr, backing, number, policy, (frames, journal, record["pages"]))
        if record["store"] == "snapshot":
            assert isinstance(local, SnapshotFR)
            cache = fcm.native()
            local.keep([page for page in cache.owned(False) if cache.stored(page)])
        if record["store"] == "file" and fr.version() != tuple(record["version"]):
            # By others, or by us since it was told: what the frames and the file have in common is not known.
            fcm.discard_clean()
        with self._lock:
            self._by_number[number] = fcm
            self._numbers = itertools.count(max(number + 1, next(self._numbers)))
            cached = self._enter(Cached(fcm, key, number, url, policy, record["reserved"]))
            self.tell(cached)
            return cached

    def use(self, cached: Cached, *, writer: bool) -> None:
        """One user more of a cache that was taken over."""
        with self._lock:
            self._use(cached, writer=writer)

    def let_unused_go(self) -> None:
        """All are taken over, and who uses them is known: the others are as if their last user had gone."""
        with self._lock:
            unused = [cached for cached in self._all if not cached.users]
            for cached in unused:
                cached.users = 1
        for cached in unused:
            self.let_go(cached)

    # With the lock.

    def _add(
        self,
        key: Hashable | None,
        fcm: FileCacheManager,
        number: int,
        reserved: int = 0,
        url: tuple[str, str, Mapping[str, Any]] | None = None,
        policy: Policy | None = None,
    ) -> Cached:
        cached = self._enter(Cached(fcm, key, number, url, policy, reserved))
        self.tell(cached)
        return cached

    def _enter(self, cached: Cached) -> Cached:
        fcm, key = cached.fcm, cached.key
        self._all[cached] = None
        if key is not None:
            self._by_key[key] = cached
        if fcm.replaceable():
            self._global_pm.attach_fcm(fcm)
        return cached

    def _use(self, cached: Cached, *, writer: bool) -> None:
        cached.users += 1
        cached.writers += writer
        self._unused.pop(cached, None)
        self._leaving.discard(cached)

    def _is_stale(self, cached: Cached, policy: Policy | None) -> bool:
        """Whether others changed the file: nobody new sees the old pages, those who map them keep them.

        Or nobody maps it, and it is to have another policy of replacement.

        Raises:
            StoreError: for that, the file does not take what was written.
        """
        same, changed = self._has_policy(cached, policy), cached.fcm.fr().changed()
        if same and not changed:
            return False
        # What was written through mappings is newer than what others wrote before it goes to the file. What the file
        # does not take, nobody would see in a cache with another policy: it stays in this one.
        with contextlib.suppress(StoreError) if changed else contextlib.nullcontext():
            cached.fcm.flush(0, 1 << 40)
        del self._by_key[cached.key]
        if self._unused.pop(cached, cached) is None:
            self._end_soon(cached)
        return True

    # Without it.

    @staticmethod
    def _has_policy(cached: Cached, policy: Policy | None, users: int = 0) -> bool:
        """Whether it has the policy that is asked for; `users`: how many it has that do not mind."""
        if policy is None or (stat := cached.fcm.stat())["policy"] == policy.name.lower():
            return True
        if cached.users > users:
            raise ValueError(
                f"{stat['name']} is in use with the policy {stat['policy']!r}, not {policy.name.lower()!r}: who opens "
                "it first decides for all"
            )
        return False

    def _promise(self, backing: Backing, reserved: int) -> None:
        """Promises what memory of this backing needs: its frames; or room for two pages that come and go, since one
        access may lie across both.
        """
        if backing is Backing.RESERVED:
            self._global_pm.reserve(reserved)
        elif backing is Backing.FILE:
            self._global_pm.promise_file(min(2, self._global_pm.usage()["budget"]))

    @contextlib.contextmanager
    def _promised(self, backing: Backing, reserved: int) -> Iterator[None]:
        """The same; the frames are taken back if what is done with them fails."""
        self._promise(backing, reserved)
        try:
            yield
        except BaseException:
            if reserved:
                self._global_pm.unreserve(reserved)
            raise

    def _retire(self, cached: Cached, policy: Policy | None) -> None:
        """Nobody finds it any more.

        Raises:
            ValueError: somebody has opened it meanwhile, who minds that it is to have this policy.
        """
        with self._lock:
            self._has_policy(cached, policy, users=1)
            if self._by_key.get(cached.key) is cached:
                del self._by_key[cached.key]
            self._unused.pop(cached, None)

    def _flush_retired(self, cached: Cached) -> None:
        """Once more: somebody may have come, written and gone. What the store does not take stays to be found."""
        try:
            cached.fcm.flush(0, 1 << 40)
        except BaseException:
            with self._lock:
                self._by_key.setdefault(cached.key, cached)
            raise

    def _make_or_close(
        self, fr: FileRepresentative, backing: Backing, policy: Policy | None = None
    ) -> tuple[FileCacheManager, int]:
        number = next(self._numbers)
        try:
            fcm = self._make(fr, backing, number, policy)
            self._by_number[number] = fcm
            return fcm, number
        except Exception as error:
            fr.close()
            k42.destroy(fr)
            if isinstance(error, OSError) and not isinstance(error, k42.Error):
                raise OutOfFrames(f"no memory for a file cache: {error.strerror}") from error
            raise  # such as a name that cannot be encoded

    def _end(self, cached: Cached | None) -> None:
        """Closes a cache that nobody uses; if it has snapshots, after they have taken over what it has."""
        while cached is not None:
            node = cached.node
            if node is None:
                return self._close(cached)
            with self._lock:
                self._abandoned.add(cached)
            try:
                source = node.leave()
            except (OutOfFrames, StoreError) as error:
                log.warning("%s stays in memory for its snapshot: %s", cached.fcm.fr().name(), error)
                return None
            with self._lock:
                self._abandoned.discard(cached)
                # One that could not leave before may be able to now.
                after = next((each for each in self._abandoned if each.node is source), None)
            self._close(cached)
            node.clear()
            if cached.origin is not None:
                self.let_go(cached.origin)
            cached = after
        return None

    def _close(self, cached: Cached) -> None:
        fcm = cached.fcm
        if cached.key is not None:
            try:
                fcm.flush(0, 1 << 40)
            except StoreError as error:
                log.error("what was written to %s is lost: %s", fcm.fr().name(), error)
        if fcm.replaceable():
            self._global_pm.detach_fcm(fcm)
        for kind in ("cache", "swap"):
            self._ledger.end(f"{kind}/{cached.number}")
        fcm.close()
        with self._lock:
            self._all.pop(cached, None)
            self._by_number.pop(cached.number, None)
        k42.destroy(fcm)
        if cached.reserved:
            self._global_pm.unreserve(cached.reserved)


@contextlib.contextmanager
def in_use(caches: Caches, cached: Cached | None) -> Iterator[FileCacheManager]:
    """The FCM, for the time of a request.

    Raises:
        ProtocolError: nobody maps it any more.
    """
    if cached is None or not caches.hold(cached):
        raise ProtocolError("no such region")
    try:
        yield cached.fcm
    finally:
        caches.let_go(cached)
