"""Paging: a file of four times the memory, read and written in order and at random.

Linux and k42 have the same memory: each runs in a control group with the same limit, which holds all that its
processes have and cache. For k42 these are a client and the kernel, two Python processes, and the kernel's budget is
what the limit leaves. The file is four times as large as that budget. Nothing of it is cached when a run begins. A
write includes the flush at the end.

- `linux`: mmap.mmap.
- `k42-fifo`, `k42-clock`, `k42-s3fifo`: k42.vm with each policy of replacement.

A page begins with its number, and every visit of a page checks it; after a run that writes, the file is compared with
what was written. Runs at random are announced by madvise(MADV_RANDOM) in both: one page is read at a time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from k42.errors import Error
from k42.experiments._cgroup import limited
from k42.experiments._record import PAGE, Case, Samples
from k42.experiments._runner import Options, Report, interleave, python

BUDGET = 128 * 2**20  # bytes: of the kernel
PROCESSES = 64 * 2**20  # bytes: what a kernel and its client have beside the pages, and Linux's own for both
QUICK_BUDGET = 48 * 2**20
TIMES = 4  # the file is so many times the budget
ROUNDS = 5
VISITS = 24_576  # at random
QUICK_VISITS = 4096

POLICIES = {"linux": None, "k42-fifo": "fifo", "k42-clock": "clock", "k42-s3fifo": "s3fifo"}
OPERATIONS = ("sequential read", "sequential write", "random read", "random write")


def write_file(path: Path, pages: int) -> None:
    """A file of pages that begin with their numbers, which is on the disk afterwards."""
    with path.open("wb") as file:
        for number in range(pages):
            file.write(struct.pack("<QQ", number, 0).ljust(PAGE, b"k"))
        file.flush()
        os.fsync(file.fileno())


def check_file(path: Path, stamp: int, written: int) -> None:
    """Compare a file with what was written to it.

    Args:
        path: the file.
        stamp: what was written to pages.
        written: how many there are of those; 0: not known, but some.

    Raises:
        Error: it is not what it must be.
    """
    stamped = 0
    with path.open("rb") as file:
        number = 0
        while page := file.read(PAGE):
            found, value = struct.unpack_from("<QQ", page)
            if found != number or page[16:] != b"k" * (PAGE - 16):
                raise Error(f"paging: page {number} of the file was lost")
            stamped += value == stamp
            number += 1
    if stamped != written:
        raise Error(f"paging: {stamped} pages were written, of {written}")


def visited(pages: int, count: int, seed: int) -> int:
    """How many different pages `k42._native.visit_pages` visits."""
    numbers, random = set(), seed
    for _ in range(count):
        random ^= random << 13 & 0xFFFF_FFFF_FFFF_FFFF
        random ^= random >> 7
        random ^= random << 17 & 0xFFFF_FFFF_FFFF_FFFF
        numbers.add(random % pages)
    return len(numbers)


class Worker:
    """The process of one implementation."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.path = Path(job["path"])
        self._process = python("_paging", json.dumps(job))
        self.used: int = self._answer()["used"]

    def run(self, **request: int) -> float:
        """The seconds that a pattern takes."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise Error("paging: a process ended early, perhaps for want of memory; what it wrote above says why")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Error(answer["error"])
        return answer

    def end(self) -> None:
        """End it, and the kernel that it started."""
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()


@contextlib.contextmanager
def workers(names: Sequence[str], budget: int, folder: Path) -> Iterator[dict[str, Worker]]:
    """A process for each implementation, each in a group of its own, with a file of its own."""
    made: dict[str, Worker] = {}
    first = folder / "file"
    write_file(first, TIMES * budget // PAGE)
    with contextlib.ExitStack() as stack:
        for name in names:
            group = stack.enter_context(limited(f"k42-paging-{name}", budget + PROCESSES))
            path = folder / name
            shutil.copyfile(first, path)
            made[name] = Worker(
                {"group": group, "path": str(path), "budget": budget, "policy": POLICIES[name]},
            )
            stack.callback(made[name].end)
        yield made


def throughput(worker: Worker, operation: str, pages: int, visits: int, rounds: Callable[[], int]) -> float:
    """MB/s of pages visited."""
    order, _, what = operation.partition(" ")
    stamp = rounds() if what == "write" else 0
    seed, count = (0x9E3779B97F4A7C15 + stamp, visits) if order == "random" else (0, pages)
    seconds = worker.run(count=count, seed=seed, stamp=stamp)
    if stamp:
        check_file(worker.path, stamp, visited(pages, count, seed) if seed else pages)
    return count * PAGE / seconds / 1e6


def measure(options: Options) -> list[Samples]:
    """Measure all operations of all implementations, interleaved."""
    budget, visits = (QUICK_BUDGET, QUICK_VISITS) if options.quick else (BUDGET, VISITS)
    pages = TIMES * budget // PAGE
    stamps = iter(range(1, 1 << 30))
    with (
        tempfile.TemporaryDirectory(prefix="k42-paging-", dir="/var/tmp") as folder,
        workers(list(POLICIES), budget, Path(folder)) as made,
    ):
        return interleave(
            [
                Case(
                    f"{operation}/{name}",
                    1,
                    {
                        "budget": budget,
                        "limit": budget + PROCESSES,
                        "bytes": TIMES * budget,
                        "visits": visits if operation.startswith("random") else pages,
                    },
                    functools.partial(throughput, worker, operation, pages, visits, stamps.__next__),
                )
                for operation in OPERATIONS
                for name, worker in made.items()
            ],
            ROUNDS,
        )


def findings(samples: Sequence[Samples]) -> list[str]:
    """The ratios to Linux, a line each."""
    by_name = {each.case.implementation: each for each in samples}
    lines = []
    for operation in OPERATIONS:
        wanted = 1 if operation.startswith("sequential") else 0.8
        for name in POLICIES:
            if name != "linux":
                ratio = by_name[f"{operation}/{name}"].ratio(by_name[f"{operation}/linux"])
                lines.append(f"{operation}: {name} / linux = {ratio:.2f}, wanted: at least {wanted:g}")
    return lines


def run(options: Options) -> Report:
    """Measure paging; `throughput` is in MB/s of the pages that were visited."""
    samples = measure(options)
    parameters = samples[0].case.parameters
    return Report(
        f"paging: a file of {parameters['bytes'] >> 20} MiB, in {parameters['limit'] >> 20} MiB of memory",
        [each.record("paging", "throughput", "MB/s") for each in samples],
        findings(samples),
    )
