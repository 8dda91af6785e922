"""How experiments run: in interleaved rounds, one pinned thread a processor, on a kernel of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from k42.errors import Error
from k42.experiments._record import Case, Record, Samples


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line chose for an experiment.

    Attributes:
        processors: how many processors work at the same time, one measurement for each number.
        quick: less data and fewer rounds, for a first look.
        dask: address of the scheduler of a Dask cluster, whose workers simulate; None: processes here do.
    """

    processors: tuple[int, ...]
    quick: bool = False
    dask: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What an experiment returns: its records, and what to read from them (a line each)."""

    title: str
    records: list[Record]
    findings: list[str]


def cpus() -> list[int]:
    """The CPUs that this process may use, in ascending order."""
    return sorted(os.sched_getaffinity(0))


def first_cpus(processors: int) -> list[int]:
    """So many of them.

    Raises:
        Error: there are fewer.
    """
    available = cpus()
    if processors > len(available):
        raise Error(f"{processors} processors were asked for, and this process may use {len(available)}")
    return available[:processors]


def default_processors() -> tuple[int, ...]:
    """One processor, and all of them."""
    return tuple(sorted({1, len(cpus())}))


def interleave(cases: Sequence[Case], rounds: int) -> list[Samples]:
    """Measure each case once a round, so that what disturbs the machine disturbs all of them.

    Shows its progress on stderr when that is a terminal.

    Args:
        cases: what to measure, in the order of each round.
        rounds: at least 5, or the spread means nothing.
    """
    samples = [Samples(case, []) for case in cases]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=rounds * len(samples))
        for _ in range(rounds):
            for each in samples:
                progress.update(task, description=each.case.implementation)
                each.values.append(each.case.measure())
                progress.advance(task)
    return samples


class Gate:
    """Where the threads of one measurement meet, to start at one moment."""

    def __init__(self, threads: int) -> None:
        self._barrier = threading.Barrier(threads, action=self._open)
        self._start = 0

    def _open(self) -> None:
        # Later by more than it takes to wake a thread on an idle CPU.
        self._start = time.monotonic_ns() + 500_000

    def wait(self) -> int:
        """Wait for the others; returns the moment at which all start (ns, as time.monotonic_ns)."""
        self._barrier.wait()
        return self._start

    def abort(self) -> None:
        """Let no one wait any more: a thread has failed."""
        self._barrier.abort()


def on_processors(processors: int, body: Callable[[int, Gate], float], *, pinned: bool = True) -> list[float]:
    """Run `body` on one thread a processor, each pinned to its CPU unless told otherwise.

    Args:
        processors: how many threads.
        body: called with its CPU and the gate that it must pass once.
        pinned: bind each thread to its CPU; else it may run on any, and the number says only which thread it is.

    Returns:
        What the bodies returned.

    Raises:
        Error: there are fewer processors than asked for.
    """
    chosen = first_cpus(processors)
    gate = Gate(processors)
    failures: list[BaseException] = []

    def run(cpu: int) -> float:
        if pinned:
            os.sched_setaffinity(0, {cpu})  # of this thread
        try:
            return body(cpu, gate)
        except BaseException as failure:
            failures.append(failure)
            gate.abort()
            raise

    with ThreadPoolExecutor(processors) as pool:
        futures = [pool.submit(run, cpu) for cpu in chosen]
    if failures:
        raise failures[0]  # the first is the cause, the others found the gate broken
    return [future.result() for future in futures]


def python(module: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a module of the experiments as a process, with pipes to its input and from its output.

    Ctrl-C is for this process, which then ends it. It has no session of its own: Linux would schedule each as a group
    apart from the kernel that serves it (sched_autogroup).
    """
    return subprocess.Popen(
        [sys.executable, "-m", f"k42.experiments.{module}", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )


@contextlib.contextmanager
def own_kernel(budget: int, objects: str | None = None) -> Iterator[str]:
    """Start a k42 kernel for an experiment and stop it afterwards; yields its socket's path.

    Args:
        budget: bytes of memory that its pages may take.
        objects: what to make its objects of, as ``k42 serve --objects`` has it; None: its default.
    """
    from k42 import vm

    with tempfile.TemporaryDirectory(prefix="k42-") as folder:
        path = str(Path(folder) / "kernel.socket")
        with vm.launch(socket=path, budget=budget, objects=objects):
            yield path
