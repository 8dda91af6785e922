"""The experiments on a simulated machine: the paper's figures, with its numbers of processors.

Each point is a run of its own, deterministic for its seed; the points are shared out among processes, one for each CPU
of this machine. What is fitted, to figure 1 alone, is said at `k42.sim.S85`; all else is a prediction.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from k42.errors import Error
from k42.experiments._record import Record
from k42.experiments._runner import Options, Report, cpus
from k42.sim import Machine, QueueLock, Simulation
from k42.sim.vm import PAGE, Kernel, Variants

PROCESSORS = (1, 2, 4, 8, 12, 16, 20, 24, 32, 64, 96, 128)
"""Those that are simulated unless others are asked for, as far as the machine has them."""

_SEED = 1
_CALLS = 100  # of each processor
_PAGES = 2500  # touched by each thread: the paper's number
_FILE = 1000  # pages that each grep searches
_REGIONS = 20  # mapped and unmapped, one after the other
_QUICK = 10  # times less data


@dataclasses.dataclass(frozen=True)
class Point:
    """One run: which simulation, of what, on how many processors of which machine."""

    measure: Callable[..., float]
    machine: Machine
    implementation: str
    processors: int
    arguments: Mapping[str, object]

    def run(self) -> float:
        """Run it; its value."""
        return self.measure(Simulation(self.machine, self.processors, seed=_SEED), **self.arguments)


def _call(sim: Simulation, variant: str, calls: int) -> float:
    """Cycles of a call to a server that counts (figure 1)."""
    lock = QueueLock(sim)
    common = sim.allocate(8, padded=True)
    array = sim.allocate(4 * sim.processors, padded=True)
    padded = [sim.allocate(8, padded=True) for _ in range(sim.processors)]

    def add(counter: int) -> None:
        sim.load(counter)
        sim.store(counter)

    def body(processor: int) -> None:
        chance = random.Random(_SEED * 1000 + processor)
        for _ in range(calls):
            sim.work(sim.machine.call + chance.randint(-sim.machine.jitter, sim.machine.jitter))
            match variant:
                case "lock":
                    with lock:
                        add(common)
                case "atomic":
                    sim.update(common)
                case "array":
                    add(array + 4 * processor)
                case _:
                    add(padded[processor])

    return sum(sim.run(body)) / sim.processors / calls


def _per_page(sim: Simulation, pages: int, touch: Callable[[int, int], None], before: Callable[[int], None]) -> float:
    """Microseconds of a touch: the mean of the processors, each of which touches so many pages."""
    taken = [0] * sim.processors

    def body(processor: int) -> None:
        before(processor)
        start = sim.now()
        for page in range(pages):
            touch(processor, page)
        taken[processor] = sim.now() - start

    sim.run(body)
    return sum(taken) / sim.processors / pages / sim.machine.mhz


def _memclone(sim: Simulation, variants: Variants | None, pages: int, *, shared: bool = False) -> float:
    """Milliseconds for 2500 pages of new memory, by thread; `variants` None: the lower bound.

    Each thread has memory of its own (figures 6 and 8), or all have parts of one mapping (figures 9 and 13).
    """
    kernel = Kernel(sim, variants)
    process = kernel.process()
    made = [kernel.region(kernel.fcm()) for _ in range(1 if shared else sim.processors)]

    def touch(processor: int, page: int) -> None:
        sim.work(kernel.costs.touch)
        if variants is None:
            kernel.zero_fill(processor * pages + page)
        elif shared:
            kernel.fault(process, made[0], processor * _PAGES + page)
        else:
            kernel.fault(process, made[processor], page)

    def before(processor: int) -> None:
        if processor < len(made):
            process.attach(made[processor])
        else:
            sim.work(sim.machine.call * 10)  # the first has mapped it by then

    return _PAGES / 1000 * _per_page(sim, pages, touch, before)


def _grep(sim: Simulation, variants: Variants, pages: int) -> float:
    """Microseconds for each page of a file that is resident and was searched on each processor before (figure 12)."""
    kernel = Kernel(sim, variants)
    file = kernel.fcm()
    processes = [kernel.process() for _ in range(sim.processors)]
    regions = [kernel.region(file) for _ in range(sim.processors)]
    frames: dict[int, int] = {}

    def search(processor: int, page: int) -> None:
        kernel.fault(processes[processor], regions[processor], page)
        start = frames.setdefault(page, sim.allocate(PAGE, padded=True))
        for address in range(start, start + PAGE, sim.machine.line):
            sim.load(address)
        sim.work(kernel.costs.search)

    def before(processor: int) -> None:
        processes[processor].attach(regions[processor])
        for page in range(pages):
            kernel.fault(processes[processor], regions[processor], page)

    return _per_page(sim, pages, search, before)


def _attach(sim: Simulation, variants: Variants, what: str, regions: int) -> float:
    """Microseconds to map a region, or to unmap one that nobody touched, or all processors (section 4.1)."""
    kernel = Kernel(sim, variants)
    process = kernel.process()
    word = sim.allocate(8, padded=True)
    steps = [0] * sim.processors
    taken = dict.fromkeys(("map", "unmap"), 0)

    def meet(processor: int) -> None:
        steps[processor] += 1
        sim.store(word)
        sim.spin(word, lambda: min(steps) >= steps[processor])

    def timed(name: str, cycles: int, change: Callable[[], None]) -> None:
        start = sim.now()
        sim.work(cycles)
        change()
        taken[name] += sim.now() - start

    def body(processor: int) -> None:
        costs = kernel.costs
        for page, region in enumerate(made):
            if processor == 0:
                timed("map", costs.map, functools.partial(process.attach, region))
            meet(processor)
            if what == "unmap touched":
                kernel.fault(process, region, page)
            meet(processor)
            if processor == 0:
                used = sim.processors if what == "unmap touched" else 0
                cycles = costs.unmap + used * costs.unmap_processor
                timed("unmap", cycles, functools.partial(process.detach, region))

    made = [kernel.region(kernel.fcm()) for _ in range(regions)]
    sim.run(body)
    return taken[what.split()[0]] / regions / sim.machine.mhz


def _sweep(points: Sequence[Point], dask: str | None) -> list[float]:
    """Run all points, shared out among processes here, or the workers of a Dask cluster; their values, in order.

    Raises:
        Error: one of the processes ended early, or there is no such cluster.
    """
    # The long ones first, or the last one would be waited for alone.
    order = sorted(range(len(points)), key=lambda index: -points[index].processors)
    values = [0.0] * len(points)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with (
        contextlib.closing(_here(points, order) if dask is None else _on_cluster(points, order, dask)) as results,
        Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress,
    ):
        task = progress.add_task("simulating", total=len(points))
        for index, value in zip(order, results, strict=True):
            values[index] = value
            progress.advance(task)
    return values


def _here(points: Sequence[Point], order: Sequence[int]) -> Generator[float, None, None]:
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(len(cpus()), context, _begin)
    try:
        yield from pool.map(Point.run, [points[index] for index in order])
    except BrokenProcessPool as error:
        raise Error(f"a process that simulates ended early: {error}") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()


def _on_cluster(points: Sequence[Point], order: Sequence[int], address: str) -> Generator[float, None, None]:
    try:
        from distributed import Client
    except ImportError as error:
        raise Error("a cluster needs Dask, here and there: pip install 'k42[dask]'") from error
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise Error(f"there is no Dask scheduler at {address}: {error}") from error
    with client:
        futures = client.map(Point.run, [points[index] for index in order], pure=False)
        try:
            for future in futures:
                yield future.result()
        finally:
            client.cancel(futures)


def _begin() -> None:
    """In a process that simulates: Ctrl-C is for the one that shares out the work, and without it there is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sharing = multiprocessing.parent_process()
    assert sharing

    def follow() -> None:
        sharing.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@dataclasses.dataclass(frozen=True)
class _Experiment:
    """What is simulated: its points by implementation, and what the paper has to say."""

    title: str
    metric: str
    unit: str
    measure: Callable[..., float]
    implementations: Callable[[bool], dict[str, dict[str, object]]]  # by whether less data will do
    findings: Callable[[Callable[[str, int], float], Sequence[int]], list[str]]

    def run(self, name: str, machine: Machine, options: Options) -> Report:
        """Simulate it."""
        processors, quick = options.processors, options.quick
        points = [
            Point(self.measure, machine, implementation, count, arguments)
            for implementation, arguments in self.implementations(quick).items()
            for count in processors
        ]
        values = _sweep(points, options.dask)
        by_point = {
            (point.implementation, point.processors): value for point, value in zip(points, values, strict=True)
        }
        records = [
            Record(
                experiment=name,
                machine=machine.name,
                implementation=point.implementation,
                processors=point.processors,
                metric=self.metric,
                unit=self.unit,
                value=value,
                runs=1,
                spread=0.0,
                parameters={key: value for key, value in point.arguments.items() if isinstance(value, int)},
            )
            for point, value in zip(points, values, strict=True)
        ]
        findings = self.findings(lambda implementation, count: by_point[implementation, count], processors)
        return Report(f"{name}, simulated: {self.title} ({machine.name})", records, findings)


_Value = Callable[[str, int], float]


def _growth(value: _Value, processors: Sequence[int], implementation: str, paper: str) -> str:
    few, many = processors[0], processors[-1]
    ratio = value(implementation, many) / value(implementation, few)
    return f"{implementation}: {many} proc. / {few} proc. = {ratio:.2f}; the paper: {paper}"


def _onset(value: _Value, processors: Sequence[int], implementation: str) -> str:
    """From which number of processors on a curve has left what one processor takes twice behind."""
    beyond = [count for count in processors if value(implementation, count) > 2 * value(implementation, processors[0])]
    return f"twice the time of {processors[0]} from {beyond[0]} on" if beyond else "below twice the time of one"


def _counter_findings(value: _Value, processors: Sequence[int]) -> list[str]:
    stated = {"lock": "19 at 24", "atomic": "12 at 24", "array": "6 at 24", "padded": "flat"}
    return [_growth(value, processors, name, paper) for name, paper in stated.items()]


def _above(value: _Value, processors: Sequence[int], implementation: str) -> str:
    excess = [value(implementation, count) - value(_BOUND, count) for count in (processors[0], processors[-1])]
    return (
        f"{implementation}: above the lower bound by {excess[0]:.1f} ms on {processors[0]} and {excess[1]:.1f} ms on "
        f"{processors[-1]} processors"
    )


_BOUND = "zero-fill alone"
_BOTH = "distributed Process, distributed PM"


def _memclone_findings(value: _Value, processors: Sequence[int]) -> list[str]:
    return [
        f"{_above(value, processors, _BOTH)}; the paper: a constant above it (figures 6 and 8)",
        *(
            f"{name}: {_onset(value, processors, name)}; the paper: {paper}"
            for name, paper in (
                ("shared Process, distributed PM", "degrades rapidly beyond 10 (figure 6)"),
                ("distributed Process, shared PM", "decreases sharply beyond 8 (figure 8)"),
                ("shared Process, shared PM", "one of the two distributed does not help (figure 8)"),
            )
        ),
    ]


def _memclone_shared_findings(value: _Value, processors: Sequence[int]) -> list[str]:
    many, best = processors[-1], "distributed Region, partitioned FCM"

    def ratio(name: str) -> str:
        return f"{name} / {best}, {many} proc. = {value(name, many) / value(best, many):.2f}"

    return [
        f"{ratio('shared Region, partitioned FCM')}; the paper: one shared count is enough to degrade (figure 9)",
        f"{ratio('distributed Region, replicated FCM')}; the paper: DHash scales badly here, the partitioned FCM well "
        "(figure 13)",
        f"{ratio('distributed Region, shared FCM')}; the paper: as DHash or worse",
    ]


def _grep_findings(value: _Value, processors: Sequence[int]) -> list[str]:
    stated = {
        "shared FCM": "degrades (figure 12)",
        "replicated FCM": "scales (figure 12)",
        "partitioned FCM": "not shown",
    }
    return [_growth(value, processors, name, paper) for name, paper in stated.items()]


def _attach_findings(value: _Value, processors: Sequence[int]) -> list[str]:
    stated = {"map": (processors[0], 6), "unmap": (processors[0], 8), "unmap touched": (processors[-1], 48)}
    lines = []
    for what, (count, paper) in stated.items():
        more = value(f"{what}/distributed Process", count) / value(f"{what}/shared Process", count) - 1
        lines.append(
            f"{what}, {count} proc.: the distributed Process takes {100 * more:.0f}% more; the paper: {paper}%"
        )
    return lines


def _less(quick: bool, whole: int) -> int:
    return whole // _QUICK if quick else whole


EXPERIMENTS = {
    "counter": _Experiment(
        "a call to a server that counts, by what it counts with (figure 1)",
        "time_per_call",
        "cycles",
        _call,
        lambda quick: {
            variant: {"variant": variant, "calls": _less(quick, _CALLS)}
            for variant in ("lock", "atomic", "array", "padded")
        },
        _counter_findings,
    ),
    "memclone": _Experiment(
        "2500 pages of new memory touched by each thread (figures 6 and 8)",
        "time_per_thread",
        "ms",
        _memclone,
        lambda quick: (
            {
                f"{process} Process, {pm} PM": {
                    "variants": Variants(process=process, global_pm=pm),
                    "pages": _less(quick, _PAGES),
                }
                for process in ("shared", "distributed")
                for pm in ("shared", "distributed")
            }
            | {_BOUND: {"variants": None, "pages": _less(quick, _PAGES)}}
        ),
        _memclone_findings,
    ),
    "memclone-shared": _Experiment(
        "2500 pages of one mapping touched by each thread (figures 9 and 13)",
        "time_per_thread",
        "ms",
        functools.partial(_memclone, shared=True),
        lambda quick: (
            {
                f"{region} Region, {fcm} FCM": {
                    "variants": Variants(region=region, fcm=fcm),
                    "pages": _less(quick, _PAGES),
                }
                for region in ("shared", "distributed")
                for fcm in ("shared", "replicated", "partitioned")
            }
            | {_BOUND: {"variants": None, "pages": _less(quick, _PAGES)}}
        ),
        _memclone_shared_findings,
    ),
    "grep": _Experiment(
        "a resident file searched by each processor (figure 12)",
        "time_per_page",
        "us",
        _grep,
        lambda quick: {
            f"{fcm} FCM": {"variants": Variants(fcm=fcm), "pages": _less(quick, _FILE)}
            for fcm in ("shared", "replicated", "partitioned")
        },
        _grep_findings,
    ),
    "attach": _Experiment(
        "a region mapped and unmapped (section 4.1)",
        "time_per_region",
        "us",
        _attach,
        lambda quick: {
            f"{what}/{process} Process": {
                "variants": Variants(process=process),
                "what": what,
                "regions": _REGIONS,
            }
            for what in ("map", "unmap", "unmap touched")
            for process in ("shared", "distributed")
        },
        _attach_findings,
    ),
}


def run(name: str, machine: Machine, options: Options) -> Report:
    """Simulate an experiment.

    Args:
        name: one of `EXPERIMENTS`.
        machine: on what.
        options: how many processors, whether less data will do, and who simulates.
    """
    return EXPERIMENTS[name].run(name, machine, options)


def default_processors(machine: Machine) -> tuple[int, ...]:
    """Those of `PROCESSORS` that the machine has, and all of it."""
    return tuple(sorted({count for count in PROCESSORS if count <= machine.processors} | {machine.processors}))
