"""Ranges over HTTP, by connections of our own, from the socket into frames.

Not through fsspec's session (aiohttp), which has one thread for all requests of a process, and more copies. Nor does
fsspec look at what tells versions apart.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import re
import socket
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

from k42.vm.errors import StoreError, Unsupported
from k42.vm.fr import _frames
from k42.vm.fr._remote import WHOLE, Changed, Put, Refused, Transient, may_pass, retry_after
from k42.vm.fr.interface import Traits

T = TypeVar("T")

_PIECE = 256 << 10  # bytes taken from a socket at once, at most: they fit a processor's cache
_REDIRECTS = 10
_REDIRECTED = {301, 302, 303, 307, 308}
_OPTIONS = {"headers", "ssl"}
_SAFE = "%/:=&?~#+!$,;'@()*[]"  # stays as it is in a URL

Place = tuple[str, str, int]  # scheme, host, port


class Connections:
    """Connections to servers, kept for the next request. Thread-safe.

    Args:
        timeout: seconds that a server may be silent.
        verify: whether certificates are looked at.
    """

    def __init__(self, timeout: float, *, verify: bool) -> None:
        self._timeout = timeout
        self._verify = verify
        self._lock = threading.Lock()  # protects all below; a leaf
        self._idle: dict[Place, list[http.client.HTTPConnection]] = {}
        self._sockets: set[socket.socket] = set()  # in use, those that are being connected included
        self._cancelled = False

    def exchange(
        self, split: SplitResult, headers: Mapping[str, str], take: Callable[[http.client.HTTPResponse], T]
    ) -> T:
        """A request, and what `take` makes of the answer."""
        assert split.hostname is not None
        place = (split.scheme, split.hostname, split.port or {"http": 80, "https": 443}[split.scheme])
        target = quote(urlunsplit(("", "", split.path or "/", split.query, "")), safe=_SAFE)
        while True:
            connection, used = self._take(place)
            plug = connection.sock  # an answer after which the server closes takes it away from the connection
            keep = again = False
            try:
                try:
                    connection.request("GET", target, headers=dict(headers))
                    response = connection.getresponse()
                except (ConnectionError, http.client.BadStatusLine):
                    if not used or self._cancelled:
                        raise
                    again = True  # the server has closed it since it was used last
                else:
                    result = take(response)
                    keep = response.isclosed() and not response.will_close
            finally:
                self._give_back(place, connection, plug, keep=keep)
            if not again:
                return result

    def _take(self, place: Place) -> tuple[http.client.HTTPConnection, bool]:
        """A connection that nobody uses, and whether it was used before."""
        with self._lock:
            if self._cancelled:
                raise Refused("it is being closed")
            if idle := self._idle.get(place):
                connection = idle.pop()
                self._sockets.add(connection.sock)
                return connection, True
        return self._connect(place), False

    def _connect(self, place: Place) -> http.client.HTTPConnection:
        scheme, host, port = place
        failure: OSError = OSError(f"{host} has no address")
        for family, kind, number, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            plain = socket.socket(family, kind, number)
            with self._lock:
                self._sockets.add(plain)
            try:
                plain.settimeout(self._timeout)
                if self._cancelled:
                    raise Refused("it is being closed")
                plain.connect(address)
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if scheme == "http":
                    connection = http.client.HTTPConnection(host, port)
                    connection.sock = plain
                    return connection
                return self._encrypt(host, port, plain)
            except OSError as error:
                failure = error
                self._forget(plain)
            except BaseException:
                self._forget(plain)
                raise
        raise failure

    def _encrypt(self, host: str, port: int, plain: socket.socket) -> http.client.HTTPConnection:
        import ssl

        context = ssl.create_default_context()
        if not self._verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            encrypted = context.wrap_socket(plain, server_hostname=host)  # `plain` is empty from here on
        except ssl.SSLCertVerificationError as error:
            raise Refused(f"its certificate is not good: {error.verify_message}") from error
        with self._lock:
            self._sockets.discard(plain)
            self._sockets.add(encrypted)
        connection = http.client.HTTPSConnection(host, port, context=context)
        connection.sock = encrypted
        return connection

    def _forget(self, used: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(used)
        used.close()

    def _give_back(
        self, place: Place, connection: http.client.HTTPConnection, plug: socket.socket, *, keep: bool
    ) -> None:
        with self._lock:
            self._sockets.discard(plug)
            if keep and not self._cancelled and connection.sock is not None:
                self._idle.setdefault(place, []).append(connection)
                return
        connection.close()

    def cancel(self) -> None:
        """Who waits fails soon, now and from now on."""
        with self._lock:
            self._cancelled = True
            for each in self._sockets:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)  # closed by the thread that uses it
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled


class Http:
    """One URL. Versions are told apart by the ETag, else Last-Modified, and by the size.

    Args:
        url: ``http:`` or ``https:``; may have a user and a password.
        options: ``headers`` for each request; ``ssl``: False for not looking at certificates.
        traits: of the store.

    Raises:
        ValueError: other options, or no server in the URL.
    """

    def __init__(self, url: str, options: Mapping[str, Any], traits: Traits) -> None:
        if wrong := sorted(options.keys() - _OPTIONS):
            raise ValueError(f"no option of a URL of HTTP: {', '.join(wrong)}; there are: headers, ssl")
        headers = options.get("headers", {})
        if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
            raise ValueError("headers are a dictionary of strings")
        self.traits = traits
        self._split = urlsplit(url)
        if not self._split.hostname:
            raise ValueError(f"no server in {url.rsplit('@', 1)[-1]!r}")
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "k42", "Accept": "*/*"} | headers
        if self._split.username is not None:
            user = f"{unquote(self._split.username)}:{unquote(self._split.password or '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        self._connections = Connections(traits.timeout, verify=options.get("ssl", True) is not False)
        self._version: tuple[int, str, str] | None = None

    def open(self) -> tuple[int, Hashable]:
        """See `Remote.open`."""
        self._version = self._probe()
        return self._version[0], self._version

    def current(self) -> tuple[int, Hashable]:
        """See `Remote.current`."""
        now = self._probe()
        return now[0], now

    def cancel(self) -> None:
        """See `Remote.cancel`."""
        self._connections.cancel()

    def close(self) -> None:
        """See `Remote.close`."""
        self._connections.cancel()

    def read(self, offset: int, length: int, put: Put) -> None:
        """See `Remote.read`."""
        assert self._version is not None
        size, etag, modified = self._version
        last = offset + length - 1
        deadline = time.monotonic() + WHOLE * self.traits.timeout

        def take(response: http.client.HTTPResponse) -> None:
            if response.status in (412, 416):
                raise Changed
            first, end, total = self._range_of(response)
            if total != size or response.headers.get("ETag", "") != etag:
                raise Changed
            if not etag and response.headers.get("Last-Modified", "") != modified:
                raise Changed
            if (first, end) != (offset, last):
                raise Refused(f"asked for bytes {offset}-{last}, the server gave {first}-{end}")
            if response.length not in (None, length):
                raise Refused(f"the server gave {response.length} bytes for a range of {length}")
            done = 0
            while done < length:
                piece = _frames.buffer(min(_PIECE, length - done))
                got = response.readinto(piece)
                if not got:
                    raise Transient(f"the answer ended after {done} of {length} bytes")
                put(offset + done, piece[:got])
                done += got
                if time.monotonic() > deadline:
                    raise Transient(f"{done} of {length} bytes within {WHOLE * self.traits.timeout:g} s")
            if response.read(1):
                raise Refused(f"the server gave more than the {length} bytes of the range")

        self._get(offset, last, take)

    def _get(self, first: int, last: int, take: Callable[[http.client.HTTPResponse], T]) -> T:
        headers = self._headers | {"Range": f"bytes={first}-{last}"}
        if self._version is not None and self._version[1].startswith('"'):
            headers["If-Match"] = self._version[1]
        split = self._split
        for _ in range(_REDIRECTS + 1):
            found: str | None = None

            def follow(response: http.client.HTTPResponse) -> T | None:
                nonlocal found
                found = response.headers.get("Location") if response.status in _REDIRECTED else None
                return None if found else take(response)

            result = self._exchange(split, headers, follow)
            if not found:
                return result  # type: ignore[return-value]
            before, split = split, urlsplit(urljoin(split.geturl(), found))
            if split.scheme not in ("http", "https") or not split.hostname:
                raise Refused("the server sends us to where there is no HTTP")
            if (before.scheme, before.netloc) != (split.scheme, split.netloc):
                # What proves who we are is for the server that it was meant for.
                own = {"range", "if-match", "accept-encoding", "user-agent", "accept"}
                headers = {name: value for name, value in headers.items() if name.lower() in own}
        raise Refused(f"the server sends us on more than {_REDIRECTS} times")

    def _exchange(
        self, split: SplitResult, headers: Mapping[str, str], take: Callable[[http.client.HTTPResponse], T]
    ) -> T:
        """In the words of `Remote`."""
        try:
            return self._connections.exchange(split, headers, take)
        except StoreError:
            raise  # of the page cache
        except (OSError, http.client.HTTPException) as error:
            if self._connections.cancelled:
                raise Refused("it is being closed") from error
            if isinstance(error, http.client.InvalidURL):
                raise Refused(str(error)) from error
            if isinstance(error, TimeoutError):
                raise Transient(f"no answer within {self.traits.timeout:g} s") from error
            raise Transient(f"{type(error).__name__}: {error}") from error
        except Transient as error:
            if self._connections.cancelled:
                raise Refused("it is being closed") from error
            raise

    def _probe(self) -> tuple[int, str, str]:
        """(size, ETag, Last-Modified). Not by HEAD, of which servers say less, and not always the same."""

        def take(response: http.client.HTTPResponse) -> tuple[int, str, str]:
            headers = response.headers
            etag = headers.get("ETag", "")
            modified = headers.get("Last-Modified", "")
            if response.status == 416 and headers.get("Content-Range", "").replace(" ", "") == "bytes*/0":
                return 0, etag, modified
            if response.status == 412:
                raise Changed
            if response.status == 200:
                raise Unsupported(f"{self._where()}: its server gives no parts of it (ranges): download it")
            _, _, total = self._range_of(response)
            if response.length == 1:
                response.read()  # so that the connection can be used again
            return total, etag, modified

        size, etag, modified = self._get(0, 0, take)
        if size and not etag and not modified:
            raise Unsupported(
                f"{self._where()}: its server says neither ETag nor Last-Modified, so that a change of it in the "
                "middle could not be noticed: download it"
            )
        return size, etag, "" if etag else modified

    def _where(self) -> str:
        return self._split._replace(netloc=self._split.netloc.rsplit("@", 1)[-1]).geturl()

    @staticmethod
    def _range_of(response: http.client.HTTPResponse) -> tuple[int, int, int]:
        """(first, last, total) of an answer that is a range, and of the bytes themselves."""
        status, headers = response.status, response.headers
        if may_pass(status):
            raise Transient(f"HTTP status {status} {response.reason}", retry_after(headers.get("Retry-After", "")))
        if status == 200:
            raise Refused("the server gave all of it when asked for a part")
        if status != 206:
            raise Refused(f"HTTP status {status} {response.reason}")
        if headers.get("Content-Encoding", "identity") != "identity":
            raise Refused("the server encodes what it gives, though asked not to")
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", ""), re.ASCII)
        if found is None:
            raise Refused(f"the server gave a range {headers.get('Content-Range')!r}: of what size?")
        first, last, total = map(int, found.groups())
        return first, last, total
