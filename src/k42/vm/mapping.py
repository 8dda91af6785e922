"""Mapping: what the user holds. Real memory of this process, whose page faults the kernel serves."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, overload

from k42 import _native
from k42.errors import Error
from k42.vm.protocol import PAGE, pages_of

if TYPE_CHECKING:
    from k42.vm.client import Client


class Mapping(_native.Window):
    """Part of a file, or anonymous memory, as real memory.

    It has the buffer protocol (``memoryview(m)``, ``numpy.asarray(m)``, ``re.search(pattern, m)``), a length, and
    slices, which are copies (``bytes``). Use it as a context manager, or `close` it; dropping it
    unmaps it, too (where it has local windows, when the garbage collector next runs).

    Made by `k42.vm.open` and `k42.vm.anonymous`.
    """

    def __init__(self, size: int) -> None:
        self._client: Client | None = None  # while the kernel knows the mapping
        self._parent: Mapping | None = None  # of a local window: the mapping that it belongs to
        self._region = 0
        self._memfd = -1
        self._index = 0
        self._pid = os.getpid()
        self._geometry = (0, 0, size, False, "")
        self._lock = threading.Lock()  # protects _locals; taken before the client's lock
        self._locals: dict[int, Mapping] = {}  # the windows of other CPUs
        self.page_size = PAGE
        """Bytes that one fault brings in."""

    def _attach(self, client: Client, region: int, memfd: int, index: int, page_size: int) -> None:
        """What the kernel answered; from here on closing tells it."""
        self._region = region
        self._memfd = memfd
        self._index = index
        self.page_size = page_size
        self._client = client

    def _show(self, offset: int, delta: int, length: int, writable: bool, name: str) -> None:
        assert self._client is not None
        self._geometry = (offset, delta, length, writable, name)
        self._client._show(self, self._memfd, self._index, offset, delta, length, writable, name)

    def local(self) -> Mapping:
        """The window of this processor: the same memory at other addresses, whose faults are served on this CPU.

        For threads that share a mapping: each calls this once, on the CPU where it goes on. Made at the first call
        on a CPU; belongs to the mapping and is closed with it.

        Raises:
            ValueError: the mapping is closed.
            KernelUnavailable: the kernel is gone.
        """
        if self._parent is not None:
            return self._parent.local()
        if self._client is None or not self.shown:
            raise ValueError("mapping closed")
        index = self._client._cpu_index()
        if index == self._index:
            return self
        with self._lock:
            if self._client is None:
                raise ValueError("mapping closed")
            if index in self._locals:
                return self._locals[index]
            offset, delta, length, writable, name = self._geometry
            window = Mapping(pages_of(delta + length) * PAGE)
            self._client._add_window(self._region, window.base, index)
            window._parent = self
            window._client = self._client
            window._region = self._region
            window._index = index
            window.page_size = self.page_size
            window._geometry = self._geometry
            self._client._show(window, self._memfd, index, offset, delta, length, writable, name)
            self._locals[index] = window
            return window

    def close(self) -> None:
        """Unmaps, and frees what is the mapping's alone. Twice is once. A local window closes with its mapping.

        Raises:
            BufferError: an array or memoryview uses the memory; nothing is closed.
        """
        if self._parent is not None or self._client is None:
            return
        if self._pid != os.getpid():
            self._client = None  # the parent's: it never was in this process
            return
        hidden: list[Mapping] = []
        with self._lock:
            client = self._client
            if client is None:
                return  # another thread was faster
            self._refuse_exports()
            try:
                # One by one, since a thread may export a buffer of any meanwhile; the mapping's own window last.
                for index, window in list(self._locals.items()):
                    window.hide()
                    hidden.append(self._locals.pop(index))
                self.hide()
                hidden.append(self)
                self._client = None
                os.close(self._memfd)
            finally:
                for window in hidden:
                    with contextlib.suppress(Error):  # the kernel is gone, and all that it had for us
                        client._remove_window(self._region, window.base)
                    window.free()  # last, so that the addresses are not reused while the kernel still knows them

    def _refuse_exports(self) -> None:
        for window in (*self._locals.values(), self):
            if window.exports:
                raise BufferError("cannot close: an array or memoryview uses the memory of the mapping")

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
            client._drop(self._region, base)
        os.close(self._memfd)  # the agent uses it as long as a window is shown

    @overload
    def __getitem__(self, key: int) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> bytes: ...
    def __getitem__(self, key: int | slice) -> int | bytes:
        with memoryview(self) as view:
            if isinstance(key, slice):
                return bytes(view[key])
            value: int = view[key]
            return value

    def __setitem__(self, key: int | slice, value: int | bytes | bytearray | memoryview) -> None:
        with memoryview(self) as view:
            view[key] = value  # type: ignore[index, assignment]

    def __enter__(self) -> Mapping:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        *_, name = self._geometry
        state = f"{len(self)} bytes" if self.shown else "closed"
        return f"<k42.vm.Mapping of {name}, {state}>"
