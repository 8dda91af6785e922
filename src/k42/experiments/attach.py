"""attach: what it costs to map a region and to unmap it, as in section 4.1 of the paper.

Regions of 64 KiB of anonymous memory are mapped and unmapped. Detaching a region from a distributed Process has to
visit the copies that processors have of it, and attaching makes none: so the costs are those of the touched region's
end.

- `map`: threads map regions, one thread a processor, all at the same time.
- `unmap`: they unmap regions that nobody has touched.
- `unmap touched`: one thread unmaps regions of which each page was touched by one thread on each processor.

The implementations: `linux` (private anonymous memory), and `k42` with a shared and with a distributed Process. In k42
both are requests to the kernel's process, which answers one after the other.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from k42 import _native
from k42.experiments._record import PAGE, Case, Samples
from k42.experiments._runner import Gate, Options, Report, interleave, on_processors, own_kernel
from k42.vm.variants import choices

if TYPE_CHECKING:
    from k42 import vm

NBYTES = 16 * PAGE
REGIONS = 64  # mapped and unmapped by each thread for one value
QUICK_REGIONS = 16
ROUNDS = 11
QUICK_ROUNDS = 5
BUDGET = 64 * 2**20  # bytes of each kernel
OPERATIONS = ("map", "unmap", "unmap touched")

_Make = Callable[[], Any]  # maps a region, which has `close`


def linux() -> mmap.mmap:
    """Private memory of Linux."""
    memory = mmap.mmap(-1, NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def _k42(client: vm.Client) -> vm.Mapping:
    return client.anonymous(NBYTES)


def time_per_region(make: _Make, operation: str, processors: int, regions: int) -> float:
    """The mean of the times that a thread takes for a region, in µs.

    Args:
        make: maps a region.
        operation: one of `OPERATIONS`.
        processors: how many threads map and unmap; or, of what is touched, how many touch it before.
        regions: how many each maps.
    """
    if operation == "unmap touched":
        made = [make() for _ in range(regions)]

        def touch(_cpu: int, gate: Gate) -> float:
            gate.wait()
            for memory in made:
                _native.touch(memory, PAGE, True, 0)
            return 0.0

        on_processors(processors, touch)
        return _timed(lambda: [memory.close() for memory in made]) / regions * 1e6

    def body(_cpu: int, gate: Gate) -> float:
        start = gate.wait()
        while time.monotonic_ns() < start:
            pass
        made: list[Any] = []
        mapping = _timed(lambda: made.extend(make() for _ in range(regions)))
        unmapping = _timed(lambda: [memory.close() for memory in made])
        return mapping if operation == "map" else unmapping

    return statistics.mean(on_processors(processors, body)) / regions * 1e6


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(options: Options) -> list[Samples]:
    """Measure Linux and k42's Processes, on each number of processors, interleaved."""
    from k42 import vm

    regions, rounds = (QUICK_REGIONS, QUICK_ROUNDS) if options.quick else (REGIONS, ROUNDS)
    with contextlib.ExitStack() as stack:
        makes: dict[str, _Make] = {"linux": linux}
        for process in choices()["process"]:
            client = stack.enter_context(vm.connect(stack.enter_context(own_kernel(BUDGET, f"process={process}"))))
            makes[f"k42 {process} Process"] = functools.partial(_k42, client)
        return interleave(
            [
                Case(
                    f"{operation}/{name}",
                    processors,
                    {"bytes": NBYTES, "regions": regions},
                    functools.partial(time_per_region, make, operation, processors, regions),
                )
                for operation in OPERATIONS
                for processors in options.processors
                for name, make in makes.items()
            ],
            rounds,
        )


def findings(samples: Sequence[Samples]) -> list[str]:
    """The times of k42, and the ratios of the distributed Process to the shared one, a line each."""
    by_case = {(each.case.implementation, each.case.processors): each for each in samples}
    lines = []
    for operation in OPERATIONS:
        for processors in sorted({processors for _, processors in by_case}):
            shared, distributed = (
                by_case[f"{operation}/k42 {process} Process", processors] for process in ("shared", "distributed")
            )
            median = statistics.median(distributed.values)
            wanted = ", wanted: at most 300 µs" if operation == "map" and processors == 1 else ""
            lines.append(
                f"{operation}, {processors} proc.: distributed / shared Process = {distributed.ratio(shared):.2f}; "
                f"{median:.0f} µs{wanted}"
            )
    return lines


def run(options: Options) -> Report:
    """Measure attach; `time_per_region` is in µs for a region of 64 KiB."""
    samples = measure(options)
    return Report(
        "attach: a region of 64 KiB mapped and unmapped",
        [each.record("attach", "time_per_region", "us") for each in samples],
        findings(samples),
    )
