"""memclone, as in section 4 and figures 6 and 8 of the paper: threads touch the pages of new memory.

One thread a processor allocates an array and touches its pages one after the other, as a scientific program
does when it begins. Each touch is a fault that is answered by a page of zeros. Scalable is what takes the
same time on any number of processors.

- `linux`: private anonymous memory, without huge pages.
- `k42`: an anonymous mapping, with pages of 4 KiB or of 64 KiB.

After its time is taken, each array is compared with what must be in it, byte for byte.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from k42 import _native
from k42.errors import Error
from k42.experiments._record import PAGE, PAGE_SIZES, Case, Samples, compared
from k42.experiments._runner import Gate, Options, Report, interleave, on_processors, own_kernel
from k42.experiments.faults import linux_anonymous

if TYPE_CHECKING:
    from typing_extensions import Buffer

PAGES = 2500  # of 4 KiB, touched by each thread: the paper's number
ROUNDS = 11
QUICK_ROUNDS = 5
BUDGET = 512 * 2**20  # bytes; no page is ever reclaimed

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

    with own_kernel(BUDGET) as socket, vm.connect(socket) as client:

        def k42_anonymous(_cpu: int, nbytes: int, page_size: int) -> AbstractContextManager[Buffer]:
            return client.anonymous(nbytes, page_size=page_size)

        implementations: list[tuple[str, _Make, int]] = [
            ("linux", linux_anonymous, PAGE),
            *(("k42", k42_anonymous, page_size) for page_size in PAGE_SIZES),
        ]
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


def run(options: Options) -> Report:
    """Measure memclone; `time_per_thread` is in ms for 2500 pages of 4 KiB."""
    samples = measure(options)
    return Report(
        "memclone: 2500 pages of new memory touched by each thread",
        [each.record("memclone", "time_per_thread", "ms") for each in samples],
        compared(samples),
    )
