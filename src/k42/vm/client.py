"""A client: this process's connection to a kernel, through which it maps files and anonymous memory."""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import os
import re
import socket
import stat as stat_module
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from collections.abc import Mapping as Mapping_
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import k42
from k42 import _native
from k42.vm import protocol
from k42.vm.channel import Channels
from k42.vm.credentials import with_credentials
from k42.vm.errors import ForkWarning, KernelUnavailable, ProtocolError, Unsupported, UserModeOnlyWarning
from k42.vm.launch import launch
from k42.vm.mapping import Mapping, Mode, Shown
from k42.vm.protocol import MAX_GROUP, PAGE, Message, pages_of

_LINGER = 3.0  # seconds that an embedded kernel waits for another client
_MAX_HOMES = 64  # CPUs that get a userfaultfd, two descriptors, before a thread of theirs maps anything
_TRIES = 3  # a kernel found may be about to end
_FORK_WAIT = 5.0  # seconds that a fork waits for other threads to end what they do to mappings

OpenMode = Literal["r", "r+", "w+", "c"]
Fork = Literal["reattach"]
Policy = Literal["fifo", "clock", "s3fifo"]
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z][A-Za-z0-9+.-]*)*://")

_CURES = """any one of these gives it:
  - run as root, or with the capability CAP_SYS_PTRACE
  - sysctl vm.unprivileged_userfaultfd=1
  - read and write access to /dev/userfaultfd (chown or chmod, as root)
  - in a container: a seccomp profile that allows userfaultfd (Docker: --security-opt seccomp=unconfined, or
    --cap-add SYS_PTRACE together with one of the above)"""


def _open_userfaultfd(*, quiet: bool) -> int:
    """A userfaultfd in the best mode that this process may have; says when that is not the full one, unless `quiet`."""
    try:
        return _native.open_userfaultfd(False)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            raise Unsupported("k42.vm needs Linux 6.6 or newer (userfaultfd with MINOR_SHMEM and POISON)") from error
        if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOSYS):
            raise
    try:
        descriptor = _native.open_userfaultfd(True)
    except OSError as error:
        raise Unsupported(f"no permission for userfaultfd ({error.strerror}); {_CURES}") from error
    if quiet:
        return descriptor
    warnings.warn(
        "userfaultfd is allowed in user mode only: touching a mapping works, but system calls that are given its "
        f"memory (read, write, sendfile …) can fail with EFAULT. For the full mode, {_CURES}",
        UserModeOnlyWarning,
        stacklevel=2,
    )
    return descriptor


class Client:
    """A connection to a kernel. Thread-safe. Closing it closes its mappings.

    Made by `connect`.
    """

    def __init__(
        self,
        connection: socket.socket,
        grace: float,
        *,
        homing: bool = True,
        sticky: bool = True,
        fork: Fork | None = None,
        limit: int | None = None,
    ) -> None:
        # Protects the connection: one request and its reply at a time. Taken by finalizers only if it is free.
        self._lock = threading.Lock()
        self._grace = grace
        self._closing = False  # nothing new is mapped
        self._closed = False
        self._number = 0  # of the last request
        self.lost = False
        """Whether the kernel was found to be gone: mappings that need it end in SIGBUS, requests fail."""
        self._homing = homing
        self._sticky = sticky
        self._fork = fork
        self._limit = limit
        self._uffds: dict[int, int] = {}  # CPU index to descriptor
        self._handed_over: set[int] = set()  # CPU indices whose userfaultfd the kernel has
        self._garbage: collections.deque[tuple[int, int]] = collections.deque()  # windows dropped without close()
        self._mappings: weakref.WeakSet[Mapping] = weakref.WeakSet()  # added to with the lock held
        self._begin(connection)
        _clients.add(self)

    def _begin(self, connection: socket.socket) -> None:
        """Makes itself known to the kernel at the other end; closes the connection where that is none of ours."""
        self._connection = connection
        _, uid = protocol.peer(connection)
        if uid != os.getuid():
            connection.close()
            raise KernelUnavailable(f"the kernel there belongs to user {uid}, not to you")
        try:
            hello: Message = {"op": "hello", "version": protocol.VERSION}
            hello |= {"homing": self._homing, "sticky": self._sticky, "limit": self._limit}
            reply, descriptors = self._exchange(hello, ())
            if len(descriptors) != 2 or not {"pid", "budget", "cpus"} <= reply.keys():
                protocol.close_all(descriptors)
                raise ProtocolError("what listens there is no kernel of k42")
        except BaseException:
            connection.close()
            raise
        self.kernel_pid: int = reply["pid"]
        """The kernel's process."""
        self.budget: int = reply["budget"]
        """The kernel's budget in bytes."""
        self._cpus: list[int] = reply["cpus"]
        greeting = {"op": "channel", "client": reply.get("client"), "token": reply.get("token")}
        supervised = bool(reply.get("supervised"))
        self._path = Path(os.path.abspath(connection.getpeername()))
        self._channels = Channels(str(self._path), greeting, supervised)
        status, commands = descriptors
        try:
            self._status = _native.map_status(status)
            self._guard = _native.Guard(connection.fileno(), int(self._grace * 1000))
            self._guard.obey(commands)
        finally:
            protocol.close_all(descriptors)

    # Requests.

    def _exchange(self, message: Message, descriptors: tuple[int, ...]) -> tuple[Message, list[int]]:
        """A request and its reply; call with the lock held."""
        try:
            self._number += 1
            protocol.send(self._connection, message | {"id": self._number}, descriptors)
            while True:
                reply, received = protocol.receive(self._connection)
                if "resumed" in reply:
                    # A new kernel has taken over. What the old one answered came before this; so it did not answer
                    # this request, or the new one has it already and knows by its number that it is the same.
                    self.kernel_pid = reply["pid"]
                    protocol.send(self._connection, message | {"id": self._number}, descriptors)
                    continue
                if reply.get("id", self._number) == self._number:
                    break
                protocol.close_all(received)  # the answer to a request that Ctrl-C took us away from
        except (EOFError, OSError) as error:
            self.lost = True
            raise KernelUnavailable(
                f"the kernel has gone away (process {getattr(self, 'kernel_pid', '?')}): its mappings end in SIGBUS; "
                "open them again with a new client"
            ) from error
        if "error" in reply:
            protocol.close_all(received)
            raise protocol.to_error(reply)
        return reply, received

    def _request(self, message: Message, descriptors: tuple[int, ...] = ()) -> tuple[Message, list[int]]:
        with self._lock:
            if self._closed or (self._closing and message["op"] != "unmap"):
                raise KernelUnavailable("this client is closed")
            self._collect()
            answer = self._exchange(message, descriptors)
        self._collect_if_free()  # what was dropped meanwhile
        return answer

    def _collect(self) -> None:
        """Tells the kernel of windows that were dropped; call with the lock held."""
        while self._garbage:
            region, base = self._garbage[0]  # stays there until it is done: doing it twice does no harm
            with contextlib.suppress(k42.Error):  # not what our caller asked for; a lost kernel shows at once anyway
                self._exchange({"op": "unmap", "region": region, "base": base}, ())
            self._garbage.popleft()

    def _collect_if_free(self) -> None:
        # Not acquire() without waiting: Ctrl-C right after it would leave the lock held for ever. `with` cannot.
        if self._garbage and not self._lock.locked():
            with self._lock:
                if not self._closed:
                    self._collect()

    @contextlib.contextmanager
    def _taken_back(self, region: int, base: int) -> Iterator[None]:
        """If Ctrl-C takes us out of the block, the kernel is told to forget the window, whether it knew it or not."""
        try:
            yield
        except Exception:
            raise
        except BaseException:
            self._garbage.append((region, base))
            raise

    def _drop(self, region: int, base: int) -> None:
        """A window was garbage-collected: by a collector that may run anywhere, even in a request of this thread."""
        self._garbage.append((region, base))
        self._collect_if_free()

    def _cpu_index(self) -> int:
        """The kernel's index of the CPU that this thread runs on; with a userfaultfd there."""
        number = _native.current_cpu()
        index = self._cpus.index(number) if number in self._cpus else 0
        with self._lock:
            if self._closing:
                raise KernelUnavailable("this client is closed")
            self._serve_cpu(index)
            # The spans of the mapping may come to be served on any CPU where threads of ours run.
            for other in range(min(len(self._cpus), _MAX_HOMES)) if self._homing else ():
                with contextlib.suppress(OSError):  # too many descriptors: then those are served elsewhere
                    self._serve_cpu(other)
        return index

    def _serve_cpu(self, index: int) -> None:
        """Has a userfaultfd for this CPU that the kernel serves; call with the lock held."""
        if index not in self._uffds:
            self._uffds[index] = _open_userfaultfd(quiet=bool(self._uffds))
            self._guard.watch(index, self._uffds[index])
        if index not in self._handed_over:  # again, where Ctrl-C kept us from knowing
            self._exchange({"op": "uffd", "cpu": index}, (self._uffds[index],))
            self._handed_over.add(index)

    # What users call.

    def open(
        self,
        path: str | os.PathLike[str],
        mode: OpenMode = "r",
        offset: int = 0,
        length: int | None = None,
        page_size: int | None = None,
        storage_options: Mapping_[str, Any] | None = None,
        fault_around: int | None = None,
        policy: Policy | None = None,
    ) -> Mapping:
        """Maps a file or a URL: real memory, whose page faults the kernel serves from its one page cache.

        Args:
            path: a regular file; or a URL (``scheme://…``), which the kernel reads through fsspec.
            mode: ``"r"``: for reading. ``"r+"``: for reading and writing what is there; where offset and length go past
                its end the file grows. ``"w+"``: the same on a new file of `offset` + `length` zeros, which takes the
                place of what the file had. ``"c"``: writable, but what is written stays private to the mapping, in
                memory of this process that the kernel's budget does not count.
            offset: bytes; need not be a multiple of the page size.
            length: bytes; None or 0: to the end of the file.
            page_size: bytes that one fault brings in, a power of two from 4096 to 2 MiB; None: 4096.
            storage_options: for a URL, what fsspec's file system is made with (credentials, endpoints …); for S3 this
                process's own environment (``AWS_…``) says what they do not.
            fault_around: bytes, a power of two from 4096 to 2 MiB: of so many around a fault, those that are in the
                page cache are mapped with it. Less where accesses are few and far between: a page that is mapped looks
                used. None: 64 KiB, and up to 2 MiB where accesses go on where the last ones ended.
            policy: which of its pages are given back first when memory runs out: ``"fifo"`` (with a second chance),
                ``"clock"`` or ``"s3fifo"``. Who opens it first decides for all. None: as it is, or as the kernel was
                started with.

        Returns:
            A mapping of exactly these bytes.

        Raises:
            FileNotFoundError, IsADirectoryError, PermissionError: as ``open`` raises them.
            ValueError: not a regular file, an empty file, an offset or length outside it, a bad mode, page size or
                fault_around; mode ``"w+"`` without a length; storage_options without a URL; no such policy, or
                another than the file is in use with.
            StoreError: the URL cannot be read; or a store that does not grow.
            Unsupported: a store that cannot be written to, in mode ``"r+"``; a URL in mode ``"w+"``.
            OutOfFrames: a page of this size does not fit the kernel's budget.
            KernelUnavailable: the kernel is gone.
        """
        if mode not in get_args(OpenMode):
            raise ValueError(f"mode must be 'r', 'r+', 'w+' or 'c', not {mode!r}")
        group, wishes = _group(page_size), _around(fault_around)
        if policy is not None:
            wishes["policy"] = policy
        if offset < 0 or (length is not None and length < 0):
            raise ValueError("offset and length must not be negative")
        if mode == "w+" and not length:
            raise ValueError("mode 'w+' needs a length: it makes a file of offset + length bytes")
        if is_url(path):
            return self._open_url(os.fspath(path), mode, offset, length, group, wishes, dict(storage_options or {}))
        if storage_options:
            raise ValueError(f"storage_options are for URLs, and {os.fspath(path)!r} is a path")
        return self._open_file(path, mode, offset, length, group, wishes)

    def _open_file(
        self, path: str | os.PathLike[str], mode: OpenMode, offset: int, length: int | None, group: int, wishes: Message
    ) -> Mapping:
        flags = {"r": os.O_RDONLY, "c": os.O_RDONLY, "r+": os.O_RDWR, "w+": os.O_RDWR | os.O_CREAT}[mode]
        # Non-blocking, lest a FIFO hold us until somebody writes.
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        try:
            status = os.fstat(descriptor)
            if stat_module.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
            if not stat_module.S_ISREG(status.st_mode):
                raise ValueError(f"only regular files can be mapped, and {os.fspath(path)!r} is none")
            size = status.st_size
            if mode == "w+":
                assert length is not None
                os.ftruncate(descriptor, 0)
                os.ftruncate(descriptor, size := offset + length)
            # Without the flag from here on: it belongs to the open file, which the kernel will use.
            fcntl.fcntl(descriptor, fcntl.F_SETFL, 0)
            request = {"kind": "file", "name": os.path.abspath(path)} | wishes
            shown: Mode = "r+" if mode == "w+" else mode
            if shown == "r+" and length and offset + length > size:
                self._grow(request, descriptor, size, offset + length)
                size = offset + length
            length = _length(offset, length, size)
            given, descriptor = descriptor, -1  # the mapping's now
            return self._map(request, given, offset, length, group, shown)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _grow(self, request: Message, descriptor: int, size: int, wanted: int) -> None:
        """Makes a file larger: by way of the kernel, which has its pages and would think it changed by others."""
        if size == 0:
            os.ftruncate(descriptor, wanted)  # nobody maps an empty file
            return
        with self._map(dict(request), os.dup(descriptor), 0, 1, 1, "r+") as mapping:
            mapping.resize(wanted)

    def _open_url(
        self,
        url: str,
        mode: OpenMode,
        offset: int,
        length: int | None,
        group: int,
        wishes: Message,
        options: dict[str, Any],
    ) -> Mapping:
        if mode == "w+":
            raise Unsupported(f"mode 'w+' makes files, not URLs: write {url} first, then open it")
        options = with_credentials(url, options)
        request = {"kind": "url", "url": url, "options": options} | wishes
        size = int(self._long_request({"op": "url_size", "mode": mode} | request)["size"])
        return self._map(request | {"name": url}, -1, offset, _length(offset, length, size), group, mode)

    def anonymous(
        self, nbytes: int, page_size: int | None = None, overcommit: bool = False, fault_around: int | None = None
    ) -> Mapping:
        """Maps anonymous memory: zeros until written.

        Args:
            nbytes: its size.
            page_size: bytes that one fault brings in, a power of two from 4096 to 2 MiB; None: 4096.
            overcommit: do not reserve the memory in the kernel's budget now. It costs next to nothing until
                touched; a touch that finds no frame ends in SIGBUS.
            fault_around: see `open`.

        Returns:
            A writable mapping.

        Raises:
            ValueError: a size below one byte, a bad page size or fault_around.
            OutOfFrames: it does not fit the kernel's budget.
            KernelUnavailable: the kernel is gone.
        """
        if nbytes < 1:
            raise ValueError(f"anonymous memory has at least one byte, not {nbytes}")
        request = {"kind": "anonymous", "overcommit": bool(overcommit)} | _around(fault_around)
        return self._map(request, -1, 0, nbytes, _group(page_size), "anonymous")

    def _map(self, request: Message, file: int, offset: int, length: int, group: int, mode: Mode) -> Mapping:
        """Maps what the request says.

        Args:
            request: kind, name and what belongs to the kind.
            file: the file's descriptor, which the mapping takes over, whatever happens; -1: none.
            offset, length: of the mapping in the store, in bytes.
            group: pages of 4 KiB in a page of the region.
            mode: how it is shown.
        """
        first = offset // PAGE
        delta = offset - first * PAGE
        try:
            size = pages_of(delta + length) * PAGE
            index = self._cpu_index()
            mapping = Mapping(size)
            mapping._request = dict(request)
            if mode != "anonymous":
                request["mode"] = mode
            request |= {"op": "map", "cpu": index, "base": mapping.base, "size": size, "first": first, "group": group}
            with self._taken_back(mapping.base, mapping.base):
                reply, [memfd] = self._request(request, () if file < 0 else (file,))
                mapping._attach(self, reply["region"], memfd, index, group * PAGE)
            mapping._file, file = file, -1
        finally:
            if file >= 0:
                os.close(file)
        name = os.fsencode(request.get("name", "anonymous memory")).decode(errors="replace")
        with self._lock:
            if not self._closing:
                self._mappings.add(mapping)
                mapping._show(first * PAGE, delta, length, mode, name)
                return mapping
        mapping.close()
        raise KernelUnavailable("this client is closed")

    def _show(self, mapping: Mapping, shown: Shown, how: int, name: str) -> None:
        mapping.show(
            shown.memfd,
            shown.offset,
            how,
            shown.delta,
            shown.length,
            self._uffds[shown.cpu],
            self._guard,
            name,
            self._status,
        )

    def _long_request(self, message: Message) -> Message:
        """A request that may take long, over a connection of its own; see `k42.vm.channel`."""
        return self._channels.request(message)

    def _add_window(self, region: int, base: int, index: int) -> None:
        """Lists another window of a region, on the CPU with this index."""
        with self._taken_back(region, base):
            self._request({"op": "window", "region": region, "cpu": index, "base": base})

    def _remove_window(self, region: int, base: int) -> None:
        self._request({"op": "unmap", "region": region, "base": base})

    def stat(self) -> dict[str, Any]:
        """The kernel's counts: budget, frames in use by kind, faults, clients, file caches.

        Of each client the frames that it has (``used``), its ``share``, below which no other client can push it, and
        its ``limit``, if any.

        Raises:
            KernelUnavailable: the kernel is gone.
        """
        reply, _ = self._request({"op": "stat"})
        stat = reply["stat"]
        if not isinstance(stat, dict):
            raise ProtocolError("the kernel's reply has no counts")
        return stat

    def check(self) -> tuple[list[str], list[str]]:
        """Has the kernel look whether all its frames are accounted for; at any time, under any load.

        Returns:
            What was found to hold, and what was not, as text. The latter is empty, or there is a bug in the kernel.

        Raises:
            KernelUnavailable: the kernel is gone.
        """
        reply = self._long_request({"op": "check"})
        return reply["good"], reply["bad"]

    def close(self) -> None:
        """Closes all mappings and the connection. Twice is once.

        Raises:
            BufferError: a mapping's memory is in use by an array or memoryview; nothing is closed.
        """
        with self._lock:
            self._closing = True
        try:
            mappings = list(self._mappings)
            for mapping in mappings:
                mapping._refuse_exports()
            for mapping in mappings:
                mapping.close()
        except BaseException:
            self._closing = False
            raise
        with self._lock:
            self._end()

    def _end(self) -> None:
        """Ends the connection. The userfaultfds are the guard's, which lives as long as any window is shown."""
        if not self._closed:
            self._closed = True
            self._channels.close()
            self._guard.stop()
            self._connection.close()

    def __del__(self) -> None:
        if hasattr(self, "_guard"):
            self._end()

    def _before_fork(self) -> list[threading.Lock] | None:
        """Waits until no mapping is being opened, closed or resized, and keeps it so: the locks to release afterwards.

        None: that took too long, perhaps because the thread that forks is itself within such a call.
        """
        deadline = time.monotonic() + _FORK_WAIT

        def take(lock: threading.Lock) -> bool:
            return lock.acquire(timeout=max(0.0, deadline - time.monotonic()))

        while take(self._lock):
            held, busy = [self._lock], None
            for mapping in self._mappings:
                # Without waiting: a mapping's lock comes before the client's, and one that is resized takes another's.
                if not mapping._lock.acquire(blocking=False):
                    busy = mapping._lock
                    break
                held.append(mapping._lock)
            if busy is None:
                return held
            for lock in held:
                lock.release()
            if not take(busy):
                break
            busy.release()
        return None

    def _after_fork(self) -> list[Mapping]:
        """In a forked child: what the parent has is the parent's alone. The mappings that it had."""
        self._lock = threading.Lock()
        mappings = list(self._mappings)
        for mapping in mappings:
            mapping._lock = threading.Lock()  # held over the fork, or by a thread that the child does not have
        self._closing = self._closed = True
        self._mappings = weakref.WeakSet()
        self._connection.close()
        self._channels.forget()
        self._guard.forget()
        return mappings

    def _reattach(self, mappings: list[Mapping]) -> None:
        """Then, if wanted: connects anew, and opens what was mapped from stores again, at the same addresses."""
        self._uffds.clear()  # closed by the guard
        self._handed_over.clear()
        self._garbage.clear()
        self.lost = False
        try:
            self._begin(_dial(self._path))
        except (k42.Error, OSError) as error:
            _warn(f"the mappings are not there: {error}")
            return
        self._closing = self._closed = False
        for mapping in mappings:
            # Anonymous memory and private copies would have to be as they were at the fork, and the parent goes on
            # writing to them: they stay its own.
            if mapping.mode in ("r", "r+") and mapping.shown:
                try:
                    self._open_again(mapping)
                except (k42.Error, OSError, ValueError) as error:
                    _warn(f"the mapping of {mapping.name} is not there: {error}")

    def _open_again(self, mapping: Mapping) -> None:
        shown, index = mapping._shown, self._cpu_index()
        request = mapping._request | {"op": "map", "mode": mapping.mode, "cpu": index, "base": mapping.base}
        request |= {"size": pages_of(shown.delta + shown.length) * PAGE, "first": shown.offset // PAGE}
        request |= {"group": mapping.page_size // PAGE}
        reply, [memfd] = self._request(request, () if mapping._file < 0 else (mapping._file,))
        region: int = reply["region"]
        try:
            mapping._show_again(self, shown._replace(region=region, memfd=memfd, cpu=index))
        except BaseException:
            self._drop(region, mapping.base)
            os.close(memfd)
            raise
        os.close(shown.memfd)
        self._mappings.add(mapping)

    def _add_window_again(self, window: Mapping, shown: Shown, how: int) -> bool:
        """The same for a local window; False, and it stays the parent's, where that fails."""
        try:
            with self._lock:
                self._serve_cpu(shown.cpu)
            self._add_window(shown.region, window.base, shown.cpu)
            self._show_window_again(window, shown, how)
        except (k42.Error, OSError) as error:
            _warn(f"a local window of {window.name} is not there: {error}")
            return False
        return True

    def _show_window_again(self, window: Mapping, shown: Shown, how: int) -> None:
        uffd = self._uffds[shown.cpu]
        window.show_again(shown.memfd, shown.offset, how, uffd, self._guard, window.name, self._status)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_url(path: object) -> bool:
    """Whether it is a URL, as fsspec understands them (``scheme://…``, also chained: ``zip://…::https://…``)."""
    return isinstance(path, str) and _URL.match(path) is not None


def _length(offset: int, length: int | None, size: int) -> int:
    """How many bytes to map of a store of so many."""
    if size == 0:
        raise ValueError("cannot map an empty file")
    if offset >= size:
        raise ValueError(f"offset {offset} is not before the end of the file ({size} bytes)")
    if not length:
        return size - offset
    if offset + length > size:
        raise ValueError(f"offset {offset} and length {length} go past the end of the file ({size})")
    return length


def _group(page_size: int | None) -> int:
    """Pages of 4 KiB in a page of the region."""
    if page_size is None:
        return 1
    if page_size < PAGE or page_size > MAX_GROUP * PAGE or page_size & (page_size - 1):
        raise ValueError(f"page_size must be a power of two from {PAGE} to {MAX_GROUP * PAGE} bytes, not {page_size}")
    return page_size // PAGE


def _around(fault_around: int | None) -> Message:
    """What a request says of fault-around."""
    if fault_around is None:
        return {}
    if fault_around < PAGE or fault_around > MAX_GROUP * PAGE or fault_around & (fault_around - 1):
        raise ValueError(f"fault_around must be a power of two from {PAGE} to {MAX_GROUP * PAGE} bytes")
    return {"around": fault_around // PAGE}


def connect(
    socket: str | os.PathLike[str] | None = None,
    *,
    grace: float = 5.0,
    homing: bool = True,
    sticky: bool = True,
    fork: Fork | None = None,
    limit: int | None = None,
) -> Client:
    """Connects to a kernel.

    Args:
        socket: where it listens. None: the user's own kernel, which is started when there is none, and ends by
            itself when its last client has gone.
        grace: seconds after the death of the kernel until accesses that wait for it end in SIGBUS.
        homing: let each 2 MiB of a mapping be served on the CPU of the threads that fault there.
        sticky: let a thread be kept on one CPU, of those that its affinity mask allows, while it faults.
        fork: what a child of ``os.fork()`` has. None: nothing; an access to a mapping of the parent's raises, or ends
            in SIGSEGV with a message. ``"reattach"``: the child gets a connection of its own, and the mappings of files
            and URLs in modes ``"r"`` and ``"r+"`` are opened again at the same addresses, so that arrays made of them
            go on; what is written to them is shared with the parent. Anonymous memory, snapshots and mode ``"c"`` stay
            the parent's, and pins, too. What cannot be opened is as with None, and a `ForkWarning` says why.
        limit: bytes of memory that the pages of this client may take in the kernel; at its limit it gives back its own.
            None, and at most: what the kernel allows any client.

    Raises:
        ValueError: another `fork`; a limit below one page.
        KernelUnavailable: none listens there; it is of another version, or of another user.
        Unsupported: not Linux.
    """
    if fork is not None and fork not in get_args(Fork):
        raise ValueError(f"fork must be None or 'reattach', not {fork!r}")
    path = Path(socket) if socket is not None else protocol.default_socket()
    dial = _dial if socket is not None else _dial_or_start
    for attempt in range(_TRIES):
        try:
            return Client(dial(path), grace, homing=homing, sticky=sticky, fork=fork, limit=limit)
        except KernelUnavailable as error:
            if attempt == _TRIES - 1 or not isinstance(error.__cause__, EOFError | OSError):
                raise
    raise AssertionError


def _dial(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        raise KernelUnavailable(
            f"no kernel listens on {path} ({error.strerror or error}): start one with `k42 serve --socket {path}`"
        ) from error
    return connection


def _dial_or_start(path: Path) -> socket.socket:
    """Connects to the user's own kernel; the first who finds none starts it."""
    with contextlib.suppress(KernelUnavailable):
        return _dial(path)
    lock = os.open(path.with_suffix(".start"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(KernelUnavailable):
            return _dial(path)  # another client has started it meanwhile
        launch(path, linger=_LINGER, all_cpus=True, supervise=True).leave()  # it is for all processes of the user
        return _dial(path)
    finally:
        os.close(lock)


_clients: weakref.WeakSet[Client] = weakref.WeakSet()
_default: Client | None = None
_default_lock = threading.Lock()  # protects _default; taken before a client's lock


def default_client() -> Client:
    """The connection that `k42.vm.open` and `k42.vm.anonymous` use, made at the first call, and anew when lost."""
    global _default
    with _default_lock:
        if _default is not None and _default.lost:
            _default = None  # mappings of it keep it alive
        if _default is None:
            _default = connect()
        return _default


def _by_default(call: Callable[[Client], Mapping]) -> Mapping:
    """The call on the default client; on a new one where the kernel of the old one turns out to be gone."""
    client = default_client()
    try:
        return call(client)
    except KernelUnavailable:
        if not client.lost:
            raise
        return call(default_client())


class _Held(threading.local):
    """What a thread that forks holds meanwhile, of each client whose mappings the child is to have."""

    def __init__(self) -> None:
        self.locks: dict[Client, list[threading.Lock]] = {}


_held = _Held()


def _before_fork() -> None:
    # In one order: threads that fork at the same time must not wait for each other.
    for client in sorted(_clients, key=id):
        if client._fork and (locks := client._before_fork()) is not None:
            _held.locks[client] = locks


def _after_fork_in_parent() -> None:
    for locks in _held.locks.values():
        for lock in locks:
            lock.release()
    _held.locks.clear()


def _after_fork_in_child() -> None:
    global _default, _default_lock
    _default_lock = threading.Lock()
    _default = None
    settled = set(_held.locks)
    _held.locks.clear()
    # First all of them: a warning may be an error here.
    wanted = [(client, client._fork and not client._closing, client._after_fork()) for client in list(_clients)]
    for client, reattach, mappings in wanted:
        if reattach and client in settled:
            client._reattach(mappings)
        elif reattach:
            _warn("another thread was changing mappings, so that none is there")


def _warn(what: str) -> None:
    warnings.warn(f"in this forked child {what}", ForkWarning, stacklevel=2)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def open(
    path: str | os.PathLike[str],
    mode: OpenMode = "r",
    offset: int = 0,
    length: int | None = None,
    page_size: int | None = None,
    storage_options: Mapping_[str, Any] | None = None,
    fault_around: int | None = None,
    policy: Policy | None = None,
) -> Mapping:
    """Maps a file or a URL through the user's own kernel; see `Client.open`."""
    return _by_default(
        lambda client: client.open(path, mode, offset, length, page_size, storage_options, fault_around, policy)
    )


def anonymous(
    nbytes: int, page_size: int | None = None, overcommit: bool = False, fault_around: int | None = None
) -> Mapping:
    """Maps anonymous memory through the user's own kernel; see `Client.anonymous`."""
    return _by_default(lambda client: client.anonymous(nbytes, page_size, overcommit, fault_around))
