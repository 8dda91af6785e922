"""What a page fault costs that user space serves: k42 beside Linux, and beside the least that it can cost.

Each thread touches every page of an array of its own: a one-byte write each 4 KiB, one thread a processor.
All implementations take turns in every round.

- `bare`: a native loop on a userfaultfd and a server thread of each CPU's own, pinned to the CPU that faults.
  The frames are there (a MINOR fault) and UFFDIO_CONTINUE maps them; nothing is looked up. The yardstick of
  `k42`.
- `bare-remote`: the same, but the server thread is pinned to another CPU: what it costs to lose locality.
- `bare-zero`: as `bare` where there is no frame yet (MISSING), by UFFDIO_ZEROPAGE. The yardstick of
  `k42-zero`.
- `linux`: a memfd's resident pages, mapped shared. Linux maps one of them a fault, as it is a write.
- `linux-read`: the same, read. Linux then maps up to 16 neighbours in one fault ("fault-around"), so that
  this, and not `linux`, is what k42 must be measured with where data is only read.
- `linux-anonymous`: private memory, filled with zeros at the fault; without huge pages, which would be one
  fault for 512 touches.
- `k42`: resident pages of an anonymous mapping, unmapped by madvise(MADV_DONTNEED), which leaves them
  resident; one page a fault.
- `k42-around`: the same, with the neighbours that a fault brings with it unless told otherwise.
- `k42-zero`: the first touches of an anonymous mapping.
- `k42-unpinned`: as `k42`, by threads that nothing binds to a CPU.
- `k42-parts`: as `k42-unpinned`, but the threads touch parts of one mapping. The first touches, which are not
  measured, are what homes its spans to the CPUs of the threads.

With 64 KiB pages `bare` and `k42` map 16 times 4 KiB in one fault; Linux has no such size here, and does the
same as with 4 KiB.

The paper has no such figure: it is what stands behind those of its section 4.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import mmap
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from k42 import _native
from k42.experiments._record import PAGE, PAGE_SIZES, Case, Samples, find
from k42.experiments._runner import Gate, Options, Report, interleave, on_processors, own_kernel

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from k42 import vm

PAGES = 2560  # as many as the paper's memclone touches, rounded to whole pages of 64 KiB
QUICK_PAGES = 512
ROUNDS = 11
QUICK_ROUNDS = 5
BUDGET = 512 * 2**20  # bytes; no page is ever reclaimed


@dataclasses.dataclass(frozen=True)
class _Implementation:
    """How a thread gets its array, and how it is touched.

    `make` takes the thread's CPU, the array's bytes and the page size. `resident`: the pages are brought in
    and unmapped again before the measured touches. `pinned`: threads are bound to CPUs. `parts`: one array, of which
    each thread touches its part.
    """

    make: Callable[[int, int, int], AbstractContextManager[Buffer]]
    resident: bool
    write: bool = True
    pinned: bool = True
    parts: bool = False


def _bare(cpu: int, nbytes: int, page_size: int) -> AbstractContextManager[Buffer]:
    return contextlib.nullcontext(_native.BareWindow(cpu, nbytes, page_size, True))


def _bare_remote(cpu: int, nbytes: int, page_size: int) -> AbstractContextManager[Buffer]:
    all_cpus = sorted(os.sched_getaffinity(os.getpid()))  # the process's: this thread is pinned
    return _bare(all_cpus[(all_cpus.index(cpu) + 1) % len(all_cpus)], nbytes, page_size)


def _bare_zero(cpu: int, nbytes: int, page_size: int) -> AbstractContextManager[Buffer]:
    return contextlib.nullcontext(_native.BareWindow(cpu, nbytes, page_size, False))


@contextlib.contextmanager
def linux_shared(_cpu: int, nbytes: int, _page_size: int) -> Iterator[Buffer]:
    """A memfd of Linux, mapped shared."""
    fd = os.memfd_create("k42-linux")
    try:
        os.ftruncate(fd, nbytes)
        memory = mmap.mmap(fd, nbytes)
    finally:
        os.close(fd)
    with memory:
        yield memory


@contextlib.contextmanager
def linux_anonymous(_cpu: int, nbytes: int, _page_size: int) -> Iterator[Buffer]:
    """Private memory of Linux that is filled with zeros, 4 KiB a fault."""
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        yield memory


BARE_AND_LINUX = {
    "bare": _Implementation(_bare, resident=True),
    "bare-remote": _Implementation(_bare_remote, resident=True),
    "bare-zero": _Implementation(_bare_zero, resident=False),
    "linux": _Implementation(linux_shared, resident=True),
    "linux-read": _Implementation(linux_shared, resident=True, write=False),
    "linux-anonymous": _Implementation(linux_anonymous, resident=False),
}


def _k42(client: vm.Client) -> dict[str, _Implementation]:
    def anonymous(_cpu: int, nbytes: int, page_size: int) -> AbstractContextManager[Buffer]:
        return client.anonymous(nbytes, page_size=page_size, fault_around=page_size)

    def around(_cpu: int, nbytes: int, page_size: int) -> AbstractContextManager[Buffer]:
        return client.anonymous(nbytes, page_size=page_size)

    return {
        "k42": _Implementation(anonymous, resident=True),
        "k42-around": _Implementation(around, resident=True),
        "k42-zero": _Implementation(anonymous, resident=False),
        "k42-unpinned": _Implementation(anonymous, resident=True, pinned=False),
        "k42-parts": _Implementation(anonymous, resident=True, pinned=False, parts=True),
    }


def time_per_page(implementation: _Implementation, processors: int, pages: int, page_size: int) -> float:
    """The time that a touch takes: the mean of the threads, in µs.

    Args:
        implementation: whose memory is touched.
        processors: how many threads.
        pages: of 4 KiB, touched by each thread.
        page_size: bytes.
    """

    nbytes = pages * PAGE

    def touch(memory: Buffer, gate: Gate) -> float:
        if implementation.resident:
            _native.touch(memory, PAGE, True, 0)
            _native.dontneed(memory)
        return _native.touch(memory, PAGE, implementation.write, gate.wait())

    def body(cpu: int, gate: Gate) -> float:
        with implementation.make(cpu, nbytes, page_size) as memory:
            return touch(memory, gate)

    if not implementation.parts:
        return statistics.mean(on_processors(processors, body, pinned=implementation.pinned)) / pages * 1e6
    numbers = itertools.count()
    with implementation.make(0, processors * nbytes, page_size) as whole, memoryview(whole) as view:

        def part(_: int, gate: Gate) -> float:
            number = next(numbers)
            with view[number * nbytes : (number + 1) * nbytes] as memory:
                return touch(memory, gate)

        return statistics.mean(on_processors(processors, part, pinned=implementation.pinned)) / pages * 1e6


def measure(
    implementations: dict[str, _Implementation], processors: Sequence[int], pages: int, rounds: int
) -> list[Samples]:
    """Measure each implementation with both page sizes, on each number of processors, interleaved."""
    return interleave(
        [
            Case(
                name,
                count,
                {"page_size": page_size, "pages": pages},
                functools.partial(time_per_page, implementation, count, pages, page_size),
            )
            for page_size in PAGE_SIZES
            for count in processors
            for name, implementation in implementations.items()
        ],
        rounds,
    )


def findings(samples: Sequence[Samples], processors: Sequence[int]) -> list[str]:
    """The ratios that matter, a line each: to the yardstick, to Linux, and of many processors to one."""
    lines = []
    small, large = PAGE_SIZES
    few, many = min(processors), max(processors)

    def compare(one: tuple[str, int, int], other: tuple[str, int, int], wanted: str = "") -> None:
        a, b = find(samples, *one), find(samples, *other)
        if a and b:
            named = [f"{name} ({size // 1024} KiB, {count} proc.)" for name, count, size in (one, other)]
            lines.append(f"{named[0]} / {named[1]} = {a.ratio(b):.2f}{wanted}")

    compare(("k42", few, small), ("bare", few, small), ", wanted: at most 1.4")
    compare(("k42-zero", few, small), ("bare-zero", few, small), ", wanted: at most 1.4")
    compare(("k42-unpinned", few, small), ("k42", few, small), ", wanted: at most 1.6")
    if many > few:
        compare(("k42-parts", many, small), ("bare", many, small), ", wanted: at most 1.6")
        for name in ("bare", "linux", "k42", "k42-zero", "k42-parts"):
            wanted = ", wanted: at most 1.1" if name.startswith("k42") else ""
            compare((name, many, small), (name, few, small), wanted)
    compare(("bare-remote", few, small), ("bare", few, small))
    compare(("k42", few, large), ("linux", few, small), ", wanted: at most 0.5")
    compare(("k42", few, large), ("linux-read", few, small))
    compare(("k42-around", few, small), ("linux-read", few, small))
    compare(("k42-zero", few, large), ("linux-anonymous", few, small))
    return lines


def run(options: Options) -> Report:
    """Measure all implementations; `time_per_page` is in µs for 4 KiB touched, of each thread."""
    from k42 import vm

    pages, rounds = (QUICK_PAGES, QUICK_ROUNDS) if options.quick else (PAGES, ROUNDS)
    with own_kernel(BUDGET) as socket, vm.connect(socket) as client:
        samples = measure(BARE_AND_LINUX | _k42(client), options.processors, pages, rounds)
    return Report(
        "faults: the time of a page fault, by who serves it",
        [each.record("faults", "time_per_page", "us") for each in samples],
        findings(samples, options.processors),
    )
