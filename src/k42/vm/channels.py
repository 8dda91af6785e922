"""The kernel's side of channels: requests of clients that may take long, each served in a thread of its connection.

A channel is a second connection of a client: what it waits for holds up nobody else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable
from typing import Any, Protocol

import k42
from k42.vm import protocol
from k42.vm.caches import Cached, Caches, in_use
from k42.vm.errors import ProtocolError, StoreError
from k42.vm.fcm import FileCacheManager, asked_policy
from k42.vm.files import open_store
from k42.vm.pins import Pins
from k42.vm.pm import PageManager
from k42.vm.protocol import PAGE, Message
from k42.vm.readahead import Advice

log = logging.getLogger("k42.kernel")

MOST = 16  # channels a client
_MOST_OPTIONS = 16384  # characters of the options of a URL
_LONGEST_URL = 8192  # characters


class Client(Protocol):
    """What a channel has to know of its client."""

    pm: PageManager

    def pins(self, region: int) -> Pins | None:
        """What is pinned through the region at this address."""

    def show(self, region: int, page: int) -> None:
        """Shows a page of the file where the region at this address does, as at a fault."""

    def cached(self, region: int) -> Cached | None:
        """What the region at this address shows."""


class Channel(threading.Thread):
    """Serves one channel until either side closes it.

    Args:
        connection: after the request that made it a channel; taken over.
        client: whose it is.
        caches: the kernel's.
        check: the kernel's `check`.
        ended: called at its end.
    """

    def __init__(
        self,
        connection: socket.socket,
        client: Client,
        caches: Caches,
        check: Callable[[], tuple[list[str], list[str]]],
        ended: Callable[[Channel], None],
    ) -> None:
        super().__init__(name="k42-channel", daemon=True)
        self._connection = connection
        self._client = client
        self._caches = caches
        self._check = check
        self._ended = ended

    def close(self) -> None:
        """Ends it; a request that runs is finished first."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        """Serves."""
        try:
            os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
            self._connection.setblocking(True)
            while True:
                message, descriptors = protocol.receive(self._connection)
                protocol.close_all(descriptors)
                reply = self._reply(message)
                if "id" in message:
                    reply["id"] = message["id"]
                protocol.send(self._connection, reply)
        except ProtocolError as error:
            with contextlib.suppress(OSError):
                protocol.send(self._connection, protocol.to_reply(error), flags=socket.MSG_DONTWAIT)
        except (EOFError, OSError):
            pass
        finally:
            self._connection.close()
            self._ended(self)

    def _reply(self, message: Message) -> Message:
        try:
            return {"ok": True, **self._answer(message)}
        except (KeyError, TypeError, OverflowError) as error:
            return protocol.to_reply(ProtocolError(f"a malformed request: {error!r}"))
        except k42.Destroyed:
            return protocol.to_reply(ProtocolError("the region went meanwhile"))
        except (k42.Error, ValueError) as error:
            return protocol.to_reply(error)
        except OSError as error:
            return protocol.to_reply(StoreError(error.strerror or str(error), errno=error.errno))
        except Exception as error:
            log.exception("a request on a channel")
            return protocol.to_reply(error)

    def _answer(self, message: Message) -> Message:
        operation = message.get("op")
        if operation == "url_size":
            return self._open_url(message)
        if operation == "check":
            good, bad = self._check()
            return {"good": good, "bad": bad}
        work = _WORK.get(str(operation))
        if work is None:
            raise ProtocolError(f"unknown request {operation!r} on a channel")
        cached = self._client.cached(int(message["region"]))
        with in_use(self._caches, cached) as fcm:
            answer = work(fcm, self._client, message)
            if cached is not None and operation in ("flush", "resize"):
                self._caches.tell(cached)  # size and version
            return answer

    def _open_url(self, message: Message) -> Message:
        url, mode, options = str(message["url"]), str(message["mode"]), message["options"]
        if not isinstance(options, dict) or len(str(options)) > _MOST_OPTIONS or len(url) > _LONGEST_URL:
            raise ValueError("a URL, and its options, which are a dictionary, are of moderate size")
        policy = asked_policy(message)
        cached = self._caches.url(url, mode, options, lambda: open_store(url, mode, options), policy)
        try:
            return {"size": cached.fcm.fr().size()}
        finally:
            self._caches.let_go(cached)  # it stays among the unused until it is mapped


def _range(fcm: FileCacheManager, message: Message) -> tuple[int, int]:
    first, count = int(message["first"]), int(message["count"])
    if first < 0 or count < 0:
        raise ProtocolError("a range of pages begins at 0 or after it")
    return first, min(first + count, fcm.native().pages())


def _flush(fcm: FileCacheManager, _: Client, message: Message) -> Message:
    fcm.flush(*_range(fcm, message))
    return {}


def _prefetch(fcm: FileCacheManager, client: Client, message: Message) -> Message:
    return {"resident": fcm.prefetch(*_range(fcm, message), client.pm)}


def _show(fcm: FileCacheManager, client: Client, message: Message) -> Message:
    page = int(message["page"])
    fcm.prefetch(*_range(fcm, {"first": page, "count": 1}), client.pm)
    client.show(int(message["region"]), page)
    return {}


def _resize(fcm: FileCacheManager, _: Client, message: Message) -> Message:
    fcm.resize(int(message["size"]))
    return {"size": fcm.fr().size()}


def _pins(client: Client, message: Message) -> Pins:
    pins = client.pins(int(message["region"]))
    if pins is None:
        raise ProtocolError("no such region")
    return pins


def _number(message: Message) -> int | None:
    """By which a request is known that is made again."""
    number = message.get("number")
    return number if isinstance(number, int) and 0 <= number < 1 << 63 else None


def _pin(fcm: FileCacheManager, client: Client, message: Message) -> Message:
    _pins(client, message).pin(*_range(fcm, message), client.pm, _number(message))
    return {}


def _unpin(fcm: FileCacheManager, client: Client, message: Message) -> Message:
    _pins(client, message).unpin(*_range(fcm, message), _number(message))
    return {}


def _advise(fcm: FileCacheManager, client: Client, message: Message) -> Message:
    fcm.advise(*_range(fcm, message), Advice(str(message["advice"])), client.pm)
    return {}


def _region_stat(fcm: FileCacheManager, client: Client, _: Message) -> Message:
    stat: dict[str, Any] = dict(fcm.stat())
    stat["name"] = str(stat["name"])[-1000:]
    stat["size"] = fcm.fr().size()
    stat["page"] = PAGE
    stat["client"] = client.pm.stat()
    return {"stat": stat}


_WORK: dict[str, Callable[[FileCacheManager, Client, Message], Message]] = {
    "flush": _flush,
    "prefetch": _prefetch,
    "show": _show,
    "resize": _resize,
    "pin": _pin,
    "unpin": _unpin,
    "advise": _advise,
    "region_stat": _region_stat,
}
