"""memclone, as in section 4 and figures 6 and 8 of the paper: threads touch the pages of new memory.

One thread a processor allocates an array and touches its pages one after the other, as a scientific program
does when it begins. Each touch is a fault that is answered by a page of zeros. Scalable is what takes the
same time on any number of processors.

- `linux`: private anonymous memory, without huge pages.
- `k42`: an anonymous mapping, with pages of 4 KiB or of 64 KiB. Its Process and its Global PM are distributed.
- `k42-process-shared`, `k42-pm-shared`, `k42-both-shared`: the same, with pages of 4 KiB, in a kernel whose Process, or
  Global PM, or both are not distributed: the steps of figures 6 and 8.

After its time is taken, each array is compared with what must be in it, byte for byte.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from k42 import _native
from k42.errors import Error
from k42.experiments._record import PAGE, PAGE_SIZES, Case, Samples, compared, find
from k42.experiments._runner import Gate, Options, Report, interleave, on_processors, own_kernel
from k42.experiments.faults import linux_anonymous

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from k42 import vm

PAGES = 2500  # of 4 KiB, touched by each thread: the paper's number
ROUNDS = 11
QUICK_ROUNDS = 5
BUDGET = 512 * 2**20  # bytes of each kernel; no page is ever reclaimed

OBJECTS = {
    "k42": "distributed",
    "k42-process-shared": "process=shared",
    "k42-pm-shared": "global_pm=shared",
    "k42-both-shared": "process=shared,global_pm=shared",
}

TOUCHED = (b"\1" + bytes(PAGE - 1)) * PAGES

_Make = Callable[[int, int, int], "AbstractContextManager[Buffer]"]


def time_per_thread(make: _Make, processors: int, page_size: int) -> float:
    """The mean of the times that the threads take for their touches, in ms.

    Args:
        make: allocates an array; takes its thread's CPU, the bytes and the page size.
        processors: how many threads.
        page_size: bytes.

    Raises:
        Error: an array is not what it must be.
    """

    def body(cpu: int, gate: Gate) -> float:
        with make(cpu, PAGES * PAGE, page_size) as memory:
            seconds = _native.touch(memory, PAGE, True, gate.wait())
            if bytes(memory) != TOUCHED:
                raise Error("memclone: an array does not hold zeros and what was written to it")
            return seconds

    return statistics.mean(on_processors(processors, body)) * 1e3


def measure(options: Options) -> list[Samples]:
    """Measure Linux and k42 with both page sizes, on each number of processors, interleaved."""
    from k42 import vm

    with contextlib.ExitStack() as stack:
        implementations: list[tuple[str, _Make, int]] = [("linux", linux_anonymous, PAGE)]
        for name, objects in OBJECTS.items():
            socket = stack.enter_context(own_kernel(BUDGET, objects))
            client = stack.enter_context(vm.connect(socket))
            sizes = PAGE_SIZES if name == "k42" else (PAGE,)
            implementations += [(name, functools.partial(_anonymous, client), page_size) for page_size in sizes]
        return interleave(
            [
                Case(
                    name,
                    processors,
                    {"page_size": page_size, "pages": PAGES},
                    functools.partial(time_per_thread, make, processors, page_size),
                )
                for processors in options.processors
                for name, make, page_size in implementations
            ],
            QUICK_ROUNDS if options.quick else ROUNDS,
        )


def _anonymous(client: vm.Client, _cpu: int, nbytes: int, page_size: int) -> AbstractContextManager[Buffer]:
    return client.anonymous(nbytes, page_size=page_size)


def findings(samples: Sequence[Samples]) -> list[str]:
    """The ratios to Linux, and those of the distributed objects to the others, a line each."""
    lines = compared(samples)
    for processors in sorted({each.case.processors for each in samples}):
        distributed = find(samples, "k42", processors, PAGE)
        for name in OBJECTS:
            other = find(samples, name, processors, PAGE)
            if distributed and other and name != "k42":
                wanted = ", wanted: at most 1.05" if processors == 1 else ", wanted: below 1"
                lines.append(f"k42 / {name} (4 KiB, {processors} proc.) = {distributed.ratio(other):.2f}{wanted}")
    return lines


def run(options: Options) -> Report:
    """Measure memclone; `time_per_thread` is in ms for 2500 pages of 4 KiB."""
    samples = measure(options)
    return Report(
        "memclone: 2500 pages of new memory touched by each thread",
        [each.record("memclone", "time_per_thread", "ms") for each in samples],
        findings(samples),
    )
