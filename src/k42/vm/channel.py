"""Requests that may take long (flush, prefetch, resize …): each has a connection to the kernel of its own meanwhile.

Such a connection, a *channel*, is another one to the socket where the kernel listens; its first message says which
client it belongs to. The kernel serves each channel in a thread of its own, one request after another, so that nobody
waits for somebody else's. Ctrl-C during a request closes its channel.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from k42.vm import protocol
from k42.vm.errors import KernelUnavailable
from k42.vm.protocol import Message

_MOST = 12  # requests under way at once; the kernel has a limit, and the others wait here
_IDLE = 4  # connections kept for the next request


@dataclass
class Channels:
    """The channels of one client.

    Args:
        path: where the kernel listens.
        greeting: the first message on a channel: whose it is, and that it may be.
        supervised: if the kernel dies another takes over, under the same path; then requests are made again.
    """

    path: str
    greeting: Message
    supervised: bool = False
    _turns: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_MOST))
    _lock: threading.Lock = field(default_factory=threading.Lock)  # protects all below; a leaf
    _idle: list[socket.socket] = field(default_factory=list)
    _busy: set[socket.socket] = field(default_factory=set)
    _closed: bool = False
    _numbers: Iterator[int] = field(default_factory=itertools.count)  # by which a repeated request is known

    def request(self, message: Message) -> Message:
        """A request and its reply; may take as long as it takes, and lets other threads run.

        Raises:
            KernelUnavailable: the kernel is gone, or the client was closed meanwhile.
            StoreError, OutOfFrames, ValueError, Unsupported: what the kernel answered.
        """
        with self._turns:
            reply = self._exchange(message | {"number": next(self._numbers)})
        if "error" in reply:
            raise protocol.to_error(reply)
        return reply

    def _exchange(self, message: Message) -> Message:
        while True:
            channel, used = self._take()
            try:
                protocol.send(channel, message)
                reply, descriptors = protocol.receive(channel)
                protocol.close_all(descriptors)
                break
            except (EOFError, OSError) as error:
                self._drop(channel)
                if self._closed:
                    raise KernelUnavailable("this client is closed") from None
                if not used and not self.supervised:
                    raise KernelUnavailable(f"the kernel has gone away during {message['op']}") from error
                # It ended with a kernel that another takes over from, now or long ago. All that is asked for here
                # may be done twice, but for pins, which know the number of the request.
            except BaseException:
                self._drop(channel)  # its answer, if any, is nobody's
                raise
        self._give_back(channel)
        return reply

    def close(self) -> None:
        """Ends all channels; requests on them raise. Twice is once."""
        with self._lock:
            self._closed = True
            for channel in self._busy:
                with contextlib.suppress(OSError):
                    channel.shutdown(socket.SHUT_RDWR)  # closed by the thread that uses it
            for channel in self._idle:
                channel.close()
            self._idle.clear()

    def forget(self) -> None:
        """In a forked child: its copies of the parent's channels are of no use."""
        self._lock = threading.Lock()
        self._turns = threading.Semaphore(_MOST)
        self._closed = True
        for channel in (*self._idle, *self._busy):
            channel.close()
        self._idle.clear()
        self._busy.clear()

    def _take(self) -> tuple[socket.socket, bool]:
        """A channel that nobody uses, and whether it was used before."""
        with self._lock:
            if self._closed:
                raise KernelUnavailable("this client is closed")
            if self._idle:
                channel = self._idle.pop()
                self._busy.add(channel)
                return channel, True
        while True:
            channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connected = False
            try:
                channel.connect(self.path)
                connected = True
                protocol.send(channel, self.greeting)
                reply, descriptors = protocol.receive(channel)
                protocol.close_all(descriptors)
                if "error" in reply:
                    raise protocol.to_error(reply)
                break
            except (EOFError, OSError) as error:
                channel.close()
                if isinstance(error, KernelUnavailable):
                    raise
                # As long as somebody holds the socket there will be a kernel that accepts.
                if not (connected and self.supervised):
                    raise KernelUnavailable(f"the kernel at {self.path} does not answer") from error
            except BaseException:
                channel.close()
                raise
        with self._lock:
            if not self._closed:
                self._busy.add(channel)
                return channel, False
        channel.close()
        raise KernelUnavailable("this client is closed")

    def _give_back(self, channel: socket.socket) -> None:
        with self._lock:
            self._busy.discard(channel)
            if not self._closed and len(self._idle) < _IDLE:
                self._idle.append(channel)
                return
        channel.close()

    def _drop(self, channel: socket.socket) -> None:
        with self._lock:
            self._busy.discard(channel)
        channel.close()
