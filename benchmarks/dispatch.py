"""What a call through a reference costs, beside the same call on the representative itself and on a plain object.

Run it with the interpreter in question: ``.venv/bin/python benchmarks/dispatch.py``. Each figure is the median of
interleaved rounds, in ns a call, the loop included, by one thread and by one thread a CPU. Without a GIL, "scaling"
is the throughput of all threads over that of one; with a GIL one thread runs at a time, and it says nothing.
"""

from __future__ import annotations

import os
import statistics
import sysconfig
import threading
import time
from collections.abc import Callable

import k42

CALLS = 100_000
ROUNDS = 11


class Local(k42.Object):
    """One representative a processor."""

    class Root(k42.DistributedRoot):
        """Nothing is shared."""

    def __init__(self) -> None:
        self.n = 0

    def nothing(self) -> None:
        """Just the call."""

    def add(self) -> None:
        """A call that writes."""
        self.n += 1


class Plain:
    """An ordinary object that all threads share; without a lock it loses updates where they run in parallel."""

    def __init__(self) -> None:
        self.n = 0

    def nothing(self) -> None:
        """Just the call."""

    def add(self) -> None:
        """A call that writes."""
        self.n += 1


reference = Local.create()
plain = Plain()


def loop_empty() -> None:
    for _ in range(CALLS):
        pass


def loop_reference_nothing() -> None:
    target = reference
    for _ in range(CALLS):
        target.nothing()


def loop_local_nothing() -> None:
    target = k42.local(reference)
    for _ in range(CALLS):
        target.nothing()


def loop_plain_nothing() -> None:
    target = plain
    for _ in range(CALLS):
        target.nothing()


def loop_reference_add() -> None:
    target = reference
    for _ in range(CALLS):
        target.add()


def loop_local_add() -> None:
    target = k42.local(reference)
    for _ in range(CALLS):
        target.add()


def loop_plain_add() -> None:
    target = plain
    for _ in range(CALLS):
        target.add()


# Loops of their own, so that each call site is specialised by the interpreter for what it calls.
LOOPS: dict[str, Callable[[], None]] = {
    "empty loop": loop_empty,
    "reference.nothing()": loop_reference_nothing,
    "local(reference).nothing()": loop_local_nothing,
    "plain.nothing()": loop_plain_nothing,
    "reference.add()": loop_reference_add,
    "local(reference).add()": loop_local_add,
    "plain.add()": loop_plain_add,
}


def time_per_call(loop: Callable[[], None], threads: int) -> float:
    """ns a call, of each thread: the slowest one's."""
    gate = threading.Barrier(threads)
    times = []

    def body() -> None:
        gate.wait()
        start = time.perf_counter()
        loop()
        times.append(time.perf_counter() - start)

    workers = [threading.Thread(target=body) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(times) / CALLS * 1e9


def main() -> None:
    """Measures and prints."""
    cpus = len(os.sched_getaffinity(0))
    figures: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for name, loop in LOOPS.items():
            for threads in {1, cpus}:
                figures.setdefault((name, threads), []).append(time_per_call(loop, threads))
    gil = "without a GIL" if sysconfig.get_config_var("Py_GIL_DISABLED") else "with a GIL"
    print(f"Python {sysconfig.get_python_version()} {gil}, ns a call, median of {ROUNDS}")
    print(f"{'':30}{'1 thread':>10}{f'{cpus} threads':>12}{'scaling':>10}")
    for name in LOOPS:
        one, all_ = (statistics.median(figures[name, threads]) for threads in (1, cpus))
        print(f"{name:30}{one:10.1f}{all_:12.1f}{cpus * one / all_:10.2f}")


if __name__ == "__main__":
    main()
