"""Mapping: what the user holds. Real memory of this process, whose page faults the kernel serves."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, SupportsIndex, get_args

from k42 import _native
from k42.errors import Error
from k42.vm.access import MemoryFile, to_word
from k42.vm.errors import KernelUnavailable, ProtocolError, StoreError, Unsupported
from k42.vm.protocol import PAGE, Message, pages_of

if TYPE_CHECKING:
    from k42.vm.client import Client

Advice = Literal["normal", "random", "sequential", "willneed", "dontneed"]
Mode = Literal["r", "r+", "c", "anonymous"]

# How a window shows the frames: for reading, shared, or with private copies of what is written.
_SHOWN_AS: dict[Mode, int] = {"r": 0, "r+": 1, "c": 2, "anonymous": 1}

# What the hints of madvise(2) mean here; None: nothing, since it is always so. All others are refused, as Linux refuses
# what a kind of memory cannot do.
_ADVICE: dict[int, Advice | None] = {
    mmap.MADV_NORMAL: "normal",
    mmap.MADV_RANDOM: "random",
    mmap.MADV_SEQUENTIAL: "sequential",
    mmap.MADV_WILLNEED: "willneed",
    mmap.MADV_DONTNEED: "dontneed",
    mmap.MADV_DONTFORK: None,
}


class Shown(NamedTuple):
    """What a mapping shows, as one value: resizing puts another in its place."""

    region: int  # how the kernel calls it: its first address
    memfd: int  # of the frames; a descriptor of the mapping's own
    cpu: int  # index of the CPU that serves the mapping's own window
    offset: int  # of the window's first byte in the file; a page's
    delta: int  # of the mapping's first byte, from there
    length: int  # of the mapping, in bytes


class Mapping(MemoryFile):
    """Part of a file, or anonymous memory, as real memory.

    It has the buffer protocol without copies (``memoryview(m)``, ``numpy.asarray(m)``, ``torch.frombuffer``,
    ``pyarrow.py_buffer``, ``re.search(pattern, m)``, DLPack), and all that an `mmap.mmap` can do, with the same results
    and errors: a length, slices, which are copies (``bytes``), `find`, `read`, `readline`, `seek`, `write`, `flush`,
    `resize`, `madvise` … Use it as a context manager, or `close` it; dropping it unmaps it, too (where it has local
    windows, when the garbage collector next runs).

    Where a page cannot be had, what is called here raises `k42.vm.StoreError`, and asks anew the next time. An access
    through a pointer (of numpy, say) can raise nothing: it ends in SIGBUS, after a message on stderr.

    Made by `k42.vm.open` and `k42.vm.anonymous`.
    """

    def __init__(self, size: int) -> None:
        self._client: Client | None = None  # while the kernel knows the mapping
        self._parent: Mapping | None = None  # of a local window: the mapping that it belongs to
        self._shown = Shown(0, -1, 0, 0, 0, size)
        self._file = -1  # the mapped file's descriptor, the mapping's own; -1: there is none
        self._request: Message = {}  # what the kernel was asked to map
        self._pid = os.getpid()
        self._lock = threading.Lock()  # protects _locals, _shown; taken before the client's lock
        self._locals: dict[int, Mapping] = {}  # the windows of other CPUs
        self._position_lock = threading.RLock()
        self.mode: Mode = "r"
        """``"r"``, ``"r+"`` or ``"c"``, as it was opened (``"w+"`` goes on as ``"r+"``), or ``"anonymous"``."""
        self.name = ""
        """The path or URL; of no use to find it again where it is not UTF-8."""
        self.page_size = PAGE
        """Bytes that one fault brings in."""

    # Its life.

    def _attach(self, client: Client, region: int, memfd: int, index: int, page_size: int) -> None:
        """What the kernel answered; from here on closing tells it."""
        self._shown = self._shown._replace(region=region, memfd=memfd, cpu=index)
        self.page_size = page_size
        self._client = client

    def _show(self, offset: int, delta: int, length: int, mode: Mode, name: str) -> None:
        assert self._client is not None
        self._shown = self._shown._replace(offset=offset, delta=delta, length=length)
        self.mode = mode
        self.name = name
        self._can_write = mode != "r"
        self._client._show(self, self._shown, _SHOWN_AS[mode], name)

    def local(self) -> Mapping:
        """The window of this processor: the same memory at other addresses, whose faults are served on this CPU.

        For threads that share a mapping: each calls this once, on the CPU where it goes on. Made at the first call
        on a CPU; belongs to the mapping and is closed with it, and when it is resized.

        Raises:
            ValueError: the mapping is closed.
            Unsupported: it is of mode ``"c"``, whose private copies belong to one window.
            KernelUnavailable: the kernel is gone.
        """
        if self._parent is not None:
            return self._parent.local()
        if self._client is None or not self.shown:
            raise ValueError("mapping closed")
        self._expect_ours()
        if self.mode == "c":
            raise Unsupported("a mapping of mode 'c' has one window, since each would have private copies of its own")
        index = self._client._cpu_index()
        if index == self._shown.cpu:
            return self
        with self._lock:
            if self._client is None:
                raise ValueError("mapping closed")
            if index in self._locals:
                return self._locals[index]
            shown = self._shown._replace(cpu=index)
            window = Mapping(pages_of(shown.delta + shown.length) * PAGE)
            self._client._add_window(shown.region, window.base, index)
            window._parent = self
            window._client = self._client
            window._shown = shown
            window.page_size = self.page_size
            window.mode, window.name, window._can_write = self.mode, self.name, self._can_write
            self._client._show(window, shown, _SHOWN_AS[self.mode], self.name)
            self._locals[index] = window
            return window

    def _show_again(self, client: Client, shown: Shown) -> None:
        """In a forked child, which has one thread: shows what the kernel has just opened for it, as in the parent."""
        client._show_window_again(self, shown, _SHOWN_AS[self.mode])
        self._shown, self._pid = shown, os.getpid()
        self._lock, self._position_lock = threading.Lock(), threading.RLock()
        windows, self._locals = self._locals, {}
        for index, window in windows.items():
            here = shown._replace(cpu=index)
            if client._add_window_again(window, here, _SHOWN_AS[self.mode]):
                window._shown, window._pid = here, self._pid
                window._position_lock = threading.RLock()
                self._locals[index] = window

    def close(self) -> None:
        """Unmaps, and frees what is the mapping's alone. Twice is once. A local window closes with its mapping.

        What was written in mode ``"r+"`` goes to the store first, as if by `flush`.

        Raises:
            BufferError: an array or memoryview uses the memory; nothing is closed.
            StoreError: what was written could not be stored. The mapping is closed; the kernel tries on.
            KernelUnavailable: what was written could not be stored, since the kernel is gone. The mapping is closed.
        """
        if self._parent is not None or self._client is None:
            return
        if self._pid != os.getpid():
            self._client = None  # the parent's: it never was in this process
            return
        self._refuse_exports()
        lost: Error | None = None
        if self.mode == "r+":
            try:
                self.flush()
            except Error as error:
                lost = error
            except ValueError:
                return  # another thread was faster
        self._end()
        if lost is not None:
            raise lost

    def _end(self) -> None:
        """Closes it, and stores nothing."""
        hidden: list[Mapping] = []
        with self._lock:
            client = self._client
            if client is None:
                return  # another thread was faster
            self._refuse_exports()
            try:
                # One by one, since a thread may export a buffer of any meanwhile; the mapping's own window last.
                self._hide_locals(hidden)
                self.hide()
                hidden.append(self)
                self._client = None
                self._close_descriptors()
            finally:
                self._forget(client, hidden)

    def _hide_locals(self, hidden: list[Mapping]) -> None:
        for index, window in list(self._locals.items()):
            window.hide()
            hidden.append(self._locals.pop(index))

    def _close_locals(self, client: Client) -> None:
        hidden: list[Mapping] = []
        try:
            self._hide_locals(hidden)
        finally:
            self._forget(client, hidden)

    def _forget(self, client: Client, hidden: list[Mapping]) -> None:
        for window in hidden:
            with contextlib.suppress(Error):  # the kernel is gone, and all that it had for us
                client._remove_window(self._shown.region, window.base)
            window.free()  # last, so that the addresses are not reused while the kernel still knows them

    def _close_descriptors(self) -> None:
        os.close(self._shown.memfd)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _refuse_exports(self, what: str = "close") -> None:
        for window in (*self._locals.values(), self):
            if window.exports:
                raise BufferError(f"cannot {what}: an array or memoryview uses the memory of the mapping")

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if ending():
            return  # the process ends, and the modules that are needed here may be gone
        client = self._client
        if client is None or self._parent is not None or self._pid != os.getpid():
            return
        windows = (*self._locals.values(), self)
        if any(window.exports for window in windows):
            return  # a memoryview in the same garbage: the memory goes with it, the kernel's part with the client
        # The collector may run anywhere: nothing here waits.
        self._client = None
        for window in windows:
            base = window.base
            window.hide()
            client._drop(self._shown.region, base)
        self._close_descriptors()  # the agent uses the frames' as long as a window is shown

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return not self.shown

    def __enter__(self) -> Mapping:
        len(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"{len(self)} bytes" if self.shown else "closed"
        return f"<k42.vm.Mapping of {self.name}, {state}>"

    # Accesses that failed.

    def _failure(self, failure: _native.AccessFailed) -> Exception:
        at, kernel_gone, _, reason = failure.args
        if kernel_gone:
            return KernelUnavailable(
                f"the kernel that served the mapping of {self.name} is gone and none took over: open it again"
            )
        offset: int = self._shown.offset + self._shown.delta + at
        # The kernel's own words may begin with the place, and end with Linux's name of the error.
        place = f"{self.name}, offset "
        if reason.startswith(place):
            number, _, rest = reason[len(place) :].partition(": ")
            if number.isdigit():
                offset, reason = int(number), rest
        code = None
        if match := re.search(r" \((E[A-Z0-9]+)\)$", reason):
            code = getattr(errno, match[1], None)
            reason = reason if code is None else reason[: match.start()]
        return StoreError(reason or "the page could not be had", url=self.name, offset=offset, errno=code)

    def _ask_again(self, offset: int) -> None:
        shown = self._shown
        self._ask("show", page=(shown.offset + shown.delta + offset) // PAGE)

    # What is asked of the kernel.

    def _ask(self, operation: str, **more: Any) -> Message:
        client = self._client
        if client is None or not self.shown:
            raise ValueError("mapping closed")
        self._expect_ours()
        return client._long_request({"op": operation, "region": self._shown.region, **more})

    def _expect_ours(self) -> None:
        if self._pid != os.getpid():
            raise ValueError("this mapping belongs to the parent process: open it again in the forked child")

    def _pages(self, offset: SupportsIndex, length: SupportsIndex | None) -> dict[str, int]:
        """The pages of the file in which these bytes of the mapping lie."""
        size = len(self)
        start = to_word(offset)
        count = size - start if length is None else to_word(length)
        if start < 0 or count < 0 or start + count > size:
            raise ValueError(f"offset {start} and length {count} are not within the mapping of {size} bytes")
        shown = self._shown
        first = (shown.offset + shown.delta + start) // PAGE
        return {"first": first, "count": pages_of(shown.offset + shown.delta + start + count) - first}

    def flush(self, offset: SupportsIndex = 0, size: SupportsIndex | None = None, /) -> None:
        """Returns when what was written before is in the store (durably, where the store can say so).

        Nothing to do in modes ``"r"`` and ``"c"`` and for anonymous memory.

        Args:
            offset: where to begin, in bytes.
            size: how many bytes; None: to the end. Whole pages are stored.

        Raises:
            ValueError: outside the mapping, or it is closed.
            StoreError: what the store raised. What is not stored stays in memory, and is stored by a later call.
            KernelUnavailable: the kernel is gone.
        """
        pages = self._pages(offset, size)
        if self.mode == "r+" and pages["count"]:
            self._ask("flush", **pages)

    def prefetch(self, offset: SupportsIndex = 0, length: SupportsIndex | None = None) -> None:
        """Returns when these bytes are in the page cache, or as many of them as the budget has room for.

        Other threads run meanwhile. Touching the bytes is then fast as long as they stay; see `pin`.

        Args:
            offset: where to begin, in bytes.
            length: how many bytes; None: to the end.

        Raises:
            ValueError: outside the mapping, or it is closed.
            StoreError: they could not be read.
            KernelUnavailable: the kernel is gone.
        """
        self._ask("prefetch", **self._pages(offset, length))

    def pin(self, offset: SupportsIndex = 0, length: SupportsIndex | None = None) -> None:
        """Brings these bytes in and keeps them in memory until `unpin`, or until the mapping is closed.

        For memory that a device or Linux itself goes on using (O_DIRECT, io_uring buffers, GPU registration).

        Args:
            offset: where to begin, in bytes.
            length: how many bytes; None: to the end. Whole pages are kept.

        Raises:
            OutOfFrames: the budget has no room to keep them.
            ValueError, StoreError, KernelUnavailable: as `prefetch`.
        """
        self._ask("pin", **self._pages(offset, length))

    def unpin(self, offset: SupportsIndex = 0, length: SupportsIndex | None = None) -> None:
        """Ends what `pin` began; each page as often as it was pinned."""
        self._ask("unpin", **self._pages(offset, length))

    def advise(self, advice: Advice, offset: SupportsIndex = 0, length: SupportsIndex | None = None) -> None:
        """Says how these bytes will be used.

        Args:
            advice: ``"sequential"`` reads far ahead and gives up early what was passed; ``"random"`` reads nothing
                ahead; ``"normal"`` decides by what it sees; ``"willneed"`` begins to fetch and does not wait;
                ``"dontneed"`` lets go of the pages (nothing that was written is lost).
            offset: where to begin, in bytes.
            length: how many bytes; None: to the end.

        Raises:
            ValueError: no such advice, outside the mapping, or it is closed.
            KernelUnavailable: the kernel is gone.
        """
        if advice not in get_args(Advice):
            raise ValueError(f"advice is one of {', '.join(get_args(Advice))}, not {advice!r}")
        self._ask("advise", advice=advice, **self._pages(offset, length))

    def madvise(self, option: int, start: SupportsIndex = 0, length: SupportsIndex | None = None, /) -> None:
        """`advise` with the names of ``madvise(2)``: ``mmap.MADV_NORMAL``, ``_RANDOM``, ``_SEQUENTIAL``, ``_WILLNEED``
        and ``_DONTNEED`` do what it says there; ``_DONTFORK`` is so already.

        Raises:
            OSError: EINVAL, for any other option: this memory has no use for it.
            ValueError: outside the mapping, or it is closed.
        """
        size = len(self)
        begin = to_word(start)
        count = size - begin if length is None else to_word(length)
        if not 0 <= begin < size:
            raise ValueError("madvise start out of bounds")
        if count < 0:
            raise ValueError("madvise length invalid")
        if begin + count > sys.maxsize:
            raise OverflowError("madvise length too large")
        if option not in _ADVICE:
            raise OSError(errno.EINVAL, f"k42 has no use for madvise option {option}")
        if advice := _ADVICE[option]:
            self.advise(advice, begin, min(count, size - begin))

    def stats(self) -> dict[str, Any]:
        """Counts of this mapping: what the kernel knows of it (resident pages, faults, fills …), and its own windows.

        Raises:
            ValueError: the mapping is closed.
            KernelUnavailable: the kernel is gone.
        """
        stat = self._ask("region_stat").get("stat")
        if not isinstance(stat, dict):
            raise ProtocolError("the kernel's reply has no counts")
        owner = self._parent or self
        own = {"name": self.name, "mode": self.mode, "bytes": len(self), "page_size": self.page_size}
        return {**stat, **own, "windows": 1 + len(owner._locals)}

    def snapshot(self) -> Mapping:
        """A copy of the mapping as it is now, at next to no cost: pages are copied when either side writes to them.

        Returns:
            A writable mapping of the same length, which is anonymous memory: what is written to either is not seen
            in the other.

        Raises:
            ValueError: the mapping is closed.
            Unsupported: it is of mode ``"c"``, whose private copies the kernel does not know.
            OutOfFrames: the budget has no room for it.
            KernelUnavailable: the kernel is gone.
        """
        client = self._client
        if client is None or not self.shown:
            raise ValueError("mapping closed")
        self._expect_ours()
        if self.mode == "c":
            raise Unsupported("a mapping of mode 'c' has private copies, which a snapshot would not show")
        shown = self._shown
        request = {"kind": "snapshot", "of": shown.region, "name": f"a snapshot of {self.name}"}
        at = shown.offset + shown.delta
        return client._map(request, -1, at, shown.length, self.page_size // PAGE, "anonymous")

    # Its size.

    def size(self) -> int:
        """The size of the file, in bytes, which may be larger than the mapping; of anonymous memory, its length."""
        length = len(self)
        if self._parent is not None:
            return self._parent.size()
        if self._file >= 0:
            return os.fstat(self._file).st_size
        if self._request.get("kind") == "url":
            return int(self.stats()["size"])
        return length

    def resize(self, newsize: SupportsIndex, /) -> None:
        """Makes the mapping longer or shorter, and the file end where it then ends.

        It moves to other addresses; its local windows are closed. What is cut off is lost, new bytes are zeros.

        Args:
            newsize: of the mapping, in bytes.

        Raises:
            BufferError: an array or memoryview uses the memory; nothing has changed.
            TypeError: the mapping is read-only, or a private copy.
            ValueError: a negative size; anonymous memory that would grow; the mapping is closed.
            OSError: EINVAL for a size of 0; or what the file system said.
            StoreError, Unsupported: the store cannot be resized.
            KernelUnavailable: the kernel is gone.
        """
        if self._parent is not None:
            return self._parent.resize(newsize)
        length = len(self)
        wanted = to_word(newsize)
        if self.mode not in ("r+", "anonymous"):
            raise TypeError("can't resize a read-only or copy-on-write mapping")
        if wanted < 0:
            raise ValueError("new size out of range")
        if wanted == 0:
            raise OSError(errno.EINVAL, "a mapping has at least one byte")
        if self.mode == "anonymous" and wanted > length:
            raise ValueError("anonymous memory cannot grow")
        self._expect_ours()
        with self._lock:
            client = self._client
            if client is None:
                raise ValueError("mapping closed")
            self._refuse_exports("resize")
            if self.mode == "anonymous":
                self._shorten(client, wanted)
            elif wanted != length:
                self._remap(client, wanted, grow=wanted > length)
        return None

    def _shorten(self, client: Client, length: int) -> None:
        """Shows less of the same region."""
        self._close_locals(client)
        self.hide()
        self._shown = self._shown._replace(length=length)
        client._show(self, self._shown, _SHOWN_AS[self.mode], self.name)
        client._long_request({"op": "resize", "region": self._shown.region, "size": self._shown.delta + length})

    def _remap(self, client: Client, length: int, *, grow: bool) -> None:
        """Puts a mapping of this length in place of the one here, which ends.

        The store grows before anybody can touch the new bytes, and shrinks after the last could touch the old ones.
        """
        shown = self._shown
        start = shown.offset + shown.delta
        if grow:
            client._long_request({"op": "resize", "region": shown.region, "size": start + length})
        descriptor = os.dup(self._file) if self._file >= 0 else -1
        other = client._map(dict(self._request), descriptor, start, length, self.page_size // PAGE, self.mode)
        try:
            self._close_locals(client)
            self.exchange(other)
            self._shown, other._shown = other._shown, self._shown
            if not grow:
                client._long_request({"op": "resize", "region": self._shown.region, "size": start + length})
        finally:
            other._end()

    # Without copies to others.

    def __dlpack__(self, **options: Any) -> Any:
        """The bytes for ``from_dlpack`` of numpy, torch and others; by way of numpy."""
        import numpy

        return numpy.frombuffer(memoryview(self), numpy.uint8).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """The CPU."""
        return (1, 0)
