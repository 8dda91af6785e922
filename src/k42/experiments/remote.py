"""remote: a `.npy` over HTTP, read whole, in slices and at random, where each request takes 20 ms to be answered.

The server is a process of its own on this machine. Its line takes 100 MB/s, which all requests of the same time share:
about what a gigabit network or one stream from an object store gives.

- `download`: all of it by one request, then from memory. The yardstick of `whole`.
- `readahead`, `blockcache`: fsspec's file objects with these caches, with its default block of 5 MiB.
- `k42`: k42.vm.

What is read is compared with the file. Each run reads from a URL of its own, so that nobody has any of it cached. At
last two processes read all of one URL by one kernel, and what the server has sent is counted.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from k42.errors import Error
from k42.experiments._record import Case, Samples
from k42.experiments._runner import Options, Report, interleave, own_kernel, python

NBYTES = 64 * 2**20
QUICK_NBYTES = 16 * 2**20
LATENCY = 0.02  # s
RATE = 100_000_000  # bytes/s
PIECE = 2**20  # bytes read at once of the whole
SLICE = 64 * 1024  # bytes
SLICES = 16
READS = 32  # of 4 KiB, at random
ROUNDS = 5
BUDGET = 1024 * 2**20  # bytes; no page is ever reclaimed
OPERATIONS = ("whole", "sliced", "random")

_Read = Callable[[int, int], bytes]  # takes an offset and a length


@contextlib.contextmanager
def server(path: Path) -> Iterator[str]:
    """Serve a file; yields the server's address."""
    process = python("_http", str(path), str(LATENCY), str(RATE))
    try:
        assert process.stdout
        port = process.stdout.readline().strip()
        if not port:
            raise Error("remote: the server did not start; what it wrote above says why")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url) as response:
        data: bytes = response.read()
        return data


@contextlib.contextmanager
def download(url: str) -> Iterator[_Read]:
    """Read from a copy in memory."""
    view = memoryview(_get(url))
    yield lambda offset, length: bytes(view[offset : offset + length])


@contextlib.contextmanager
def cached(cache: str, url: str) -> Iterator[_Read]:
    """Read from a file object of fsspec."""
    import fsspec

    with fsspec.filesystem("http", skip_instance_cache=True).open(url, cache_type=cache) as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            data: bytes = file.read(length)
            return data

        yield read


@contextlib.contextmanager
def own(client: Any, url: str) -> Iterator[_Read]:
    """Read from a mapping."""
    with client.open(url) as mapping:
        yield lambda offset, length: mapping[offset : offset + length]


def reads(operation: str, size: int) -> list[tuple[int, int]]:
    """What an operation reads: offsets and lengths."""
    if operation == "whole":
        return [(offset, min(PIECE, size - offset)) for offset in range(0, size, PIECE)]
    if operation == "sliced":
        return [(size // SLICES * number, SLICE) for number in range(SLICES)]
    chance = random.Random(42)
    return [(chance.randrange(size - 4096) // 4096 * 4096, 4096) for _ in range(READS)]


def time_of(
    make: Callable[[str], contextlib.AbstractContextManager[_Read]],
    operation: str,
    expected: bytes,
    url: Callable[[], str],
) -> float:
    """The seconds that an operation takes, opening included.

    Raises:
        Error: what was read is not what the file is.
    """
    wanted = reads(operation, len(expected))
    start = time.perf_counter()
    with make(url()) as read:
        pieces = [read(*each) for each in wanted]
        seconds = time.perf_counter() - start
    view = memoryview(expected)
    for (offset, length), piece in zip(wanted, pieces, strict=True):
        if piece != view[offset : offset + length]:
            raise Error(f"remote: {length} bytes at {offset} are not what the file is")
    return seconds


def fetched_by_two(socket: str, url: str, path: Path, address: str) -> float:
    """How often the server sends each byte when two processes read all of it at the same time by one kernel."""
    _get(f"{address}/reset")
    command = [sys.executable, "-m", "k42.experiments._remote", socket, url, str(path)]
    readers = [subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0) for _ in range(2)]
    try:
        for reader in readers:
            assert reader.stdin
            reader.stdin.write(b"go\n")
            reader.stdin.flush()
        for reader in readers:
            reader.wait()
        if any(reader.returncode for reader in readers):
            raise Error("remote: a reading process failed; what it wrote above says why")
    finally:
        for reader in readers:
            reader.kill()
            reader.communicate()
    sent: int = json.loads(_get(f"{address}/count"))["bytes"]
    return sent / path.stat().st_size


def run(options: Options) -> Report:
    """Measure remote; `time` is in s."""
    try:
        import fsspec  # noqa: F401
        import numpy
    except ImportError as error:
        raise Error("remote needs numpy and fsspec: pip install 'k42[numpy,url]'") from error
    from k42 import vm

    nbytes = QUICK_NBYTES if options.quick else NBYTES
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="k42-remote-"))) / "array.npy"
        numpy.save(path, numpy.arange(nbytes // 8))
        expected = path.read_bytes()
        address = stack.enter_context(server(path))
        socket = stack.enter_context(own_kernel(BUDGET))
        client = stack.enter_context(vm.connect(socket))
        urls = (f"{address}/{number}/array.npy" for number in range(1 << 30))
        makes: dict[str, Callable[[str], contextlib.AbstractContextManager[_Read]]] = {
            "download": download,
            "readahead": functools.partial(cached, "readahead"),
            "blockcache": functools.partial(cached, "blockcache"),
            "k42": functools.partial(own, client),
        }
        samples = interleave(
            [
                Case(
                    f"{operation}/{name}",
                    1,
                    {"bytes": len(expected)},
                    functools.partial(time_of, make, operation, expected, urls.__next__),
                )
                for operation in OPERATIONS
                for name, make in makes.items()
            ],
            ROUNDS,
        )
        times = fetched_by_two(socket, next(urls), path, address)
    return Report(
        f"remote: {nbytes >> 20} MiB over HTTP, {LATENCY * 1e3:.0f} ms a request, {RATE / 1e6:.0f} MB/s",
        [each.record("remote", "time", "s") for each in samples],
        [*findings(samples), f"two processes: each byte was sent {times:.3f} times, wanted: 1"],
    )


def findings(samples: Sequence[Samples]) -> list[str]:
    """The ratios of k42 to the others, a line each."""
    by_name = {each.case.implementation: each for each in samples}
    lines = []
    for operation in OPERATIONS:
        for other in ("download", "readahead", "blockcache"):
            wanted = ", wanted: at most 1.2" if (operation, other) == ("whole", "download") else ""
            ratio = by_name[f"{operation}/k42"].ratio(by_name[f"{operation}/{other}"])
            lines.append(f"{operation}: k42 / {other} = {ratio:.2f}{wanted}")
    return lines
