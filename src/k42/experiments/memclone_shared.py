"""memclone-shared, as in sections 4.3 and 4.4 and figures 9 and 13 of the paper: threads touch parts of one mapping.

One mapping is made, and one thread a processor touches the pages of a part of it, one after the other. So all threads
go through one Region and one FCM. Each has a window of its own on the mapping (`Mapping.local`), as K42 had page tables
for each processor: what threads share then is these objects alone.

- `first touch`: each fault makes a page of zeros.
- `again`: the pages are there, and each fault maps one in a window that has none of them.

The implementations are those that a kernel can make its Region and its FCM of (``k42 serve --objects``); beside them
`linux`, private anonymous memory without huge pages, and for `again` a memfd that is written, one page a fault.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import mmap
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from k42 import _native
from k42.errors import Error
from k42.experiments._record import PAGE, Case, Samples
from k42.experiments._runner import Gate, Options, Report, cpus, interleave, on_processors, own_kernel
from k42.vm.variants import choices

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from k42 import vm

PAGES = 2500  # of 4 KiB, touched by each thread: the paper's number
ROUNDS = 11
QUICK_ROUNDS = 5
BUDGET = 512 * 2**20  # bytes of each kernel; no page is ever reclaimed

OPERATIONS = ("first touch", "again")

_Window = Callable[[], "AbstractContextManager[Buffer]"]  # of the calling thread, on the whole mapping
_Make = Callable[[int, bool], "AbstractContextManager[_Window]"]  # takes bytes, and whether they are touched twice


@contextlib.contextmanager
def linux(nbytes: int, again: bool) -> Iterator[_Window]:
    """One mapping of Linux's, which all threads share: it has no other kind."""
    fd = os.memfd_create("k42-linux") if again else -1
    try:
        if again:
            os.ftruncate(fd, nbytes)
        flags = mmap.MAP_SHARED if again else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        with mmap.mmap(fd, nbytes, flags=flags) as memory:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
            yield lambda: contextlib.nullcontext(memory)
    finally:
        if again:
            os.close(fd)


@contextlib.contextmanager
def k42_anonymous(client: vm.Client, nbytes: int, _again: bool) -> Iterator[_Window]:
    """One anonymous mapping, of which each thread has a window."""
    with client.anonymous(nbytes) as mapping:
        yield lambda: contextlib.nullcontext(mapping.local())


def time_per_thread(make: _Make, operation: str, processors: int) -> float:
    """The mean of the times that the threads take for their touches, in ms.

    Args:
        make: makes the mapping.
        operation: one of `OPERATIONS`.
        processors: how many threads.

    Raises:
        Error: the mapping does not hold what it must.
    """
    nbytes = PAGES * PAGE
    again = operation == "again"
    numbers = itertools.count()
    with make(processors * nbytes, again) as window:

        def body(_cpu: int, gate: Gate) -> float:
            number = next(numbers)
            with window() as memory, memoryview(memory)[number * nbytes : (number + 1) * nbytes] as part:
                if again:
                    _native.touch(part, PAGE, True, 0)
                    _native.dontneed(part)
                seconds = _native.touch(part, PAGE, True, gate.wait())
                if bytes(part) != (b"\1" + bytes(PAGE - 1)) * PAGES:
                    raise Error("memclone-shared: the mapping does not hold zeros and what was written to it")
                return seconds

        return statistics.mean(on_processors(processors, body)) * 1e3


def variants() -> dict[str, str]:
    """The kernels to compare: their names here, and what their objects are made of."""
    known = choices()
    return {
        f"k42 {region} Region" + (f", {fcm} FCM" if fcm else ""): f"region={region}" + (f",fcm={fcm}" if fcm else "")
        for region in known["region"]
        for fcm in known.get("fcm", ("",))
    }


def measure(options: Options) -> list[Samples]:
    """Measure Linux and k42's implementations, on each number of processors, interleaved."""
    from k42 import vm

    with contextlib.ExitStack() as stack:
        makes: dict[str, _Make] = {"linux": linux}
        for name, objects in variants().items():
            client = stack.enter_context(vm.connect(stack.enter_context(own_kernel(BUDGET, objects))))
            makes[name] = functools.partial(k42_anonymous, client)
        return interleave(
            [
                Case(
                    f"{operation}/{name}",
                    processors,
                    {"pages": PAGES},
                    functools.partial(time_per_thread, make, operation, processors),
                )
                for operation in OPERATIONS
                for processors in options.processors
                for name, make in makes.items()
            ],
            QUICK_ROUNDS if options.quick else ROUNDS,
        )


def findings(samples: Sequence[Samples]) -> list[str]:
    """The ratios of the implementations to the first, which shares most, and of many processors to one; a line each."""
    by_case = {(each.case.implementation, each.case.processors): each for each in samples}
    counts = sorted({processors for _, processors in by_case})
    lines = []
    for operation in OPERATIONS:
        first, *others = variants()
        for processors in counts:
            wanted = "at most 1.05" if processors == 1 else "below 1"
            for other in others:
                one, two = (by_case[f"{operation}/{name}", processors] for name in (other, first))
                ratio = f"{other} / {first}, {processors} proc. = {one.ratio(two):.2f}"
                lines.append(f"{operation}: {ratio}, wanted: {wanted}")
        if len(counts) > 1:
            for name in ("linux", first, *others):
                few, many = (by_case[f"{operation}/{name}", counts[at]] for at in (0, -1))
                lines.append(f"{operation}: {name}, {counts[-1]} proc. / {counts[0]} proc. = {many.ratio(few):.2f}")
    return lines


def run(options: Options) -> Report:
    """Measure memclone-shared; `time_per_thread` is in ms for 2500 pages of 4 KiB."""
    if max(options.processors) > len(cpus()):
        raise Error(f"this process may use {len(cpus())} processors")
    samples = measure(options)
    return Report(
        "memclone-shared: 2500 pages of one mapping touched by each thread",
        [each.record("memclone-shared", "time_per_thread", "ms") for each in samples],
        findings(samples),
    )
