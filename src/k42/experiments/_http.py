"""The server of the experiment `remote`: one file over HTTP, with parts (ranges), and a latency for each request.

In a process of its own: arguments are the file, the latency in seconds, and bytes per second for all together (0: as
fast as it goes). It says its port, and serves until its standard input ends. Any path is the file, but ``/count``,
which says how many bytes of it were sent, and ``/reset``, which does too and counts from 0 again.
"""

from __future__ import annotations

import http.server
import json
import re
import sys
import threading
import time
from pathlib import Path

_CHUNK = 256 * 1024  # bytes sent at once


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    protocol_version = "HTTP/1.1"
    data = b""
    latency = 0.0
    rate = 0
    lock = threading.Lock()  # protects the next three
    sent = 0
    requests = 0
    free_at = 0.0  # monotonic time at which the line has sent what was given to it

    def do_HEAD(self) -> None:
        """Answer a request for the size."""
        self._answer(body=False)

    def do_GET(self) -> None:
        """Answer a request."""
        if self.path in ("/count", "/reset"):
            with self.lock:
                counts = json.dumps({"bytes": Handler.sent, "requests": Handler.requests}).encode()
                if self.path == "/reset":
                    Handler.sent = Handler.requests = 0
            self.send_response(200)
            self.send_header("Content-Length", str(len(counts)))
            self.end_headers()
            self.wfile.write(counts)
        else:
            self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        time.sleep(self.latency)
        size = len(self.data)
        first, end = 0, size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, end = int(asked[1]), min(size, int(asked[2] or size - 1) + 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(end - first))
        self.end_headers()
        if body:
            with self.lock:
                Handler.requests += 1
            try:
                for start in range(first, end, _CHUNK):
                    self._send(memoryview(self.data)[start : min(start + _CHUNK, end)])
            except OSError:
                self.close_connection = True  # the client has enough

    def _send(self, piece: memoryview) -> None:
        with self.lock:
            now = time.monotonic()
            Handler.sent += len(piece)
            if self.rate:
                Handler.free_at = max(Handler.free_at, now) + len(piece) / self.rate
            wait = Handler.free_at - now
        if wait > 0:
            time.sleep(wait)
        self.wfile.write(piece)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def main() -> None:
    """Serve the file that the arguments name."""
    Handler.data = Path(sys.argv[1]).read_bytes()
    Handler.latency, Handler.rate = float(sys.argv[2]), int(sys.argv[3])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
