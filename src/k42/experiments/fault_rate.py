"""fault-rate: how many resident pages a second many threads can have mapped.

Sixteen threads, bound to nothing, read one byte of each page of their part of one mapping. All pages are resident and
none is mapped; each fault maps neighbours with its own page.

- `linux`: a shared mapping of a memfd; Linux maps up to 16 pages a fault.
- `k42, 64 KiB around`: the default, 16 pages a fault too.
- `k42, 2 MiB around`: up to 512 pages a fault.

The paper has no such figure.
"""

from __future__ import annotations

import functools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from k42 import _native
from k42.experiments._record import PAGE, Case, Samples
from k42.experiments._runner import Options, Report, cpus, interleave, own_kernel
from k42.experiments.faults import linux_shared

if TYPE_CHECKING:
    from typing_extensions import Buffer

THREADS = 16
PAGES = 4096  # of each thread
QUICK_PAGES = 1024
ROUNDS = 11
QUICK_ROUNDS = 5
WANTED = 1.5e6  # pages a second


def pages_per_second(mapped: Callable[[], AbstractContextManager[Buffer]], pages: int) -> float:
    """The rate at which all threads together get to their pages.

    Args:
        mapped: maps the memory.
        pages: of 4 KiB, of each thread.
    """
    barrier = threading.Barrier(THREADS)

    def body(memory: Buffer) -> tuple[int, int]:
        barrier.wait()
        start = time.monotonic_ns()
        _native.touch(memory, PAGE, False, 0)
        return start, time.monotonic_ns()

    nbytes = pages * PAGE
    with mapped() as whole, memoryview(whole) as view:
        _native.touch(view, PAGE, False, 0)
        _native.dontneed(view)
        parts = [view[n * nbytes : (n + 1) * nbytes] for n in range(THREADS)]
        with ThreadPoolExecutor(THREADS) as pool:
            times = list(pool.map(body, parts))
        for part in parts:
            part.release()
    return THREADS * pages / (max(end for _, end in times) - min(start for start, _ in times)) * 1e9


def measure(pages: int, rounds: int) -> list[Samples]:
    """Measure Linux and both sizes of fault-around, interleaved."""
    from k42 import vm

    nbytes = THREADS * pages * PAGE
    with (
        TemporaryDirectory(prefix="k42-") as folder,
        own_kernel(2 * nbytes) as socket,
        vm.connect(socket) as client,
    ):
        path = Path(folder) / "file"
        path.touch()
        with path.open("r+b") as file:
            file.truncate(nbytes)
        makes: dict[str, Callable[[], AbstractContextManager[Buffer]]] = {
            "linux": functools.partial(linux_shared, 0, nbytes, PAGE)
        }
        for name, around in (("64 KiB", 64 << 10), ("2 MiB", 2 << 20)):
            makes[f"k42, {name} around"] = functools.partial(client.open, path, fault_around=around)
        with client.open(path):  # keeps the pages
            return interleave(
                [
                    Case(
                        name,
                        len(cpus()),
                        {"threads": THREADS, "pages": pages},
                        functools.partial(pages_per_second, make, pages),
                    )
                    for name, make in makes.items()
                ],
                rounds,
            )


def findings(samples: Sequence[Samples]) -> list[str]:
    """The rates of k42, and beside Linux, a line each."""
    linux = samples[0]
    return [
        f"{each.case.implementation}: {statistics.median(each.values) / 1e6:.2f} million pages a second, wanted: at "
        f"least {WANTED / 1e6:g}; {each.ratio(linux):.2f} of what Linux does"
        for each in samples[1:]
    ]


def run(options: Options) -> Report:
    """Measure the rate; `pages_per_second` is of all threads together."""
    samples = measure(*((QUICK_PAGES, QUICK_ROUNDS) if options.quick else (PAGES, ROUNDS)))
    return Report(
        f"fault-rate: {THREADS} threads touch resident pages",
        [each.record("fault-rate", "pages_per_second", "1/s") for each in samples],
        findings(samples),
    )
