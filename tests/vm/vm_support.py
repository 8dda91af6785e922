"""What the tests of the virtual memory system share."""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from k42 import vm
from k42.testing import PausePoint
from k42.vm.fr import _frames
from k42.vm.kernel import Kernel
from k42.vm.variants import Variants

PAGE = 4096
PAGES = 64  # of the file `path`
_LIMIT = 70.0  # seconds; scripts end themselves after 60

# Every script: no core files (SIGBUS makes them), and the names that nearly all need.
_PRELUDE = """
import os, resource, signal, sys, threading
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
signal.alarm(60)  # a fault that hangs may hold the GIL: only Linux can end it
def say(*words):
    print(*words, flush=True)
"""
_CONNECT = """
import warnings
import k42.vm as vm
warnings.simplefilter("ignore", vm.UserModeOnlyWarning)  # tests of it connect by themselves
"""


def words(size: int, seed: int = 0) -> bytes:
    """Bytes in which each eight say where they are: a page at the wrong place, of zeros, or of another file shows."""
    first = (seed << 40) + 1
    return array.array("Q", range(first, first + -(-size // 8))).tobytes()[:size]


def until(condition: Callable[[], Any], what: str, limit: float = 30.0) -> Any:
    """Polls; the value of the condition once it is true."""
    deadline = time.monotonic() + limit
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {limit:g} s: {what}"
        time.sleep(0.005)
    return value


class Script:
    """A Python process that runs the code given, with its output at hand."""

    def __init__(
        self, code: str, *arguments: object, connect: bool = True, options: tuple[str, ...] = (), **popen: Any
    ):
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        source = _PRELUDE + _CONNECT * connect + textwrap.dedent(code)
        self.process = subprocess.Popen(
            [sys.executable, *options, "-c", source, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,  # so that its children can be ended with it
            **popen,
        )
        self.pid = self.process.pid
        self._output = b""

    def line(self) -> str:
        """Its next line of output; fails, with what it said on stderr, when there is none."""
        while b"\n" not in self._output:
            more = self._read()
            assert more, f"the script ended with {self.finish()}:\n{self.stderr()}"
            self._output += more
        line, self._output = self._output.split(b"\n", 1)
        return line.decode()

    def _read(self) -> bytes:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], _LIMIT)
        assert ready, f"the script said nothing for {_LIMIT:g} s:\n{self.stderr()}"
        return os.read(self.process.stdout.fileno(), 65536)

    def tell(self, text: str = "go") -> None:
        """Gives it a line of input."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def finish(self) -> int:
        """Waits for its end; its exit status."""
        return self.process.wait(_LIMIT)

    def rest(self) -> str:
        """What it still printed."""
        while more := self._read():
            self._output += more
        output, self._output = self._output.decode(), b""
        return output

    def stderr(self) -> str:
        """What it has written to stderr so far."""
        self._stderr.seek(0)
        return self._stderr.read()

    def good(self) -> str:
        """Waits for a good end; what it printed."""
        output = self.rest()
        assert self.finish() == 0, f"{output}\n{self.stderr()}"
        return output

    def dispose(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class Kernels:
    """Starts kernels, and looks at each when it ends."""

    def __init__(self) -> None:
        self._folders = contextlib.ExitStack()
        self._started: list[vm.KernelProcess] = []
        self._killed: set[int] = set()

    def __call__(self, budget: int = 64 << 20, **options: Any) -> vm.KernelProcess:
        folder = self._folders.enter_context(tempfile.TemporaryDirectory(prefix="k42-"))
        kernel = vm.launch(Path(folder) / "kernel.sock", budget, **options)
        self._started.append(kernel)
        return kernel

    def kill(self, kernel: vm.KernelProcess) -> None:
        self._killed.add(kernel.pid)
        kernel.kill()

    def end(self) -> None:
        with self._folders:
            for kernel in self._started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(kernel.pid, signal.SIGCONT)  # a test that failed may have left it stopped
                status = kernel.stop()
                assert status == (-signal.SIGKILL if kernel.pid in self._killed else 0), kernel.log.read_text()
                assert "Traceback" not in kernel.log.read_text(), kernel.log.read_text()


@contextlib.contextmanager
def running(socket: Path, pages: int, objects: str = "default", **options: Any) -> Iterator[Kernel]:
    """A kernel in this process, whose objects a test can reach. Its clients must be other processes."""
    kernel = Kernel(socket, pages * PAGE, None, Variants.named(objects), **options)
    thread = threading.Thread(target=kernel.run)
    thread.start()
    try:
        yield kernel
    finally:
        kernel.stop()
        thread.join(60)
        assert not thread.is_alive()


@contextlib.contextmanager
def held(monkeypatch: Any, what: str) -> Iterator[PausePoint]:
    """Holds a kernel in this process inside its I/O, until the point is resumed.

    Args:
        monkeypatch: pytest's.
        what: ``"fill"``: what was read is not in the frames yet; ``"write-back"``: what the frames had is not in the
            store yet.
    """
    name = {"fill": "put_padded", "write-back": "take"}[what]
    original = getattr(_frames, name)
    with PausePoint() as point:

        def put_later(*arguments: Any) -> None:
            point()
            original(*arguments)

        def take_early(*arguments: Any) -> Any:
            taken = original(*arguments)
            point()
            return taken

        monkeypatch.setattr(_frames, name, put_later if what == "fill" else take_early)
        yield point


class Raw:
    """A connection that says what the test wants, right or wrong."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(str(path))  # with a time limit it would not wait for a place in the queue
        self.socket.settimeout(30)

    def ask(self, message: object, descriptors: tuple[int, ...] = ()) -> dict[str, Any]:
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        socket.send_fds(self.socket, [data], list(descriptors))
        reply, received, _, _ = socket.recv_fds(self.socket, 65536, 8)
        for descriptor in received:
            os.close(descriptor)
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def descriptors_of(pid: int) -> list[str]:
    """What the descriptors of a process lead to."""
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            links.append(os.readlink(entry))
    return links


def frame_bytes(pid: int) -> int:
    """Memory in the kernel's frames, as Linux counts it."""
    blocks = {}  # by inode: while the kernel hands a memfd to a client it has two descriptors of it
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(entry).startswith("/memfd:k42:"):
                status = entry.stat()
                blocks[status.st_ino] = status.st_blocks
    return sum(blocks.values()) * 512


def anonymous_bytes(pid: int) -> int:
    """Memory of a process's own. By a walk of its page tables: the counters in /proc/PID/status are approximate."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def file_counts(client: Any, path: Path) -> dict[str, Any]:
    """The kernel's counts of one file."""
    [counts] = [file for file in client.stat()["files"] if file["name"] == str(path)]
    found: dict[str, Any] = counts
    return found


def stop(pid: int) -> None:
    """Stops a process, and returns when none of its threads runs: the signal alone may take a while to reach them."""
    os.kill(pid, signal.SIGSTOP)

    def stopped() -> bool:
        states = [entry.read_text().rsplit(") ", 1)[1][0] for entry in Path(f"/proc/{pid}/task").glob("*/stat")]
        return set(states) == {"T"}

    until(stopped, "the process stops")


def has_ended(pid: int) -> bool:
    """Gone, or a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] == "Z"
    except OSError:
        return True
