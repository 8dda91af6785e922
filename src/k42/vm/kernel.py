"""The kernel: the server process that owns the page cache and serves the page faults of its clients.

Its main thread answers requests on a Unix socket. One native server thread a CPU reads faults and finishes most of
them; the rest go to Python worker threads, pinned to the same CPUs, which call the objects.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import gc
import itertools
import logging
import os
import resource
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import k42
from k42 import _native
from k42.vm import protocol
from k42.vm.adapt import LOOK, Adapter
from k42.vm.caches import Cached, Caches
from k42.vm.census import take_census
from k42.vm.channels import MOST as MOST_CHANNELS
from k42.vm.channels import Channel
from k42.vm.credentials import forget_credentials
from k42.vm.errors import KernelUnavailable, OutOfFrames, ProtocolError, StoreError
from k42.vm.fault import Fault
from k42.vm.fcm import FileCacheManager, Policy, asked_policy
from k42.vm.fr import FileRepresentative
from k42.vm.hat import Hat, UffdHat
from k42.vm.ledger import Ledger, Left, new_records
from k42.vm.pager import Pager
from k42.vm.pins import Pins
from k42.vm.pm import Backing, GlobalPageManager, PageManager, ProcessPM
from k42.vm.process import Process
from k42.vm.protocol import MAX_GROUP, PAGE, Message, pages_of
from k42.vm.region import Region
from k42.vm.variants import Variants

log = logging.getLogger("k42.kernel")

_WORKERS_PER_CPU = 2  # one may wait for frames that the other frees
_MAX_LISTED = 64  # file caches whose counts `stat` gives
_MAX_CLIENTS = 256  # that `stat` lists
_MAX_NAME = 100  # characters, each up to 6 bytes in JSON
_CHECKED_WITHIN = 5.0  # seconds
_SPAN = 2 << 20  # bytes: what one page of a page table maps
_FEW_SPANS = 1024  # a client may always have page tables for so many
# Of one client. Each is far more than a program needs, and what one may have leaves room for others.
_MOST_REGIONS = 16384
_MOST_WINDOWS = 32768  # Linux allows a process 65,530 mappings unless told otherwise (vm.max_map_count)
_SHARE_OF_DESCRIPTORS = 16  # file caches: a sixteenth of the descriptors, of which each has up to four
_MOST_NEWCOMERS = 256  # connections that have not said hello
_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()
_TIDY = 0.5  # seconds from an end of something to the collection of what it had
_MAX_ANONYMOUS = 1 << 46  # bytes: what fits a user's address space


@dataclass
class _Mapped:
    """A region of a client, and the windows that show it."""

    region: Region
    cached: Cached
    writer: bool  # it can write to the file
    start: int
    size: int
    record: Message  # what the next kernel is to know of it, but for the windows
    pins: Pins
    windows: dict[int, int] = field(default_factory=dict)  # base address to CPU index


@dataclass(eq=False)
class _Newcomer:
    """A connection that has not said what it is."""

    connection: socket.socket
    pid: int
    became: _Client | None = None


@dataclass
class _Client:
    """One connected process."""

    id: int
    connection: socket.socket
    pid: int
    token: str  # by which channels prove that they are its own
    pm: PageManager
    process: Process
    hat: Hat
    homing: bool = True
    sticky: bool = True
    cpus: set[int] = field(default_factory=set)  # indices of the CPUs whose userfaultfd it has handed over
    regions: dict[int, _Mapped] = field(default_factory=dict)
    windows: int = 0
    caches: collections.Counter[Cached] = field(default_factory=collections.Counter)  # that regions show
    reserved: int = 0  # frames promised to anonymous memory that it has made, while it shows it
    room: int = 0  # frames of its limit that are for its other pages, so that a fault on one always ends
    channels: set[Channel] = field(default_factory=set)
    heard: object = None  # the number of its last request, after a take-over

    def cached(self, region: int) -> Cached | None:
        """What the region at this address shows."""
        mapped = self.regions.get(region)
        return mapped.cached if mapped else None

    def pins(self, region: int) -> Pins | None:
        """What is pinned through the region at this address."""
        mapped = self.regions.get(region)
        return mapped.pins if mapped else None

    def show(self, region: int, page: int) -> None:
        """Shows a page where the region at this address does, as at a fault; also where it is marked as failed."""
        mapped = self.regions.get(region)
        at = (page - mapped.record["first"]) * PAGE if mapped else 0
        if mapped is None or not 0 <= at < mapped.size:
            raise ProtocolError("no region shows this page")
        for base, index in list(mapped.windows.items()):
            self.process.handle_fault(Fault(index, base + at, mapped.start + at))


class Kernel:
    """The objects and the threads of one kernel.

    Args:
        socket_path: where to listen.
        budget: bytes of memory for pages; resident pages never exceed it.
        linger: seconds without a client after which it ends; None: never.
        variants: what to make its objects of.
        homing: move spans of a mapping to the CPUs of the threads that fault there.
        sticky: keep a thread on its CPU while it faults.
        swap: write anonymous memory that was made with overcommit to a swap file when frames run out.
        policy: which pages are given back first, of files that nobody asked another policy for.
        client_limit: bytes of memory that the pages of one client may take; None: no limit but the budget.

    Raises:
        KernelUnavailable: another kernel listens there already.
        OutOfFrames: the budget, or the limit, is below one page.
    """

    def __init__(
        self,
        socket_path: Path,
        budget: int,
        linger: float | None,
        variants: Variants | None = None,
        *,
        homing: bool = True,
        sticky: bool = True,
        swap: bool = True,
        policy: Policy = Policy.FIFO,
        client_limit: int | None = None,
    ) -> None:
        for name, size in (("budget", budget), ("limit of a client", client_limit)):
            if size is not None and size < PAGE:
                raise OutOfFrames(f"the {name} must be at least one page of {PAGE} bytes, not {size}")
        self._client_limit = None if client_limit is None else client_limit // PAGE
        self.budget = budget
        self.linger = linger
        self.cpus = sorted(os.sched_getaffinity(0))
        self._path = socket_path
        self._variants = variants or Variants()
        self._adapter = Adapter() if self._variants.adapt else None
        self._next_look = 0.0
        self._tidy_at: float | None = None
        self._global_pm: GlobalPageManager = self._variants.global_pm.create(budget // PAGE)
        self._engine = _native.Engine(self.cpus, sticky, homing)
        # Twice what the budget fills: beyond it most page tables are of pages that have gone.
        self._most_spans = _FEW_SPANS + 2 * budget // _SPAN
        self._newcomers: dict[_Newcomer, None] = {}  # in the order of their coming
        self._clients: dict[int, _Client] = {}  # by id; written by the main thread, read by workers
        self._hints = _native.HintQueue()
        self._policy = policy
        self._pager = Pager(self._global_pm, self._fcms)
        self._ledger = Ledger()
        self._caches = Caches(self._global_pm, self._make_fcm, self._pager.write_soon, self._ledger, swap=swap)
        self._ids = itertools.count(1)
        self._stopping = False
        self._idle_since = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._left = Left(self._ledger)
        self._lock_file, self._listener, held = self._left.sockets(self.cpus) or (*self._listen(), new_records())
        self._engine.keep_records(held)
        self._ledger.tell("kernel", {"cpus": self.cpus}, (self._lock_file, self._listener.fileno(), held))
        os.close(held)

    def _listen(self) -> tuple[int, socket.socket]:
        """The lock that makes this the only kernel of the socket, and the socket."""
        try:
            lock = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise KernelUnavailable(f"cannot listen on {self._path}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise KernelUnavailable(f"another kernel listens on {self._path} already") from error
        self._path.unlink(missing_ok=True)  # of a kernel that was killed: with the lock held nobody uses it
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            mask = os.umask(0o177)
            try:
                listener.bind(str(self._path))
            finally:
                os.umask(mask)
            listener.listen(128)
        except OSError as error:
            listener.close()
            os.close(lock)
            raise KernelUnavailable(f"cannot listen on {self._path}: {error.strerror or error}") from error
        return lock, listener

    # The life of the kernel.

    def run(self) -> None:
        """Serves until `stop`, or until no client has been there for `linger` seconds."""
        self._engine.start()
        self._take_over()
        self._pager.start()
        reader = threading.Thread(target=self._read_ahead, name="k42-read-ahead", daemon=True)
        reader.start()
        workers = [
            threading.Thread(target=self._work, args=(index, cpu), name=f"k42-worker-{cpu}", daemon=True)
            for index, cpu in enumerate(self.cpus)
            for _ in range(_WORKERS_PER_CPU)
        ]
        for worker in workers:
            worker.start()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._drain_wake)
        if self._ledger.supervised:
            self._selector.register(self._ledger, selectors.EVENT_READ, self._without_supervisor)
        log.info("serving on %s, CPUs %s, budget %d bytes, pid %d", self._path, self.cpus, self.budget, os.getpid())
        try:
            while not self._stopping:
                timeout = self._time_to_linger()
                if timeout is not None and timeout <= 0:
                    log.info("no client for %s s: done", self.linger)
                    break
                if self._adapter is not None:
                    timeout = self._adapt(timeout)
                if self._tidy_at is not None:
                    timeout = self._tidy(timeout)
                self._look_at([key.data for key, _ in self._selector.select(timeout)])
        finally:
            self._shut_down(workers)

    def _look_at(self, ready: list[Any]) -> None:
        for each in ready:
            if callable(each):
                each()
            elif not isinstance(each, _Newcomer) or each in self._newcomers:  # else closed just now
                self._serve(each)

    def stop(self) -> None:
        """Ends `run`; may be called from a signal handler or another thread."""
        self._stopping = True
        with contextlib.suppress(BlockingIOError):
            self._wake_write.send(b"x")

    def _adapt(self, timeout: float | None) -> float:
        """Looks, when it is time, which objects should be distributed or shared; how long to wait at most."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK
            assert self._adapter is not None
            self._adapter.look(self._variants.watched(self._global_pm, self._clients.values()))
        wait = max(0.0, self._next_look - time.monotonic())
        return wait if timeout is None else min(wait, timeout)

    def _tidy(self, timeout: float | None) -> float:
        """Collects, when it is time, what has gone; how long to wait at most."""
        assert self._tidy_at is not None
        wait = self._tidy_at - time.monotonic()
        if wait <= 0:
            self._tidy_at = None
            for _ in range(3):  # what one frees may be the last that has what the next can
                gc.collect()
            return 0.0
        return wait if timeout is None else min(wait, timeout)

    def _tidy_soon(self) -> None:
        # What a thread made and another let go last is freed, without a GIL, when its maker next runs Python: workers
        # may wait for long. Until then it has frames and descriptors.
        if self._tidy_at is None and not _GIL:
            self._tidy_at = time.monotonic() + _TIDY

    def _time_to_linger(self) -> float | None:
        if self.linger is None or self._clients:
            return None
        return self._idle_since + self.linger - time.monotonic()

    def _without_supervisor(self) -> None:
        log.warning("the supervisor has ended: ending")
        self._selector.unregister(self._ledger)
        self.stop()

    def _drain_wake(self) -> None:
        self._wake_read.recv(64)

    def _shut_down(self, workers: list[threading.Thread]) -> None:
        self._path.unlink(missing_ok=True)
        self._listener.close()
        fcntl.flock(self._lock_file, fcntl.LOCK_UN)  # a supervisor has it, too
        os.close(self._lock_file)  # freeing a large cache takes a while: the next kernel need not wait for it
        if self._clients:
            log.warning("ending while %d clients are connected: their mappings end in SIGBUS", len(self._clients))
        # Nothing that clients have written is lost: they write no more once their pages are protected, and are not
        # served again.
        for client in self._clients.values():
            for mapped in client.regions.values():
                mapped.region.shutdown()
        for fcm in self._fcms():
            try:
                if fcm.lasting():
                    fcm.flush(0, fcm.native().pages())
            except k42.Destroyed:
                continue  # closed since we looked, and flushed before that
            except StoreError as error:
                log.error("what was written is lost: %s", error)
        for client in list(self._clients.values()):
            self._disconnect(client)
        self._engine.stop()
        for worker in workers:
            worker.join()
        self._hints.close()
        self._pager.stop()
        self._caches.shut_down()
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()
        log.info("ended")

    # Faults that the engine hands up.

    def _work(self, index: int, cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})
        while (handed_up := self._engine.next(index)) is not None:
            self._handle(index, *handed_up)

    def _handle(self, index: int, client_id: int, _: int, address: int, canonical: int, write: bool) -> None:
        # Not within the loop: while that waits, its names would keep a client that has gone.
        client = self._clients.get(client_id)
        if client is None:
            return  # gone, and its faults with it
        try:
            client.process.handle_fault(Fault(index, address, canonical, write))
        except k42.Destroyed:
            # The region or the whole client went while we were at it. Another mapping may be at the address by
            # now: never fail it. Who waits there faults again.
            with contextlib.suppress(k42.Destroyed):
                client.hat.wake(index, address)
        except Exception as error:
            log.exception("a fault of client %d at %#x", client.pid, address)
            with contextlib.suppress(k42.Destroyed):
                client.hat.fail(index, address, f"the kernel failed: {type(error).__name__}: {error}")

    def _read_ahead(self) -> None:
        while (hint := self._hints.next()) is not None:
            self._follow(*hint)

    def _follow(self, number: int, page: int, client_id: int, pages: int) -> None:
        fcm = self._caches.numbered(number)
        client = self._clients.get(client_id)
        if fcm is None or client is None:
            return
        try:
            fcm.hinted(page, pages, client.pm)
        except k42.Destroyed:
            pass
        except Exception:
            log.exception("read-ahead")

    def _fcms(self) -> list[FileCacheManager]:
        return self._caches.fcms()

    # What a kernel left which has died.

    def _take_over(self) -> None:
        """Goes on where it was. The clients find out by what they are sent, and by nothing else."""
        if not self._ledger.deaths:
            return
        left, caches, numbers = self._left, {}, [0]
        for number, record, descriptors, swap in left.caches():
            caches[number] = self._caches.take_over(number, record, descriptors, swap)
        for client_id, record, (connection, *memory) in left.clients():
            numbers.append(client_id)
            newcomer = _Newcomer(socket.socket(fileno=connection), record["pid"])
            client = self._make_client(client_id, newcomer, record["token"], record["limit"], tuple(memory))
            client.homing, client.sticky = record["homing"], record["sticky"]
            self._clients[client_id] = client
            self._selector.register(client.connection, selectors.EVENT_READ, client)
            for base, shown in left.regions(client_id):
                self._take_region_over(client, base, shown, caches[shown["cache"]])
            for index, descriptor in left.userfaultfds(client_id):
                self._add_uffd(client, index, descriptor)
        for cached in caches.values():
            self._settle_pins(cached)
        left.forget_the_rest()
        self._ids = itertools.count(max(numbers) + 1)
        self._caches.let_unused_go()
        self._ledger.serving()
        # Only now, when all is there: faults that the dead kernel had read happen again.
        for client in self._clients.values():
            for mapped in client.regions.values():
                for base in mapped.windows:
                    client.hat.native().wake_everywhere(base, mapped.size)
            with contextlib.suppress(OSError):  # a client that has gone; or one that reads no replies
                resumed = {"resumed": self._ledger.deaths, "pid": os.getpid()}
                protocol.send(client.connection, resumed, flags=socket.MSG_DONTWAIT)
        log.info("took over %d clients and %d file caches", len(self._clients), len(caches))

    def _settle_pins(self, cached: Cached) -> None:
        """Pins that no region knows of were on their way when the kernel died: whoever asked for them asks again."""
        cache = cached.fcm.native()
        known: collections.Counter[int] = collections.Counter()
        for client in self._clients.values():
            for mapped in client.regions.values():
                if mapped.cached is not cached:
                    continue
                pins = mapped.pins.known()
                if pins is None:
                    return
                known.update(pins)
        for page, pinned in cache.pinned():
            if known[page] != pinned:
                cache.set_pins(page, known[page])

    def _take_region_over(self, client: _Client, base: int, record: Message, cached: Cached) -> None:
        size, group = record["size"], record["group"]
        pages = (size // PAGE, record["first"], group, record["around"])
        region = self._variants.region.create(cached.fcm, client.hat, base, *pages, record["tracked"])
        mapped = _Mapped(region, cached, record["writer"], base, size, record, self._pins(client, base, cached))
        mapped.pins.restore(self._left.pins(client.id, base))
        if not client.process.attach_region(base, region):
            raise ProtocolError("the regions that were left overlap")
        for window, index in record["windows"].items():
            self._add_window(client, mapped, index, int(window), follows=record["follows"] and int(window) == base)
        self._caches.use(cached, writer=mapped.writer)
        cached.fcm.native().attach(region.native())
        client.regions[base] = mapped
        client.caches[cached] += 1
        client.reserved += record["reserved"]
        if cached.fcm.replaceable():
            self._make_room(client, group)
            client.room = max(client.room, 2 * group)

    # Connections.

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as failure:
            if failure.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                log.warning("no room for another client: %s", failure)
                time.sleep(0.05)  # it stays in the queue, and wakes us again at once
            return
        pid, uid = protocol.peer(connection)
        if uid != os.getuid():
            log.warning("refused process %d of user %d", pid, uid)
            with contextlib.suppress(OSError):
                error = KernelUnavailable(f"this kernel serves user {os.getuid()} alone")
                protocol.send(connection, protocol.to_reply(error), flags=socket.MSG_DONTWAIT)
            connection.close()
            return
        newcomer = _Newcomer(connection, pid)
        self._newcomers[newcomer] = None
        self._selector.register(connection, selectors.EVENT_READ, newcomer)
        if len(self._newcomers) > _MOST_NEWCOMERS:
            self._disconnect(next(iter(self._newcomers)))  # who has said nothing for longest

    def _welcome(self, newcomer: _Newcomer, limit: int | None) -> _Client | None:
        """The objects of a new client; None, and the connection closed, where there is no room for it."""
        try:
            client = self._make_client(next(self._ids), newcomer, secrets.token_hex(16), limit, None)
        except OSError as failure:
            log.warning("no room for process %d: %s", newcomer.pid, failure)
            return None
        self._clients[client.id] = newcomer.became = client
        self._newcomers.pop(newcomer, None)
        self._selector.modify(client.connection, selectors.EVENT_READ, client)
        return client

    def _make_client(
        self, number: int, newcomer: _Newcomer, token: str, limit: int | None, memory: tuple[int, ...] | None
    ) -> _Client:
        """The objects of a client; with the status page and the commands that a kernel left which has gone, or anew."""
        pm: PageManager = ProcessPM.create(self._global_pm, limit)
        process: Process = self._variants.process.create(pm)
        try:
            hat = UffdHat.create(number, process.region_map(), len(self.cpus), self._most_spans, memory)
        except OSError:
            pm.close()
            for object_ in (process, pm):
                k42.destroy(object_)
            raise
        process.attach_hat(hat)
        native = hat.native()
        native.charge_to(pm.account().number())
        for descriptor in (native.status_descriptor(), native.commands_descriptor()):
            os.fchmod(descriptor, 0o400)  # a client cannot get a writable descriptor by way of /proc
        return _Client(number, newcomer.connection, newcomer.pid, token, pm, process, hat)

    def _become_channel(self, newcomer: _Newcomer, message: Message) -> None:
        """Lets a thread of its own serve a connection that belongs to a client."""
        client = self._clients.get(int(message["client"]))
        if client is None or not secrets.compare_digest(client.token, str(message["token"])):
            raise ProtocolError("a channel of no client")
        if len(client.channels) >= MOST_CHANNELS:
            raise KernelUnavailable(f"a client has {MOST_CHANNELS} channels at most: wait for one to end its request")
        self._selector.unregister(newcomer.connection)
        self._newcomers.pop(newcomer, None)
        channel = Channel(newcomer.connection, client, self._caches, self.check, client.channels.discard)
        client.channels.add(channel)
        channel.start()

    def _serve(self, client: _Client | _Newcomer) -> None:
        """One request of a client; whatever is wrong with it ends in a reply or in a disconnection."""
        message: Message = {}
        descriptors: list[int] = []
        sent: list[int] = []  # ours to close once they are sent
        try:
            try:
                message, descriptors = protocol.receive(client.connection, socket.MSG_DONTWAIT)
                if self._is_repeated(client, message):
                    return
                try:
                    reply, sent = self._answer(client, message, descriptors)
                except OSError as error:  # of a file or a descriptor of ours, not of the connection
                    reply = protocol.to_reply(
                        error if isinstance(error, k42.Error) else StoreError.of(error, str(error.filename or ""))
                    )
            except (k42.Error, ValueError) as error:
                reply = protocol.to_reply(error)
            except (KeyError, TypeError, OverflowError) as error:
                reply = protocol.to_reply(ProtocolError(f"a malformed request: {error!r}"))
            except (EOFError, OSError):
                raise
            except Exception as error:
                log.exception("a request of client %d", client.pid)
                reply = protocol.to_reply(error)
            finally:
                protocol.close_all(descriptors)  # those that nobody took
            if "id" in message:
                reply["id"] = message["id"]
            protocol.send(client.connection, reply, tuple(sent), socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass  # nothing to read after all; or a client that does not read its replies, which harms itself alone
        except (EOFError, OSError):
            self._disconnect(client.became or client if isinstance(client, _Newcomer) else client)
        finally:
            protocol.close_all(sent)

    def _is_repeated(self, client: _Client | _Newcomer, message: Message) -> bool:
        """Whether it is answered already: after a take-over a client may repeat what lay in the socket all the time."""
        if not self._ledger.deaths or isinstance(client, _Newcomer) or "id" not in message:
            return False
        repeated = client.heard is not None and client.heard == message["id"]
        client.heard = message["id"]
        return repeated

    def _answer(
        self, client: _Client | _Newcomer, message: Message, descriptors: list[int]
    ) -> tuple[Message, list[int]]:
        operation = message.get("op")
        if isinstance(client, _Newcomer):
            if operation == "channel":
                self._become_channel(client, message)
                return {"ok": True}, []
            if operation != "hello":
                raise ProtocolError("hello comes first")
            return self._hello(client, message)
        match operation:
            case "hello":
                self._expect_version(message)
                return self._greeting(client)
            case "uffd":
                return self._take_uffd(client, message, descriptors)
            case "map":
                return self._map(client, message, descriptors)
            case "window":
                return self._window(client, message)
            case "unmap":
                return self._unmap(client, message)
            case "stat":
                return {"ok": True, "stat": self.stat()}, []
            case _:
                raise ProtocolError(f"unknown request {operation!r}")

    def _hello(self, newcomer: _Newcomer, message: Message) -> tuple[Message, list[int]]:
        self._expect_version(message)
        homing, sticky = bool(message.get("homing", True)), bool(message.get("sticky", True))
        limit = self._limit(message.get("limit"))
        client = self._welcome(newcomer, limit)
        if client is None:
            raise EOFError
        client.homing, client.sticky = homing, sticky
        native = client.hat.native()
        assert isinstance(native, _native.UffdHat)
        record = {"pid": client.pid, "token": client.token, "homing": homing, "sticky": sticky, "limit": limit}
        memory = (native.status_descriptor(), native.commands_descriptor())
        self._ledger.tell(f"client/{client.id}", record, (client.connection.fileno(), *memory))
        return self._greeting(client)

    def _limit(self, wanted: object) -> int | None:
        """The limit of a client in frames: what it wants, in bytes, but not above that of all clients."""
        if wanted is None:
            return self._client_limit
        if not isinstance(wanted, int) or wanted < PAGE:
            raise ValueError(f"the limit of a client is at least one page of {PAGE} bytes, not {wanted}")
        return min(wanted // PAGE, self.budget // PAGE, self._client_limit or self.budget)

    @staticmethod
    def _expect_version(message: Message) -> None:
        if message["version"] != protocol.VERSION:
            raise KernelUnavailable(
                f"the kernel (process {os.getpid()}, k42 {k42.__version__}) speaks protocol {protocol.VERSION}, this "
                f"client {message['version']}: end that kernel, or connect to another socket"
            )

    def _greeting(self, client: _Client) -> tuple[Message, list[int]]:
        native = client.hat.native()
        assert isinstance(native, _native.UffdHat)
        reply = {
            "ok": True,
            "pid": os.getpid(),
            "cpus": self.cpus,
            "budget": self.budget,
            "client": client.id,
            "token": client.token,
            "supervised": self._ledger.supervised,
        }
        return reply, [_read_only(native.status_descriptor()), _read_only(native.commands_descriptor())]

    def _take_uffd(self, client: _Client, message: Message, descriptors: list[int]) -> tuple[Message, list[int]]:
        index = self._cpu(message)
        [descriptor] = descriptors
        if os.readlink(f"/proc/self/fd/{descriptor}") != "anon_inode:[userfaultfd]":
            raise ProtocolError("that is no userfaultfd")
        os.set_blocking(descriptor, False)  # else its reader, the CPU's fault server, would wait for this client alone
        if index in client.cpus:
            return {"ok": True}, []  # handed over before, by a request that the client did not see answered
        descriptors.clear()  # the HAT's now
        self._ledger.tell(f"uffd/{client.id}/{index}", True, (descriptor,))
        self._add_uffd(client, index, descriptor)
        return {"ok": True}, []

    def _add_uffd(self, client: _Client, index: int, descriptor: int) -> None:
        native = client.hat.native()
        assert isinstance(native, _native.UffdHat)
        if not native.attach_uffd(index, descriptor):
            os.close(descriptor)
            raise ProtocolError("this CPU has a userfaultfd already")
        client.cpus.add(index)
        self._engine.add(native, index, client.pid, client.sticky, client.homing)

    def _cpu(self, message: Message) -> int:
        index = message["cpu"]
        if not isinstance(index, int) or not 0 <= index < len(self.cpus):
            raise ProtocolError(f"no CPU {index!r}")
        return index

    # Mappings.

    def _map(self, client: _Client, message: Message, descriptors: list[int]) -> tuple[Message, list[int]]:
        index = self._cpu(message)
        base, size, first, group = (int(message[key]) for key in ("base", "size", "first", "group"))
        if index not in client.cpus:
            raise ProtocolError("this CPU has no userfaultfd")
        if base % PAGE or size <= 0 or size % PAGE or base + size > 1 << 57 or first < 0:
            raise ProtocolError("a mapping is whole pages")
        if not 1 <= group <= MAX_GROUP or group & (group - 1):
            raise ValueError(f"page_size must be a power of two from {PAGE} to {MAX_GROUP * PAGE} bytes")
        around = int(message.get("around", 0))
        if not ("around" in message) <= around <= MAX_GROUP or around & (around - 1):
            raise ValueError(f"fault_around must be a power of two from {PAGE} to {MAX_GROUP * PAGE} bytes")
        if (mapped := self._made_before(client, base, message)) is not None:
            return {"ok": True, "region": base}, [self._memfd_for(mapped)]
        self._expect_few(client)
        cached, writer = self._find(client, message, descriptors, group)
        fcm = cached.fcm
        # Of memory that is never written back nobody needs to know whether it was written to.
        tracked = writer or (cached.key is None and (fcm.replaceable() or cached.node is not None))
        try:
            region = self._variants.region.create(fcm, client.hat, base, size // PAGE, first, group, around, tracked)
        except BaseException:
            self._caches.let_go(cached, writer=writer)
            raise
        follows = message.get("mode") != "c"  # private copies are in the window alone: it is never mapped anew
        record: Message = {"cache": cached.number, "size": size, "first": first, "group": group, "around": around}
        record |= {"request": message.get("id")}
        record |= {"tracked": tracked, "writer": writer, "follows": follows}
        record |= {"reserved": cached.reserved if cached.key is None else 0}
        mapped = _Mapped(region, cached, writer, base, size, record, self._pins(client, base, cached))
        client.caches[cached] += 1
        client.reserved += record["reserved"]
        try:
            if not client.process.attach_region(base, region):
                self._forget(client, base, size)
                if not client.process.attach_region(base, region):
                    raise ProtocolError("the addresses overlap another mapping")
            self._add_window(client, mapped, index, base, follows=follows)
            fcm.native().attach(region.native())
            sent = self._memfd_for(mapped)
            self._tell(client, mapped)
        except BaseException:
            self._destroy(client, mapped)
            raise
        client.regions[base] = mapped
        return {"ok": True, "region": base}, [sent]

    def _expect_few(self, client: _Client) -> None:
        """Keeps a client from taking what others need, too."""
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if len(client.regions) >= _MOST_REGIONS:
            raise KernelUnavailable(f"a client has {_MOST_REGIONS} mappings at most: close some")
        self._expect_few_windows(client)
        if len(client.caches) >= (most := descriptors // _SHARE_OF_DESCRIPTORS):
            raise KernelUnavailable(
                f"a client has mappings of {most} file caches at most, a sixteenth of the descriptors that the kernel "
                "may have: close some, or start it with a larger `ulimit -n`"
            )

    @staticmethod
    def _expect_few_windows(client: _Client) -> None:
        if client.windows >= _MOST_WINDOWS:
            raise KernelUnavailable(f"a client has {_MOST_WINDOWS} windows at most: close some mappings")

    def _made_before(self, client: _Client, base: int, message: Message) -> _Mapped | None:
        """The region that this very request has made: by a kernel that died before the client had its answer."""
        mapped = client.regions.get(base)
        known = self._ledger.deaths and mapped is not None and "id" in message
        return mapped if known and mapped is not None and mapped.record["request"] == message["id"] else None

    def _pins(self, client: _Client, base: int, cached: Cached) -> Pins:
        return Pins(cached.fcm, lambda record: self._ledger.tell(f"pins/{client.id}/{base}", record))

    def _tell(self, client: _Client, mapped: _Mapped) -> None:
        """Has the next kernel know of a region and its windows."""
        self._ledger.tell(f"region/{client.id}/{mapped.start}", mapped.record | {"windows": mapped.windows})

    def _find(self, client: _Client, message: Message, descriptors: list[int], group: int) -> tuple[Cached, bool]:
        """What a request asks to map, with one user more, and whether it may write to a file through it."""
        mode = str(message.get("mode", "r"))
        if mode not in ("r", "r+", "c"):
            raise ProtocolError(f"no mode {mode!r}")
        writer = mode == "r+"
        match message["kind"]:
            case "anonymous":
                self._frames_for(client, group)
                size = int(message["size"])
                if size > _MAX_ANONYMOUS:
                    raise ValueError(f"anonymous memory of {size} bytes does not fit an address space")
                if message["overcommit"]:
                    self._keep_room(client, group)
                else:
                    self._expect_within_limit(client, pages_of(size))
                return self._caches.anonymous(size, overcommit=bool(message["overcommit"])), False
            case "file":
                [descriptor] = descriptors
                self._make_room(client, group)
                self._keep_room(client, group)
                policy = asked_policy(message)
                cached, taken = self._caches.file(descriptor, str(message["name"]), writer=writer, policy=policy)
                if taken:
                    descriptors.clear()
                return cached, writer
            case "url":
                self._make_room(client, group)
                self._keep_room(client, group)
                options = message["options"]
                if not isinstance(options, dict):
                    raise ProtocolError("options are a dictionary")
                return self._caches.opened_url(str(message["url"]), options, writer=writer), writer
            case "snapshot":
                of = client.regions[int(message["of"])].cached
                if self._caches.swap:
                    self._make_room(client, group)
                return self._caches.snapshot(of, str(message["name"]), self._stopped), False
            case kind:
                raise ProtocolError(f"no kind {kind!r}")

    @contextlib.contextmanager
    def _stopped(self, cached: Cached) -> Iterator[None]:
        """Inside, no fault is in any region that shows this cache, and writes to clean pages are faults."""
        regions = [
            mapped.region.native()
            for client in self._clients.values()
            for mapped in client.regions.values()
            if mapped.cached is cached
        ]
        stopped: list[_native.Region] = []
        try:
            for region in regions:
                if region.stop():
                    stopped.append(region)
                    if cached.key is None:
                        region.track()
            yield
        finally:
            for region in stopped:
                region.restart()

    def _make_room(self, client: _Client, group: int) -> None:
        # Twice, since one access may lie across two pages, and ends only when both are there.
        frames = min(2 * max(group, self._global_pm.cluster()), self._frames_for(client, group))
        self._global_pm.promise_file(frames)

    def _keep_room(self, client: _Client, group: int) -> None:
        """Has a limited client keep frames for pages that come and go, of this size."""
        frames = 2 * group
        limit = client.pm.account().limit()
        if limit is None or frames <= client.room:
            return
        if client.reserved and client.reserved + frames > limit:
            raise OutOfFrames(
                f"of this client's limit of {limit * PAGE} bytes {client.reserved * PAGE} are promised to anonymous "
                f"memory, and {frames * PAGE} are needed for pages that come and go: close some, or start the kernel "
                "with a larger `--client-limit`"
            )
        client.room = frames

    def _frames_for(self, client: _Client, group: int) -> int:
        """The budget in frames, if at least two pages of this size fit, and the limit; of 4 KiB one is enough."""
        frames = self.budget // PAGE
        limit = client.pm.account().limit()
        for what, most in (("the kernel's budget", frames), ("this client's limit", limit)):
            if most is not None and group > 1 and 2 * group > most:
                raise OutOfFrames(
                    f"two pages of {group * PAGE} bytes, which one access may need, are more than {what} of "
                    f"{most * PAGE} bytes: ask for a smaller page_size, or start the kernel with a larger "
                    f"{'`--client-limit`' if most is limit else '`--budget`'}"
                )
        return frames

    def _expect_within_limit(self, client: _Client, pages: int) -> None:
        """Anonymous memory that is promised stays as long as it is mapped: what does not fit is an error now."""
        limit = client.pm.account().limit()
        if limit is not None and client.reserved + client.room + pages > limit:
            raise OutOfFrames(
                f"anonymous memory of {pages * PAGE} bytes does not fit this client's limit of {limit * PAGE} bytes, "
                f"of which {client.reserved * PAGE} are promised already and {client.room * PAGE} kept for pages that "
                "come and go: start the kernel with a larger `--client-limit`, or ask for overcommit=True"
            )

    def _make_fcm(
        self,
        fr: FileRepresentative,
        backing: Backing,
        number: int,
        policy: Policy | None = None,
        left: tuple[int, int, int] | None = None,
    ) -> FileCacheManager:
        chosen = self._policy if policy is None else policy
        return self._variants.fcm.create(
            self._global_pm, fr, backing, len(self.cpus), chosen, self._hints, number, left
        )

    @staticmethod
    def _memfd_for(mapped: _Mapped) -> int:
        """The memfd for a client: readers get one that Linux itself lets nobody write through."""
        memfd = mapped.cached.fcm.memfd()
        return os.dup(memfd) if mapped.writer or mapped.cached.key is None else _read_only(memfd)

    def _window(self, client: _Client, message: Message) -> tuple[Message, list[int]]:
        index = self._cpu(message)
        mapped = client.regions[int(message["region"])]
        base = int(message["base"])
        if self._ledger.deaths and mapped.windows.get(base) == index:
            return {"ok": True}, []  # of a request that a kernel before did not live to answer
        self._expect_few_windows(client)
        if index not in client.cpus or base in mapped.windows:
            raise ProtocolError("this CPU has no userfaultfd, or the window is there already")
        if base % PAGE or (base < mapped.start + mapped.size and mapped.start < base + mapped.size):
            raise ProtocolError("a window is whole pages, and beside the region's own addresses")
        self._add_window(client, mapped, index, base, follows=False)
        self._tell(client, mapped)
        return {"ok": True}, []

    def _add_window(self, client: _Client, mapped: _Mapped, index: int, base: int, *, follows: bool) -> None:
        if not client.hat.add_window(index, base, mapped.size, mapped.start, follows=follows):
            self._forget(client, base, mapped.size)
            if not client.hat.add_window(index, base, mapped.size, mapped.start, follows=follows):
                raise ProtocolError("the window overlaps another")
        mapped.windows[base] = index
        client.windows += 1

    def _remove_window(self, client: _Client, mapped: _Mapped, base: int) -> None:
        del mapped.windows[base]
        client.windows -= 1
        client.hat.remove_window(base, mapped.size)

    def _forget(self, client: _Client, base: int, size: int) -> None:
        """Ends what the client had at these addresses: it has gone, since the client shows something new there.

        (As with ``mmap`` at a fixed address. Ctrl-C can keep a client from telling that a mapping has gone.)
        """
        for start, mapped in list(client.regions.items()):
            for window in [window for window in mapped.windows if window < base + size and base < window + mapped.size]:
                self._remove_window(client, mapped, window)
                self._tell(client, mapped)
            if not mapped.windows or (start < base + size and base < start + mapped.size):
                del client.regions[start]
                self._destroy(client, mapped)

    def _unmap(self, client: _Client, message: Message) -> tuple[Message, list[int]]:
        start, base = int(message["region"]), int(message["base"])
        mapped = client.regions.get(start)
        if mapped is None or base not in mapped.windows:
            return {"ok": True}, []  # of a request that the client did not see answered
        self._remove_window(client, mapped, base)
        if not mapped.windows:
            del client.regions[start]
            self._destroy(client, mapped)
        else:
            self._tell(client, mapped)
            # The client may use the addresses again at once: whoever is at a fault of that window ends first.
            self._engine.synchronize()
            region = mapped.region.native()
            region.stop()
            region.restart()
        return {"ok": True}, []

    def _destroy(self, client: _Client, mapped: _Mapped) -> None:
        """Ends a region: no fault is inside, none can come, then all that it had goes."""
        self._ledger.end(f"region/{client.id}/{mapped.start}")
        mapped.pins.close()
        self._ledger.end(f"pins/{client.id}/{mapped.start}")
        client.reserved -= mapped.record["reserved"]
        mapped.region.shutdown()
        for base in list(mapped.windows):
            self._remove_window(client, mapped, base)
        client.process.detach_region(mapped.start)
        self._engine.synchronize()
        mapped.cached.fcm.native().detach(mapped.region.native())
        self._caches.let_go(mapped.cached, writer=mapped.writer)
        client.caches[mapped.cached] -= 1
        if client.caches[mapped.cached] <= 0:
            del client.caches[mapped.cached]
        k42.destroy(mapped.region)
        self._tidy_soon()

    def _disconnect(self, client: _Client | _Newcomer) -> None:
        """A client is gone, by its will or not: frees all that it had."""
        if isinstance(client, _Newcomer) and client not in self._newcomers:
            return  # a channel by now, whose thread may have closed it already
        self._selector.unregister(client.connection)
        with contextlib.suppress(OSError):
            client.connection.shutdown(socket.SHUT_RDWR)  # of the supervisor's duplicate, too
        client.connection.close()
        if isinstance(client, _Newcomer):
            self._newcomers.pop(client, None)
            return
        for channel in list(client.channels):
            channel.close()
        del self._clients[client.id]
        self._ledger.end(f"client/{client.id}")
        for index in client.cpus:
            self._ledger.end(f"uffd/{client.id}/{index}")
        native = client.hat.native()
        self._engine.remove(native)
        regions = list(client.regions.values())
        client.regions.clear()
        for mapped in regions:
            self._destroy(client, mapped)
        client.pm.close()
        for object_ in (client.process, client.pm, client.hat):
            k42.destroy(object_)
        self._tidy_soon()
        self._idle_since = time.monotonic()

    def check(self) -> tuple[list[str], list[str]]:
        """What holds of frames and pages at any time: what was found to hold, and what was not. For any thread.

        Frames and accounts are looked at while nobody takes or gives a frame. Where a frame may be under way between
        its taking and its page, or a page closed meanwhile, it is looked again for a while.
        """
        deadline = time.monotonic() + _CHECKED_WITHIN
        while True:
            good, bad = take_census(self._global_pm, self._fcms())
            if not bad or time.monotonic() > deadline:
                return good, bad
            time.sleep(0.01)

    def stat(self) -> dict[str, Any]:
        """Counts of everything: budget, frames by kind, faults, clients, file caches."""
        files = []
        for fcm in itertools.islice(self._fcms(), _MAX_LISTED):
            with contextlib.suppress(k42.Destroyed):  # closed since we looked
                files.append(_short(fcm.stat()))
        return {
            "pid": os.getpid(),
            "supervised": self._ledger.supervised,
            "deaths": self._ledger.deaths,
            "version": k42.__version__,
            "budget": self.budget,
            "frames": self._global_pm.usage(),
            "engine": self._engine.counts(),
            # 200 bytes each: with the files they fit a message.
            "clients": [
                {"pid": c.pid, "regions": len(c.regions), **c.pm.stat()}
                for c in itertools.islice(self._clients.values(), _MAX_CLIENTS)
            ],
            "files": files,
        }


def _read_only(memfd: int) -> int:
    """Another descriptor of a memfd, through which nobody can write."""
    return os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY | os.O_CLOEXEC)


def _short(counts: dict[str, int | str]) -> dict[str, int | str]:
    """With only the end of a long name: the reply must fit a message."""
    return counts | {"name": str(counts["name"])[-_MAX_NAME:]}


def default_budget() -> int:
    """A quarter of the memory that this machine, or this control group, has; in bytes."""
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no limit set: "max"; no control groups: no file
        limit = min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return limit // 4


def serve(
    socket: str | None = None,
    budget: int | None = None,
    linger: float | None = None,
    *,
    all_cpus: bool = False,
    objects: str = "default",
    adapt: bool = False,
    homing: bool = True,
    sticky: bool = True,
    swap: bool = True,
    policy: str = "fifo",
    client_limit: int | None = None,
) -> None:
    """Runs a kernel in this process until SIGINT, SIGTERM, or the end of `linger`.

    Args:
        socket: where to listen; None: the user's own place (see `k42.vm.protocol.default_socket`).
        budget: bytes of memory for pages; None: a quarter of the machine's.
        linger: seconds without a client after which to end; None: never.
        all_cpus: serve every CPU of the machine, not only those that this process was started on.
        objects: what to make its objects of; see `Variants.named`.
        adapt: swap objects by who uses them; see `k42.vm.adapt`.
        homing: move spans of 2 MiB of a mapping to the CPUs of the threads that fault there.
        sticky: keep a thread on its CPU while it faults.
        swap: write anonymous memory that was made with overcommit to a swap file when frames run out.
        policy: which pages are given back first: ``fifo``, ``clock`` or ``s3fifo``.
        client_limit: bytes of memory that the pages of one client may take; None: no limit but the budget.

    Raises:
        ValueError: there are no such objects, or no such policy.
        KernelUnavailable: another kernel listens there already.
        OutOfFrames: the budget, or the limit, is below one page.
    """
    variants = Variants.named(objects, adapt=adapt)
    chosen = Policy.named(policy)
    forget_credentials()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # two descriptors a file, one a client and CPU
    if all_cpus:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # Linux leaves out what is not ours to use
    path = Path(socket) if socket else protocol.default_socket()
    endings = {signal.SIGINT, signal.SIGTERM}
    # Between the making of the socket and the handlers a signal would leave it behind: it waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, endings)
    try:
        budget = default_budget() if budget is None else budget
        kernel = Kernel(
            path,
            budget,
            linger,
            variants,
            homing=homing,
            sticky=sticky,
            swap=swap,
            policy=chosen,
            client_limit=client_limit,
        )

        def on_signal(number: int, _: object) -> None:
            log.info("%s: ending", signal.Signals(number).name)
            kernel.stop()

        for number in endings:
            signal.signal(number, on_signal)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, endings)
    gc.freeze()  # what is there now stays: collections need not go through it
    kernel.run()
