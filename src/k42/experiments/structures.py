"""structures: each operation of the ready-made structures, by its implementations and by what one uses without them.

One thread a processor repeats an operation on an object that all share, as fast as it can; scalable is what takes the
same time on any number of processors. `time_per_call` is what a repetition takes, the loop included: wall time of each
thread from its first to its last one, the mean of the threads. Operations that belong together are one: entering a gate
and leaving it, taking an item and giving it back. Implementations are named `operation/implementation`:

- `call`: a method in Python that does nothing, by the reference to a distributed object, directly on the
  representative that `k42.local` returns, and on an ordinary object that all share.
- `counter.add`: count one more; `counter.value`: read the count. Peers: `+=` under a `threading.Lock`,
  `itertools.count` (`next`), `cereggii.AtomicInt64`, `prometheus_client`'s `Counter.inc`.
- `gate.enter+leave`, and the same as `gate.with`. Peers: a count under a lock; a lock, which lets one in at a time.
- `map.get`: `map[42]`, which all look up. The key is immortal, so nobody counts it; the value is a `str`, which a
  `ReplicatedMap` copies to each processor where there is no GIL. `map.get object`: the same, but the value is one
  object for all, whose reference count all change. `map.set`: each thread with a key of its own. Peers: a `dict`, a
  `dict` under a lock, `functools.lru_cache`, `cereggii.AtomicDict`.
- `intervals.get`: which of 64 disjoint ranges has this number in it? Peers: `bisect` on a sorted list, alone and under
  a lock.
- `pool.take+give_back`, and the same as `pool.with`. Peers: `queue.SimpleQueue` and `queue.Queue`, a `deque`, and a
  list under a lock.
- `no-op`: a method of an immortal object that does nothing, once and twice (`"".isascii()`): the yardsticks of calls.
  `translation (core)` is what is not theirs in a call on a reference: the way to the local representative.

Rows that end in `(core)` are the same operations in C++ in a loop in C++, a function call each, on integers instead of
Python's objects.

Peers that are not installed are left out, and it is said so: `pip install 'k42[peers]'`.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import queue
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from k42 import _native
from k42.experiments._record import Case, Samples
from k42.experiments._runner import Gate, Options, Report, interleave, on_processors
from k42.experiments.counter import LockedCounter
from k42.objects import DistributedRoot, Object, destroy, local
from k42.structures import (
    AtomicCounter,
    DistributedCounter,
    DistributedGate,
    DistributedPool,
    IntervalMap,
    Map,
    PackedCounter,
    PartitionedMap,
    Pool,
    ReplicatedIntervalMap,
    ReplicatedMap,
    SharedCounter,
    SharedGate,
    SharedIntervalMap,
    SharedMap,
    SharedPool,
)

CALLS = 100_000  # of each thread from Python, and ten times as many from native code
QUICK_CALLS = 10_000
NATIVE = 10
WARM_UP = 1_000  # calls before the measured ones: representatives are made, and the interpreter has adapted
ROUNDS = 11
QUICK_ROUNDS = 5
CORE = " (core)"
GIL = getattr(sys, "_is_gil_enabled", lambda: True)()  # threads take turns

# A loop repeats an operation on an object, from a moment on (ns, as time.monotonic_ns), and returns the seconds.
_Loop = Callable[[Any, int, int], float]

# A function of its own for each row: the interpreter specialises each call site for one type.
_LOOP = """
def loop(it, calls, start):
    while monotonic_ns() < start:
        pass
    begin = perf_counter()
    for _ in range(calls):
        {operation}
    return perf_counter() - begin
"""


def _python(operation: str) -> _Loop:
    names: dict[str, Any] = {
        "monotonic_ns": time.monotonic_ns,
        "perf_counter": time.perf_counter,
        "get_ident": threading.get_ident,
    }
    exec(_LOOP.format(operation=operation), names)
    loop: _Loop = names["loop"]
    return loop


def _native_loop(it: _native.CoreLoop, calls: int, start: int) -> float:
    return it.run(calls, start)


# What one writes without k42.


class LockedGate:
    """A gate's count under a lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects _inside
        self._inside = 0

    def enter(self) -> None:
        """One more is inside."""
        with self._lock:
            self._inside += 1

    def leave(self) -> None:
        """One less is inside."""
        with self._lock:
            self._inside -= 1

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *exc: object) -> None:
        self.leave()


class LockedDict:
    """A `dict` under a lock."""

    def __init__(self, items: dict[object, object]) -> None:
        self._lock = threading.Lock()  # protects _items
        self._items = items

    def __getitem__(self, key: object) -> object:
        with self._lock:
            return self._items[key]

    def __setitem__(self, key: object, value: object) -> None:
        with self._lock:
            self._items[key] = value


class SortedRanges:
    """Disjoint ranges in a sorted list; whoever changes it makes a new one."""

    def __init__(self) -> None:
        self._starts = [16 * i for i in range(64)]
        self._ranges = [(start, start + 8, _Value()) for start in self._starts]

    def get(self, number: int) -> object:
        """Return what belongs to the range that has the number in it."""
        start, end, value = self._ranges[bisect.bisect_right(self._starts, number) - 1]
        return value if start <= number < end else None


class LockedRanges(SortedRanges):
    """The same, changed in place under a lock."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()  # protects the lists

    def get(self, number: int) -> object:
        """Return what belongs to the range that has the number in it."""
        with self._lock:
            return super().get(number)


class LockedPool:
    """A list of free items under a lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects _free
        self._free = _items()

    def take(self) -> object:
        """Return an item."""
        with self._lock:
            return self._free.pop()

    def give_back(self, item: object) -> None:
        """Let others have it."""
        with self._lock:
            self._free.append(item)


def _items() -> list[object]:
    return [object() for _ in range(256)]


def _strings() -> dict[object, object]:
    return {i: f"value {i}" for i in range(64)}


class _Value:
    """Not immutable, as far as anyone can know."""


def _objects() -> dict[object, object]:
    return {i: _Value() for i in range(64)}


def _map(implementation: type[Map[Any, Any]], entries: Callable[[], dict[object, object]]) -> Map[Any, Any]:
    it = implementation.create()
    it.update(entries())
    return it


def _made(make: Callable[[dict[object, object]], Any], entries: Callable[[], dict[object, object]]) -> Any:
    return make(entries())


def _cache(entries: Callable[[], dict[object, object]]) -> Callable[[object], object]:
    return functools.lru_cache(entries().__getitem__)


def _pool(implementation: type[Pool[Any]]) -> Pool[Any]:
    return implementation.create(items=_items())


def _filled(make: Callable[[], Any]) -> Callable[[], Any]:
    """A queue with items in it."""

    def create() -> Any:
        it = make()
        for item in _items():
            it.put(item)
        return it

    return create


@dataclasses.dataclass(frozen=True)
class Row:
    """An operation by one implementation."""

    name: str
    create: Callable[[], Any]
    loop: _Loop
    calls: int = 1  # for each of a Python loop


def _row(name: str, create: Callable[[], Any], operation: str) -> Row:
    return Row(name, create, _python(operation))


def _core(name: str) -> Row:
    return Row(name + CORE, functools.partial(_native.CoreLoop, name), _native_loop, NATIVE)


class _Local(Object):
    """A representative for each processor, with a method that does nothing."""

    class Root(DistributedRoot):
        """Nothing is shared."""

    def nothing(self) -> None:
        """Just the call."""


class _Shared:
    """An ordinary object of Python's, for all."""

    def nothing(self) -> None:
        """Just the call."""


def _calls() -> list[Row]:
    loop = _python("it.nothing()")
    return [
        Row("call/reference", _Local.create, loop),
        Row("call/representative", _Local.create, lambda it, calls, start: loop(local(it), calls, start)),
        Row("call/shared object", _Shared, _python("it.nothing()")),
    ]


def _counters() -> list[Row]:
    rows = []
    for each in (SharedCounter, AtomicCounter, PackedCounter, DistributedCounter):
        rows.append(_row(f"counter.add/{each.__name__}", each.create, "it.add()"))
    rows.append(_row("counter.add/threading.Lock", LockedCounter, "it.add()"))
    rows.append(_row("counter.add/itertools.count", itertools.count, "next(it)"))
    if cereggii := _peer("cereggii"):
        rows.append(_row("counter.add/cereggii", cereggii.AtomicInt64, "it.increment_and_get()"))
    if prometheus := _peer("prometheus_client"):
        create = functools.partial(prometheus.Counter, "calls", "Calls.", registry=None)
        rows.append(_row("counter.add/prometheus_client", create, "it.inc()"))
    rows += [_core(f"counter.add/{each.__name__}") for each in (SharedCounter, AtomicCounter)]
    rows += [_core(f"counter.add/{each.__name__}") for each in (PackedCounter, DistributedCounter)]
    for each in (SharedCounter, AtomicCounter, DistributedCounter):
        rows.append(_row(f"counter.value/{each.__name__}", each.create, "it.value()"))
    return rows


def _gates() -> list[Row]:
    rows = []
    for operation, code in (("enter+leave", "it.enter(); it.leave()"), ("with", "with it: pass")):
        for gate in (SharedGate, DistributedGate):
            rows.append(_row(f"gate.{operation}/{gate.__name__}", gate.create, code))
        rows.append(_row(f"gate.{operation}/locked count", LockedGate, code))
    rows.append(_row("gate.with/threading.Lock", threading.Lock, "with it: pass"))
    rows += [_core(f"gate.enter+leave/{gate.__name__}") for gate in (SharedGate, DistributedGate)]
    return rows


def _maps() -> list[Row]:
    rows = []
    cereggii = _peer("cereggii")
    for operation, entries, code in (
        ("get", _strings, "it[42]"),
        ("get object", _objects, "it[42]"),
        ("set", _strings, "it[get_ident()] = None"),
    ):
        makers: dict[str, Callable[[dict[object, object]], Any]] = {"dict": dict, "locked dict": LockedDict}
        if cereggii:
            makers["cereggii"] = cereggii.AtomicDict
        for each in (SharedMap, PartitionedMap, ReplicatedMap):
            rows.append(_row(f"map.{operation}/{each.__name__}", functools.partial(_map, each, entries), code))
        for name, make in makers.items():
            rows.append(_row(f"map.{operation}/{name}", functools.partial(_made, make, entries), code))
        if operation != "set":
            cache = functools.partial(_cache, entries)
            rows.append(_row(f"map.{operation}/lru_cache", cache, "it(42)"))
    rows += [_core(f"map.get/{each.__name__}") for each in (SharedMap, PartitionedMap, ReplicatedMap)]
    return rows


def _interval_map(structure: type[IntervalMap[Any]]) -> IntervalMap[Any]:
    made = structure.create()
    for i in range(64):
        made.insert(16 * i, 16 * i + 8, _Value())
    return made


def _intervals() -> list[Row]:
    rows = [
        _row(f"intervals.get/{each.__name__}", functools.partial(_interval_map, each), "it[675]")
        for each in (SharedIntervalMap, ReplicatedIntervalMap)
    ]
    rows += [
        _row("intervals.get/bisect", SortedRanges, "it.get(675)"),
        _row("intervals.get/locked bisect", LockedRanges, "it.get(675)"),
    ]
    return rows + [_core(f"intervals.get/{name}") for name in ("SharedIntervalMap", "ReplicatedIntervalMap")]


def _pools() -> list[Row]:
    rows = []
    for operation, code in (
        ("take+give_back", "item = it.take(); it.give_back(item)"),
        ("with", "with it.item() as item: pass"),
    ):
        for pool in (SharedPool, DistributedPool):
            rows.append(_row(f"pool.{operation}/{pool.__name__}", functools.partial(_pool, pool), code))
    name = "pool.take+give_back"
    rows.append(_row(f"{name}/queue.SimpleQueue", _filled(queue.SimpleQueue), "it.put(it.get())"))
    rows.append(_row(f"{name}/queue.Queue", _filled(queue.Queue), "it.put(it.get())"))
    rows.append(_row(f"{name}/deque", lambda: collections.deque(_items()), "it.append(it.pop())"))
    rows.append(_row(f"{name}/locked list", LockedPool, "it.give_back(it.take())"))
    rows += [_core(f"{name}/{pool.__name__}") for pool in (SharedPool, DistributedPool)]
    return rows


def _yardsticks() -> list[Row]:
    return [
        _row("no-op/once", str, "it.isascii()"),
        _row("no-op/twice", str, "it.isascii(); it.isascii()"),
        Row("no-op/translation" + CORE, functools.partial(_native.CoreLoop, "translation"), _native_loop, NATIVE),
    ]


PEERS = ("cereggii", "prometheus_client")


def _peer(module: str) -> Any:
    return importlib.import_module(module) if importlib.util.find_spec(module) else None


def rows() -> list[Row]:
    """All that is measured, in the order of each round."""
    by_operation: dict[str, list[Row]] = {}
    for row in (*_yardsticks(), *_calls(), *_counters(), *_gates(), *_maps(), *_intervals(), *_pools()):
        by_operation.setdefault(row.name.rpartition("/")[0], []).append(row)
    return [row for each in by_operation.values() for row in each]


def time_per_call(row: Row, processors: int, calls: int) -> float:
    """The time that a repetition takes: the mean of the threads, in ns.

    Args:
        row: what is repeated.
        processors: how many threads.
        calls: of each thread.
    """
    it = row.create()

    def body(_cpu: int, gate: Gate) -> float:
        row.loop(it, WARM_UP, 0)
        return row.loop(it, calls, gate.wait())

    seconds = statistics.mean(on_processors(processors, body))
    if isinstance(it, Object):
        destroy(it)
    return seconds / calls * 1e9


def measure(rows: Sequence[Row], processors: Sequence[int], calls: int, rounds: int) -> list[Samples]:
    """Measure all rows on each number of processors, interleaved."""
    return interleave(
        [
            Case(
                row.name,
                count,
                {"calls": calls * row.calls},
                functools.partial(time_per_call, row, count, calls * row.calls),
            )
            for count in processors
            for row in rows
        ],
        rounds,
    )


# What is wanted: of a call against another in the same run, and of the core in ns.
_RATIOS = (
    ("counter.add/DistributedCounter", "no-op/once", 1.5),
    ("gate.enter+leave/DistributedGate", "no-op/twice", 1.5),
    ("map.get/ReplicatedMap", "map.get/dict", 2.0),
    ("call/reference", "call/representative", 1.9 if GIL else 1.3),
)
_CORE_NS = (
    ("counter.add/DistributedCounter" + CORE, 2.0),
    ("gate.enter+leave/DistributedGate" + CORE, 6.0),
    ("map.get/ReplicatedMap" + CORE, 25.0),
    ("no-op/translation" + CORE, 3.0),
)
# The throughput of many processors, as a part of as many times one processor's.
_THROUGHPUT = (
    ("counter.add/DistributedCounter", 0.95),
    ("gate.enter+leave/DistributedGate", 0.95),
    ("map.get/ReplicatedMap", 0.9),
    ("call/reference", 0.95),
)
_K42 = ("Shared", "Atomic", "Packed", "Partitioned", "Distributed", "Replicated")  # what its names begin with


def findings(samples: Sequence[Samples], processors: Sequence[int]) -> list[str]:
    """What to read from them, a line each."""
    by_case = {(each.case.implementation, each.case.processors): each for each in samples}
    few, many = min(processors), max(processors)
    lines = []
    for name, yardstick, wanted in _RATIOS:
        ratio = by_case[name, few].ratio(by_case[yardstick, few])
        lines.append(f"{name} / {yardstick} ({few} proc.) = {ratio:.2f}, wanted: at most {wanted}")
    for name, wanted in _CORE_NS:
        value = statistics.median(by_case[name, few].values)
        lines.append(f"{name} ({few} proc.) = {value:.1f} ns, wanted: at most {wanted:g}")
    for name, part in [*(() if GIL else _THROUGHPUT), *((name + CORE, part) for name, part in _THROUGHPUT[:3])]:
        if many > few:
            more = many / few
            throughput = more / by_case[name, many].ratio(by_case[name, few])
            wanted = part * more
            lines.append(
                f"{name}: throughput of {many} proc. / {few} proc. = {throughput:.2f}, wanted: at least {wanted:.2f}"
            )
    lines += _against_peers([each for each in samples if each.case.processors == many], many)
    lines += [f"{peer} is not installed, so it was not measured" for peer in PEERS if not _peer(peer)]
    return lines


def _against_peers(samples: Sequence[Samples], processors: int) -> list[str]:
    """Of each operation, the peer that is fastest and k42's distributed implementation."""
    by_operation: dict[str, list[tuple[str, Samples]]] = {}
    for each in samples:
        operation, _, name = each.case.implementation.rpartition("/")
        if not name.endswith(CORE):
            by_operation.setdefault(operation, []).append((name, each))
    lines = []
    for operation, found in by_operation.items():
        own = next((each for name, each in found if name.startswith(("Distributed", "Replicated"))), None)
        peers = [(statistics.median(each.values), name, each) for name, each in found if not name.startswith(_K42)]
        if own and peers:
            _, name, peer = min(peers, key=lambda each: each[0])
            ours = own.case.implementation.rpartition("/")[2]
            ratio = peer.ratio(own)
            lines.append(f"{operation}: the fastest peer, {name}, / {ours} ({processors} proc.) = {ratio:.2f}")
    return lines


def run(options: Options) -> Report:
    """Measure all rows; `time_per_call` is in ns, of each thread."""
    calls, rounds = (QUICK_CALLS, QUICK_ROUNDS) if options.quick else (CALLS, ROUNDS)
    samples = measure(rows(), options.processors, calls, rounds)
    return Report(
        "structures: the time of an operation on an object that all share, by who implements it",
        [each.record("structures", "time_per_call", "ns") for each in samples],
        findings(samples, options.processors),
    )
