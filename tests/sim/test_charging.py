"""What is shared is charged for, behaves as it did, and is named by the cost of its accesses."""

from __future__ import annotations

import array
import asyncio
import collections
import copy
import dataclasses
import functools
import pickle
import queue
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k42.errors import Error
from k42.sim import S85, Deadlock, Simulation
from k42.structures import Counter


class Plain:
    kind = "plain"

    def __init__(self) -> None:
        self.n = 0
        self._half = 1

    @property
    def half(self) -> int:
        return self._half

    @half.setter
    def half(self, value: int) -> None:
        self._half = value

    @functools.cached_property
    def late(self) -> list[int]:
        return [1, 2, 3]

    def add(self, k: int) -> None:
        self.n += k


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a = 1


@dataclasses.dataclass(frozen=True)
class Frozen:
    items: list[int]


class Stack(list[Any]):
    pushed = 0

    def push(self, item: Any) -> None:
        self.pushed += 1
        super().append(item)


class Node:
    def __init__(self, following: Node | None) -> None:
        self.following = following


def on(count: int, body: Callable[[int], object], *shared: Any, **options: Any) -> Simulation:
    """A run of `body` on so many processors, which share what is given."""
    sim = Simulation(S85, count, check=True)
    for each in shared:
        sim.share(each, **options)
    sim.run(body)
    for counts in sim.counts():
        assert counts.accesses == counts.hits + counts.misses
    rows = sim.stalls()
    assert sum(row.accesses for row in rows) == sum(counts.accesses for counts in sim.counts())
    assert sum(row.stalled for row in rows) == sum(counts.stalled for counts in sim.counts())
    return sim


def rows(sim: Simulation) -> dict[str, tuple[int, int]]:
    return {row.label: (row.accesses, row.writers) for row in sim.stalls()}


# Containers: any operations give what they give outside of the simulation, whatever is charged.

KEYS = st.one_of(st.integers(-3, 9), st.sampled_from(["a", "b", "é"]), st.tuples(st.integers(0, 2), st.just("t")))
NUMBERS = st.integers(0, 99)
INDICES = st.one_of(st.integers(-12, 12), st.builds(slice, *[st.none() | st.integers(-9, 9)] * 2))


def operations(table: dict[str, tuple[st.SearchStrategy[Any], ...]]) -> st.SearchStrategy[Any]:
    calls = [st.tuples(st.just(name), st.tuples(*arguments)) for name, arguments in table.items()]
    return st.lists(st.one_of(calls), max_size=25)


LIST = operations(
    {
        "append": (NUMBERS,),
        "extend": (st.lists(NUMBERS),),
        "insert": (st.integers(-9, 9), NUMBERS),
        "pop": (),
        "remove": (NUMBERS,),
        "reverse": (),
        "sort": (),
        "clear": (),
        "copy": (),
        "count": (NUMBERS,),
        "index": (NUMBERS,),
        "__len__": (),
        "__getitem__": (INDICES,),
        "__setitem__": (st.integers(-9, 9), NUMBERS),
        "__delitem__": (INDICES,),
        "__contains__": (NUMBERS,),
        "__iadd__": (st.lists(NUMBERS),),
        "__add__": (st.lists(NUMBERS),),
        "__imul__": (st.integers(0, 2),),
        "__eq__": (st.lists(NUMBERS),),
    }
)
DEQUE = operations(
    {
        "append": (NUMBERS,),
        "appendleft": (NUMBERS,),
        "extend": (st.lists(NUMBERS),),
        "extendleft": (st.lists(NUMBERS),),
        "pop": (),
        "popleft": (),
        "rotate": (st.integers(-3, 3),),
        "insert": (st.integers(-9, 9), NUMBERS),
        "remove": (NUMBERS,),
        "clear": (),
        "copy": (),
        "count": (NUMBERS,),
        "__len__": (),
        "__getitem__": (st.integers(-9, 9),),
        "__setitem__": (st.integers(-9, 9), NUMBERS),
        "__delitem__": (st.integers(-9, 9),),
        "__contains__": (NUMBERS,),
    }
)
DICT = operations(
    {
        "get": (KEYS,),
        "pop": (KEYS, NUMBERS),
        "popitem": (),
        "setdefault": (KEYS, NUMBERS),
        "update": (st.dictionaries(KEYS, NUMBERS),),
        "clear": (),
        "copy": (),
        "__len__": (),
        "__getitem__": (KEYS,),
        "__setitem__": (KEYS, NUMBERS),
        "__delitem__": (KEYS,),
        "__contains__": (KEYS,),
        "__or__": (st.dictionaries(KEYS, NUMBERS),),
        "__ior__": (st.dictionaries(KEYS, NUMBERS),),
        "__eq__": (st.dictionaries(KEYS, NUMBERS),),
    }
)
SET = operations(
    {
        "add": (KEYS,),
        "discard": (KEYS,),
        "remove": (KEYS,),
        "update": (st.lists(KEYS), st.lists(KEYS)),
        "union": (st.lists(KEYS),),
        "difference_update": (st.lists(KEYS),),
        "issubset": (st.sets(KEYS),),
        "clear": (),
        "copy": (),
        "__len__": (),
        "__contains__": (KEYS,),
        "__or__": (st.sets(KEYS),),
        "__ior__": (st.sets(KEYS) | st.lists(KEYS),),
        "__iand__": (st.sets(KEYS),),
        "__isub__": (st.sets(KEYS),),
        "__ixor__": (st.sets(KEYS),),
        "__le__": (st.sets(KEYS),),
    }
)


def outcome(target: Any, name: str, arguments: Any) -> Any:
    try:
        result = getattr(target, name)(*copy.deepcopy(arguments))
    except Exception as error:
        return type(error)
    return "itself" if result is target else result


@pytest.mark.parametrize(
    ("new", "calls"),
    [
        (list, LIST),
        (collections.deque, DEQUE),
        (lambda: collections.deque(maxlen=3), DEQUE),
        (dict, DICT),
        (lambda: collections.defaultdict(int), DICT),
        (collections.OrderedDict, DICT),
        (set, SET),
        (lambda: array.array("q"), LIST),
    ],
)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_containers_do_what_they_do(new, calls, data):
    drawn = data.draw(calls)
    theirs, inside, outside = new(), new(), new()
    sim = Simulation(S85, 1, check=True)
    sim.share(outside)
    sim.share(inside)

    def compare(mine: Any) -> None:
        for name, arguments in drawn:
            if not hasattr(theirs, name) or (name == "__imul__" and len(theirs) > 1000):
                continue
            assert outcome(mine, name, arguments) == outcome(theirs, name, arguments), name
            assert mine == theirs
            assert len(mine) == len(theirs)
            assert list(mine) == list(theirs)
            assert repr(mine) == repr(theirs)
            assert type(mine).__name__ == type(theirs).__name__
            if isinstance(theirs, dict):
                assert list(mine.items()) == list(theirs.items())
                assert list(mine.keys()) == list(theirs.keys())
                assert list(mine.values()) == list(theirs.values())
                assert mine.keys() == theirs.keys()
                assert repr(mine.items()).endswith(f"({list(theirs.items())!r})")

    compare(outside)
    theirs = new()
    sim.run(lambda _: compare(inside))
    kind = type(theirs)
    sim.unshare()
    assert type(inside) is kind
    assert inside == theirs


def test_what_a_container_touches():
    words, table = list(range(64)), {1: 1}
    sim = on(1, lambda _: (words[3], sum(words), table[1]), words, name="words")
    assert rows(sim) == {"words.length": (2, 0), "words[]": (1 + 64 * 8 // S85.line + 1, 0)}  # the lines of a scan
    sim = on(1, lambda _: (table[1], table.get(2), table.setdefault(1, 5)), table, name="table")
    assert rows(sim) == {"table.length": (3, 0), "table[]": (3, 0)}
    sim = on(1, lambda _: table.update({n: n for n in range(9)}), table, name="table")
    assert rows(sim)["table.length"] == (2, 1)


def test_of_an_iterator_only_what_is_taken():
    table = {n: n for n in range(1000)}
    sim = on(1, lambda _: next(iter(table)), table, name="table")
    assert rows(sim) == {"table.length": (1, 0), "table[]": (1, 0)}


# Objects.


@pytest.mark.parametrize("padded", [False, True])
def test_attributes(padded):
    plain, slotted = Plain(), Slotted()

    def body(_: int) -> None:
        assert plain.kind == "plain"
        plain.add(2)
        plain.half = 4
        plain.new = plain.half  # type: ignore[attr-defined]
        assert plain.late == [1, 2, 3]
        plain.late.append(4)
        assert not hasattr(plain, "missing")
        slotted.b = slotted.a
        del slotted.a
        assert not hasattr(slotted, "a")

    sim = on(1, body, plain, slotted, padded=padded)
    assert (plain.n, plain.half, plain.late, slotted.b) == (2, 4, [1, 2, 3, 4], 1)
    found = rows(sim)
    assert found["Plain.n"] == (2, 1)
    assert found["Plain._half"] == (2, 1)
    assert found["Plain.new"] == (1, 1)
    assert found["Plain.late"] == (1, 0)
    assert found["Plain.late[]"] == (1, 1)  # only then is it known
    assert found["Slotted.a"] == (2, 1)
    assert found["Slotted.b"] == (1, 1)
    assert not any("half" in label and "_half" not in label for label in found)


def test_an_object_stays_what_it_is():
    plain, frozen = Plain(), Frozen([1])
    sim = Simulation(S85, 1)
    assert sim.share(plain) is plain
    sim.share(frozen)
    assert isinstance(plain, Plain)
    assert plain.__class__ is Plain
    assert type(plain).__qualname__ == "Plain"
    assert frozen == Frozen([1])
    assert hash(plain) == object.__hash__(plain)
    for twin in (copy.copy(plain), copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert type(twin) is Plain
        assert vars(twin) == vars(plain)
    for container in ([1], {1: 2}, {1}, collections.deque([1]), collections.defaultdict(int)):
        before = repr(container), type(container)
        sim.share(container)
        assert (repr(container), type(copy.deepcopy(container))) == before
    assert not sim.stalls()
    sim.unshare()
    assert type(plain) is Plain
    assert type(frozen.items) is list


def test_what_is_stored_is_shared():
    # Also what still has a name of its own: it is the same object.
    top = Plain()

    def body(_: int) -> None:
        row: list[Any] = []
        top.rows = [row]  # type: ignore[attr-defined]
        row.append(Node(None))
        top.rows.append((Node(None), {}))  # type: ignore[attr-defined]
        assert top.rows[0] is row  # type: ignore[attr-defined]
        assert row[0].following is None
        assert top.rows[1][0].following is None  # type: ignore[attr-defined]

    sim = on(1, body, top)
    assert rows(sim)["Plain.rows[][]"] == (2, 1)
    assert rows(sim)["Node 1.following"] == rows(sim)["Node 2.following"] == (1, 0)


def test_what_is_stored_between_sharing_and_the_run():
    top = Plain()
    sim = Simulation(S85, 1)
    sim.share(top)
    top.late.append(4)
    sim.run(lambda _: top.late[3])
    assert rows(sim)["Plain.late[]"] == (1, 0)


def test_long_chains():
    first = None
    for _ in range(5000):
        first = Node(first)
    sim = on(1, lambda _: None, first)
    sim.unshare()
    assert type(first) is Node


def test_subclasses_of_containers():
    stack, counter = Stack(), collections.Counter()

    def body(_: int) -> None:
        stack.push(1)
        stack.append(2)
        counter.update("abba")
        counter["a"] += 1

    sim = on(1, body, stack, counter)
    assert (stack, stack.pushed, counter) == ([1, 2], 1, {"a": 3, "b": 2})
    found = rows(sim)
    assert found["Stack.pushed"] == (1, 1)
    assert found["Stack[]"] == (2, 1)
    assert found["Counter[]"][0] > 4


def test_padding_takes_false_sharing_away():
    def cycles(padded: bool) -> int:
        counters = [Plain() for _ in range(8)]
        sim = Simulation(S85, 8)
        sim.share(counters, padded=padded)

        def body(processor: int) -> None:
            mine = counters[processor]
            for _ in range(30):
                mine.n += 1

        result = max(sim.run(body))
        assert [counter.n for counter in counters] == [30] * 8
        return result

    assert cycles(False) > 2 * cycles(True)


def test_a_hot_attribute_is_named():
    top = Plain()

    def body(_: int) -> None:
        for _ in range(20):
            top.n += 1

    worst = on(8, body, top, padded=True, name="top").stalls()[0]
    assert (worst.label, worst.writers) == ("top.n", 8)
    assert worst.share > 0.9


def test_who_comes_first_does_not_run_ahead():
    # Nobody else has accessed the line yet, but somebody will, before the first one is done.
    top = Plain()

    def body(_: int) -> None:
        for _ in range(1000):
            top.n += 1

    sim = on(2, body, top)
    assert all(counts.interventions > 50 for counts in sim.counts())


def test_memory_has_names_too():
    sim = Simulation(S85, 2)
    words = [sim.allocate(8, padded=True, name="word") for _ in range(2)]
    sim.run(lambda processor: sim.store(words[processor]))
    assert rows(sim) == {"word 1": (1, 1), "word 2": (1, 1)}


def test_updates_are_lost_without_a_lock_and_always_the_same():
    def total(locked: bool) -> tuple[int, Any]:
        top, lock = Plain(), threading.Lock()
        sim = Simulation(S85, 4, seed=3)
        sim.share(top)
        lock = sim.share(lock)

        def body(_: int) -> None:
            for _ in range(25):
                if locked:
                    with lock:
                        top.n += 1
                else:
                    top.n += 1

        return top.n, (sim.run(body), sim.stalls(), top.n)

    assert total(True)[1][2] == 100
    assert total(False)[1][2] < 100
    assert total(False)[1] == total(False)[1]


# Locks.


@pytest.mark.parametrize("kind", [threading.Lock, threading.RLock])
def test_locks_of_threading(kind):
    class Guarded:
        def __init__(self) -> None:
            self.lock = self.again = kind()
            self.locks = [self.lock, kind()]
            self.n = 0

    top = Guarded()
    real = top.lock

    def body(_: int) -> None:
        assert top.lock is top.again
        for _ in range(10):
            with top.lock:
                if kind is threading.RLock:
                    with top.again:
                        pass
                top.n += 1
        assert top.locks[1].acquire(blocking=False) in (True, False)

    sim = on(4, body, top)
    assert top.n == 40
    assert "Guarded.lock" in rows(sim)
    with top.lock:  # other threads have the lock itself
        pass
    sim.unshare()
    assert top.lock is top.again is top.locks[0] is real


@pytest.mark.parametrize(
    ("use", "kind", "message"),
    [
        (lambda lock: lock.acquire(timeout=1), Error, "timeout of a lock"),
        (lambda lock: lock.release(), RuntimeError, "not held"),
        (lambda lock: (lock.acquire(), lock.acquire()), Deadlock, "1 simulated processors wait"),
    ],
)
def test_misuse_of_locks(use, kind, message):
    sim = Simulation(S85, 1)
    lock = sim.share(threading.Lock())
    with pytest.raises(kind, match=message):
        sim.run(lambda _: use(lock))


def test_a_lock_that_is_held():
    lock = threading.Lock()
    with lock, pytest.raises(Error, match="a lock that is held"):
        Simulation(S85, 1).share([lock])


# What cannot be simulated.


class Worker(threading.Thread):
    pass


def a_file() -> Any:
    return Path(__file__).open()


def a_socket() -> socket.socket:
    return socket.socket()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (threading.Condition, "Condition cannot be simulated: of threading, Lock and RLock can"),
        (threading.Event, "Event cannot"),
        (lambda: threading.Barrier(2), "Barrier cannot"),
        (threading.Semaphore, "Semaphore cannot"),
        (Worker, "Thread cannot"),
        (queue.Queue, "queue.Queue cannot be simulated: use a deque"),
        (queue.SimpleQueue, "SimpleQueue cannot"),
        (a_socket, "socket cannot"),
        (asyncio.Event, "asyncio.*cannot be simulated: write what it does as a function"),
        (Counter.create, "DistributedCounter, a Clustered Object, cannot be simulated"),
        (a_file, "a file .* cannot be simulated: read it before"),
    ],
)
def test_what_would_wait_elsewhere(make, message):
    value = make()
    top = Plain()
    top.held = [value]  # type: ignore[attr-defined]
    try:
        with pytest.raises(Error, match=message):
            Simulation(S85, 1).share(top)
        sim = Simulation(S85, 1)
        sim.share(lone := Plain())
        with pytest.raises(Error, match=message):
            sim.run(lambda _: setattr(lone, "held", value))
    finally:
        if hasattr(value, "close"):
            value.close()


def test_locks_where_nothing_can_stand_for_them():
    for value in ({threading.Lock()}, {threading.Lock(): 1}, {1: frozenset([threading.Lock()])}):
        with pytest.raises(Error, match=r"a lock in a .* cannot be simulated"):
            Simulation(S85, 1).share(value)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: threading.Thread(target=print).start(), "a thread cannot be started on a simulated processor"),
        (lambda: time.sleep(1), "time.sleep cannot be simulated"),
    ],
)
def test_what_a_processor_does_not_do(use, message):
    start, sleep = threading.Thread.start, time.sleep
    with pytest.raises(Error, match=message):
        Simulation(S85, 2).run(lambda _: use())
    assert (threading.Thread.start, time.sleep) == (start, sleep)


def test_other_threads_pay_nothing():
    top = Plain()
    sim = Simulation(S85, 1)
    sim.share(top)
    top.add(1)
    top.late.append(4)
    assert not sim.stalls()
    assert (top.n, top.late) == (1, [1, 2, 3, 4])
