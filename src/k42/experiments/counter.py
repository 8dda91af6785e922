"""counter, the motivating example of the paper (section 1.1, figure 1): all processors count the same thing.

One thread a processor makes calls that add one to a common counter, as fast as it can; scalable is what takes the
same time on any number of processors. The paper's call is one to a server in another address space; until there are
protected procedure calls it is a plain one here, so what is counted with is all that there is to see: the paper's
factors are of a call that costs a thousand times more than the counting.

From native code, in a loop on the part of the processor (a function call each):

- `native-lock`: a count under a mutex.
- `native-atomic`: a count that is changed atomically.
- `native-array`: a count for each processor, side by side in an array.
- `native-padded`: a count for each processor, on cache lines of its own.

From Python, by `counter.add()` on the reference, the loop included:

- `SharedCounter`, `AtomicCounter`, `PackedCounter`, `DistributedCounter`: the same four.
- `threading.Lock`: the peer, a class in Python whose `add` is `+=` under a lock.
- `no-op`: a method of an immortal object that does nothing (`"".isascii()`): the yardstick of a call.

With a GIL one Python thread runs at a time: those rows then say how the threads take turns. After each measurement
the counter must hold every add.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

from k42 import _native
from k42.errors import Error
from k42.experiments._record import Case, Samples
from k42.experiments._runner import Gate, Options, Report, interleave, on_processors
from k42.objects import destroy
from k42.structures import AtomicCounter, Counter, DistributedCounter, PackedCounter, SharedCounter

CALLS = 200_000  # of each thread from Python, and ten times as many from native code
QUICK_CALLS = 20_000
NATIVE = 10
WARM_UP = 1_000  # calls before the measured ones: representatives are made, and the interpreter has adapted
ROUNDS = 11
QUICK_ROUNDS = 5

# A loop makes calls on a counter, from a moment on (ns, as time.monotonic_ns), and returns the seconds they took.
_Loop = Callable[[Any, int, int], float]


class LockedCounter:
    """What one writes without k42."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects _n
        self._n = 0

    def add(self, k: int = 1) -> None:
        """Count `k` more."""
        with self._lock:
            self._n += k

    def value(self) -> int:
        """Return the count."""
        with self._lock:
            return self._n


def _native_loop(counter: _native.CoreLoop, calls: int, start: int) -> float:
    return counter.run(calls, start)


def _python(counter: Any, calls: int, start: int) -> float:
    while time.monotonic_ns() < start:
        pass
    begin = time.perf_counter()
    for _ in range(calls):
        counter.add()
    return time.perf_counter() - begin


def _no_op(text: Any, calls: int, start: int) -> float:
    while time.monotonic_ns() < start:
        pass
    begin = time.perf_counter()
    for _ in range(calls):
        text.isascii()
    return time.perf_counter() - begin


def _own(loop: types.FunctionType) -> _Loop:
    """A copy of a loop: the interpreter specialises each call site for one type."""
    return types.FunctionType(loop.__code__.replace(), loop.__globals__)


@dataclasses.dataclass(frozen=True)
class _Implementation:
    """What is called, and how."""

    create: Callable[[], Any]
    loop: _Loop
    calls: int = 1  # for each of a Python loop


def _of_python(create: Callable[[], Any]) -> _Implementation:
    return _Implementation(create, _own(_python))  # type: ignore[arg-type]


def _of_core(counter: type[Counter]) -> _Implementation:
    create = functools.partial(_native.CoreLoop, f"counter.add/{counter.__name__}")
    return _Implementation(create, _native_loop, NATIVE)


IMPLEMENTATIONS = {
    "native-lock": _of_core(SharedCounter),
    "native-atomic": _of_core(AtomicCounter),
    "native-array": _of_core(PackedCounter),
    "native-padded": _of_core(DistributedCounter),
    "SharedCounter": _of_python(SharedCounter.create),
    "AtomicCounter": _of_python(AtomicCounter.create),
    "PackedCounter": _of_python(PackedCounter.create),
    "DistributedCounter": _of_python(DistributedCounter.create),
    "threading.Lock": _of_python(LockedCounter),
    "no-op": _Implementation(str, _no_op),
}


def time_per_call(implementation: _Implementation, processors: int, calls: int) -> float:
    """The time that a call takes: the mean of the threads, in ns.

    Args:
        implementation: what is called.
        processors: how many threads.
        calls: of each thread.

    Raises:
        Error: an add was lost or made twice.
    """
    counter = implementation.create()

    def body(_cpu: int, gate: Gate) -> float:
        implementation.loop(counter, WARM_UP, 0)
        return implementation.loop(counter, calls, gate.wait())

    seconds = statistics.mean(on_processors(processors, body))
    if not isinstance(counter, str):
        counted = counter.counted() if isinstance(counter, _native.CoreLoop) else counter.value()
        expected = processors * (WARM_UP + calls)
        if counted != expected:
            raise Error(f"counter: {expected} calls were counted as {counted}")
    if isinstance(counter, Counter):
        destroy(counter)
    return seconds / calls * 1e9


def measure(processors: Sequence[int], calls: int, rounds: int) -> list[Samples]:
    """Measure all implementations on each number of processors, interleaved."""
    return interleave(
        [
            Case(
                name,
                count,
                {"calls": calls * implementation.calls},
                functools.partial(time_per_call, implementation, count, calls * implementation.calls),
            )
            for count in processors
            for name, implementation in IMPLEMENTATIONS.items()
        ],
        rounds,
    )


def findings(samples: Sequence[Samples], processors: Sequence[int]) -> list[str]:
    """The ratios that matter, a line each: of many processors to one, to a call that does nothing, to the peer."""
    by_case = {(each.case.implementation, each.case.processors): each for each in samples}
    few, many = min(processors), max(processors)

    def line(one: tuple[str, int], other: tuple[str, int], wanted: str = "") -> str:
        ratio = by_case[one].ratio(by_case[other])
        named = [f"{name} ({count} proc.)" for name, count in (one, other)]
        return f"{named[0]} / {named[1]} = {ratio:.2f}{wanted}"

    lines = [line(("DistributedCounter", few), ("no-op", few), ", wanted: at most 1.5")]
    if many > few:
        parallel = not getattr(sys, "_is_gil_enabled", lambda: True)()
        for name in IMPLEMENTATIONS:
            flat = name == "native-padded" or (name == "DistributedCounter" and parallel)
            if parallel or name.startswith("native"):
                lines.append(line((name, many), (name, few), ", wanted: at most 1.05" if flat else ""))
    lines.append(line(("threading.Lock", many), ("DistributedCounter", many)))
    return lines


def run(options: Options) -> Report:
    """Measure all implementations; `time_per_call` is in ns, of each thread."""
    calls, rounds = (QUICK_CALLS, QUICK_ROUNDS) if options.quick else (CALLS, ROUNDS)
    samples = measure(options.processors, calls, rounds)
    return Report(
        "counter: the time of a call that adds to a common counter, by what it counts with",
        [each.record("counter", "time_per_call", "ns") for each in samples],
        findings(samples, options.processors),
    )
