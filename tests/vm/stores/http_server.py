"""An HTTP server of files with ranges, on 127.0.0.1, that can be told to misbehave."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[["Handler", int, int], bool]
"""Called with the handler and the range [first, last] asked for; True: it has answered by itself."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server
    content: bytes

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.requests.append((self.path, self.headers))
            content = server.files.get(self.path)
        if content is None:
            self.plain(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            self.content = content
            self.give(200, content, None)
            return
        first, last = int(asked[1]), int(asked[2])
        # The first request of an opening is for one byte: tricks are for what comes after it.
        if (first, last) != (0, 0) or server.also_at_open:
            with server.lock:
                trick = server.tricks.pop(0) if server.tricks else server.always
            self.content = content
            if trick is not None and trick(self, first, last):
                return
            content = server.files[self.path]
        self.content = content  # of one version from here on: the server that changes does not lie
        demanded = self.headers.get("If-Match")
        if demanded is not None and server.conditional and demanded != self.etag(content):
            self.plain(412)
            return
        if first >= len(content):
            self.plain(416, {"Content-Range": f"bytes */{len(content)}"})
            return
        last = min(last, len(content) - 1)
        self.give(206, content[first : last + 1], f"bytes {first}-{last}/{len(content)}")

    def etag(self, content: bytes) -> str:
        return self.server.weak * "W/" + f'"{hashlib.md5(content).hexdigest()}"'

    def headers_of(self, content: bytes) -> dict[str, str]:
        headers = {}
        if self.server.with_etag:
            headers["ETag"] = self.etag(content)
        if self.server.modified:
            headers["Last-Modified"] = self.server.modified
        return headers

    def give(self, status: int, body: bytes, range_: str | None, length: int | None = None, **more: str) -> None:
        """An answer; `length`: what it says that the body has."""
        self.send_response(status)
        for name, value in (self.headers_of(self.content) | more).items():
            self.send_header(name.replace("_", "-"), value)
        if range_ is not None:
            self.send_header("Content-Range", range_)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        if length not in (None, len(body)):
            self.close_connection = True

    def plain(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, object]] = []
        self.tricks: list[Answer | None] = []  # for the next requests, one each
        self.always: Answer | None = None
        self.also_at_open = False
        self.conditional = True
        self.with_etag = True
        self.weak = False
        self.modified = "Sat, 01 Jan 2022 00:00:00 GMT"
        self.released = threading.Event()  # what slow answers wait for
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def handle_error(self, *_: object) -> None:
        pass  # of clients that went away

    def end(self) -> None:
        self.released.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


def status(code: int, **headers: str) -> Answer:
    def answer(handler: Handler, first: int, last: int) -> bool:
        handler.plain(code, {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return answer


def hang_up(handler: Handler, first: int, last: int) -> bool:
    handler.close_connection = True
    return True


def truncated(handler: Handler, first: int, last: int) -> bool:
    content = handler.content
    body = content[first : last + 1]
    handler.give(206, body[: len(body) // 2], f"bytes {first}-{last}/{len(content)}", len(body))
    return True


def hanging(handler: Handler, first: int, last: int) -> bool:
    handler.server.released.wait(60)
    handler.close_connection = True
    return True


def slow(handler: Handler, first: int, last: int) -> bool:
    content = handler.content
    body = content[first : last + 1]
    handler.send_response(206)
    for name, value in handler.headers_of(content).items():
        handler.send_header(name, value)
    handler.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    for at in range(0, len(body), 1000):
        handler.wfile.write(body[at : at + 1000])
        time.sleep(0.01)
    return True


def short_but_says_so(handler: Handler, first: int, last: int) -> bool:
    content = handler.content
    handler.give(206, content[first:last], f"bytes {first}-{last}/{len(content)}")
    return True


def too_long(handler: Handler, first: int, last: int) -> bool:
    content = handler.content
    handler.give(206, content[first : last + 1] + b"more", f"bytes {first}-{last}/{len(content)}")
    return True


def too_long_without_length(handler: Handler, first: int, last: int) -> bool:
    content = handler.content
    handler.send_response(206)
    handler.send_header("ETag", handler.etag(content))
    handler.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for piece in (content[first : last + 1], b"more"):
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    handler.wfile.write(b"0\r\n\r\n")
    return True


def another_range(handler: Handler, first: int, last: int) -> bool:
    content = handler.content
    body = content[first + 1 : last + 2]
    handler.give(206, body, f"bytes {first + 1}-{last + 1}/{len(content)}")
    return True


def shorter_range(handler: Handler, first: int, last: int) -> bool:
    content = handler.content
    handler.give(206, content[first : last - 9], f"bytes {first}-{last - 10}/{len(content)}")
    return True


def no_range(handler: Handler, first: int, last: int) -> bool:
    content = handler.content
    handler.give(206, content[first : last + 1], None)
    return True


def unknown_total(handler: Handler, first: int, last: int) -> bool:
    content = handler.content
    handler.give(206, content[first : last + 1], f"bytes {first}-{last}/*")
    return True


def everything(handler: Handler, first: int, last: int) -> bool:
    handler.give(200, handler.content, None)
    return True


def the_part_as_everything(handler: Handler, first: int, last: int) -> bool:
    handler.give(200, handler.content[first : last + 1], None)
    return True


def encoded(handler: Handler, first: int, last: int) -> bool:
    import gzip

    content = handler.content
    body = gzip.compress(content[first : last + 1])
    handler.give(206, body, f"bytes {first}-{last}/{len(content)}", Content_Encoding="gzip")
    return True
