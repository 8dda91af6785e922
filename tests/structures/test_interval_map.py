"""Interval maps: against the model one step at a time, with real threads for what must hold among them."""

from __future__ import annotations

import gc
import itertools
import pickle
import random
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import k42
from k42 import _native
from k42.sim.models import interval_map as models
from k42.structures import Interval, IntervalMap, ReplicatedIntervalMap, SharedIntervalMap
from k42.structures.interval_map import IMPLEMENTATIONS
from k42.testing import History, NotLinearizable, check, frequent_switches, memory_flat, race

MODELS = {SharedIntervalMap: models.SharedIntervalMap, ReplicatedIntervalMap: models.ReplicatedIntervalMap}
TOP = 2**64 - 1

every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda cls: cls.__name__)
both = pytest.mark.parametrize("target", IMPLEMENTATIONS, ids=lambda cls: cls.__name__)


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda cls: cls.__name__)
def intervals(request):
    intervals = request.param.create()
    yield intervals
    k42.destroy(intervals)


class Index:
    """An integer of a kind of its own, as numpy's are."""

    def __init__(self, n):
        self.n = n

    def __index__(self):
        return self.n


# Against the model


def outcome(call, *args):
    """What a call returns, or the type of what it raises."""
    try:
        result = call(*args)
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        return type(error)
    return tuple(result) if isinstance(result, (Interval, models.Interval)) else result


near = st.integers(0, 60)
keys = st.one_of(near, near, near.map(Index), st.sampled_from([-1, TOP, TOP - 1, TOP + 1, 2**63, 2**100, True]))
odd = st.one_of(keys, st.sampled_from([None, "1", 1.0, ()]))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), st.integers(0, 2), near, near),
        st.tuples(st.just("insert"), st.integers(0, 2), near, st.just(TOP)),
        st.tuples(st.just("insert"), st.integers(0, 2), odd, odd),
        st.tuples(st.sampled_from(["find", "remove", "__getitem__", "__contains__"]), st.integers(0, 2), near),
        st.tuples(st.sampled_from(["find", "remove", "__getitem__", "__contains__"]), st.integers(0, 2), odd),
        st.tuples(st.sampled_from(["__len__", "__iter__", "new_thread"]), st.integers(0, 2)),
    ),
    max_size=60,
)


@every
@settings(deadline=None)
@given(steps=steps)
def test_as_the_model_says(implementation, steps):
    intervals, model = implementation.create(), MODELS[implementation]()
    threads = [ThreadPoolExecutor(1) for _ in range(3)]
    values = itertools.count()
    try:
        for step, i, *args in steps:
            if step == "new_thread":
                threads[i].shutdown()
                threads[i] = ThreadPoolExecutor(1)
                continue
            if step == "insert":
                args.append(f"value {next(values)}")
            if step == "__iter__":
                actual = threads[i].submit(list, intervals).result()
                assert list(map(tuple, actual)) == list(map(tuple, model))
                continue
            actual = threads[i].submit(outcome, getattr(intervals, step), *args).result()
            assert actual == outcome(getattr(model, step), *args), (step, args)
        assert len(intervals) == len(model)
        for key in range(70):
            for thread in threads:
                assert thread.submit(intervals.__contains__, key).result() == (key in model)
    finally:
        for thread in threads:
            thread.shutdown()
        k42.destroy(intervals)


# The interface


def test_the_default_is_replicated():
    intervals = IntervalMap.create()
    assert isinstance(intervals, ReplicatedIntervalMap)
    assert isinstance(intervals, IntervalMap)
    k42.destroy(intervals)


def test_what_is_found(intervals):
    value = object()
    intervals.insert(10, 20, value)
    intervals.insert(20, 21, None)
    found = intervals.find(19)
    assert type(found) is Interval
    assert (found.start, found.end, found.value) == found == (10, 20, value)
    assert intervals[10] is value
    assert intervals[20] is None
    assert 20 in intervals
    assert intervals.find(20).value is None
    assert intervals.find(9) is intervals.find(21) is None
    assert list(intervals) == [(10, 20, value), (20, 21, None)]
    assert len(intervals) == 2
    assert bool(intervals)


def test_the_representative_alone(intervals):
    rep = k42.local(intervals)
    rep.insert(1, 3, "a")
    assert rep[1] == rep.find(2).value == "a"
    assert 3 not in rep
    assert len(rep) == len(list(rep)) == 1
    assert rep.remove(1) == "a"
    with pytest.raises(KeyError):
        rep[1]


def test_a_replica_is_its_processors():
    intervals = ReplicatedIntervalMap.create()
    rep = k42.local(intervals)

    def elsewhere():
        for call in (rep.find, rep.__getitem__, rep.__contains__):
            with pytest.raises(RuntimeError, match="another processor"):
                call(1)

    race(elsewhere)
    k42.destroy(intervals)


def test_what_is_refused_changes_nothing(intervals):
    intervals.insert(10, 20, "a")
    intervals.insert(30, 40, "b")
    for start, end in ((10, 20), (0, 11), (19, 21), (12, 13), (0, 100), (15, 35)):
        with pytest.raises(ValueError, match=rf"^\[{start}, {end}\) overlaps \[10, 20\)"):
            intervals.insert(start, end, "c")
    for start, end in ((5, 5), (6, 5), (TOP, 0)):
        with pytest.raises(ValueError, match="is empty"):
            intervals.insert(start, end, "c")
    for start, end, name in ((-1, 5, "start"), (0, 2**64, "end"), (2**100, 5, "start")):
        with pytest.raises(OverflowError, match=f"^{name} must be from 0 to"):
            intervals.insert(start, end, "c")
    for start, end in ((1.0, 2), ("1", 2), (1, None)):
        with pytest.raises(TypeError):
            intervals.insert(start, end, "c")
    for wrong in (lambda: intervals.insert(1, 2), lambda: intervals.find(), lambda: intervals.remove(1, 2)):
        with pytest.raises(TypeError):
            wrong()
    for start in (0, 11, 20, -1, 2**64):
        with pytest.raises(KeyError) as raised:
            intervals.remove(start)
        assert raised.value.args == (start,)
    for key in (9, 20, 40, -1, 2**64):
        with pytest.raises(KeyError) as raised:
            intervals[key]
        assert raised.value.args == (key,)
        assert key not in intervals
    for call in (intervals.find, intervals.remove, intervals.__getitem__, intervals.__contains__):
        with pytest.raises(TypeError):
            call("1")
    assert list(intervals) == [(10, 20, "a"), (30, 40, "b")]


def test_the_whole_range(intervals):
    intervals.insert(0, TOP, "all")
    assert intervals[0] == intervals[TOP - 1] == "all"
    assert TOP not in intervals
    assert intervals.remove(0) == "all"
    intervals.insert(TOP - 1, TOP, "last")
    assert intervals.find(TOP - 1) == (TOP - 1, TOP, "last")


def test_iteration_is_over_a_snapshot(intervals):
    for i in range(5):
        intervals.insert(i * 10, i * 10 + 5, i)
    seen = []
    for interval in intervals:
        seen.append(interval.value)
        assert intervals.remove(interval.start) == interval.value
        intervals.insert(interval.start + 5, interval.start + 10, "new")
    assert seen == [0, 1, 2, 3, 4]
    assert [interval.value for interval in intervals] == ["new"] * 5


def test_an_interval_is_a_tuple_that_can_be_kept():
    intervals = IntervalMap.create()
    intervals.insert(1, 2, "x")
    found = intervals.find(1)
    assert pickle.loads(pickle.dumps(found)) == found
    assert repr(found) == "k42.structures.Interval(start=1, end=2, value='x')"
    k42.destroy(intervals)


@every
def test_destroyed(implementation):
    intervals = implementation.create()
    intervals.insert(1, 2, "x")
    k42.destroy(intervals)
    for call in (
        lambda: intervals.insert(1, 2, 3),
        lambda: intervals.find(1),
        lambda: intervals.remove(1),
        lambda: intervals[1],
        lambda: 1 in intervals,
        lambda: len(intervals),
        lambda: iter(intervals),
    ):
        with pytest.raises(k42.Destroyed, match="IntervalMap"):
            call()


@every
@both
def test_state_is_transferred(implementation, target):
    root, other = implementation.Root(), target.Root()
    rep = root.create_rep()
    for i in range(100):
        rep.insert(i * 3, i * 3 + 2, i)
    exported = root.export_state("intervals")
    assert exported == list(rep) == [(i * 3, i * 3 + 2, i) for i in range(100)]
    other.import_state("intervals", exported)
    assert list(other.create_rep()) == list(rep) == exported


@every
@both
def test_swapped_under_load(implementation, target):
    intervals = implementation.create()
    for i in range(20):
        intervals.insert(i * 10, i * 10 + 5, i)
    done = threading.Event()

    def look():
        random_ = random.Random(1)
        while not done.is_set():
            key = random_.randrange(200)
            found = intervals.find(key)
            assert (found is None) == (key % 10 >= 5)
            assert found is None or found.value == key // 10

    def swapper():
        try:
            for _ in range(4):
                for cls in (target, implementation):
                    k42.swap(intervals, cls)
                    assert isinstance(intervals, cls)
        finally:
            done.set()

    race(swapper, look, look)
    assert len(intervals) == 20
    k42.destroy(intervals)


def test_an_implementation_in_python():
    class Plain(IntervalMap):
        class Root(k42.SharedRoot):
            pass

        def __init__(self):
            self.model = models.IntervalMap()

        def insert(self, start, end, value):
            self.model.insert(start, end, value)

        def find(self, key):
            return self.model.find(key)

    plain = Plain.create()
    plain.insert(1, 3, "a")
    assert plain[2] == "a"
    assert 3 not in plain
    with pytest.raises(KeyError):
        plain[3]
    with pytest.raises(NotImplementedError, match=r"remove\(\)"):
        plain.remove(1)
    k42.destroy(plain)


# Values: how long they live


class Value:
    pass


def test_the_map_keeps_values_alive(intervals):
    value = Value()
    alive = weakref.ref(value)
    intervals.insert(1, 2, value)
    del value
    assert intervals[1] is alive()
    assert intervals.remove(1) is alive()
    gc.collect()
    assert alive() is None


def test_refused_values_are_not_kept(intervals):
    intervals.insert(1, 5, None)
    value = Value()
    for args in ((2, 3), (9, 9), (-1, 3), ("x", 3)):
        with pytest.raises((ValueError, OverflowError, TypeError)):
            intervals.insert(*args, value)
    alive = weakref.ref(value)
    del value
    gc.collect()
    assert alive() is None


@every
def test_values_go_with_the_map(implementation):
    intervals = implementation.create()
    values = [Value() for _ in range(10)]
    alive = [weakref.ref(value) for value in values]
    for i, value in enumerate(values):
        intervals.insert(i, i + 1, value)
        assert intervals[i] is value
    del values, value
    k42.destroy(intervals)
    gc.collect()
    assert not any(ref() for ref in alive)


@every
@pytest.mark.skipif(
    not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="references are immortal without a GIL in 3.13"
)
def test_a_cycle_through_the_map_is_collected(implementation):
    value = Value()
    value.intervals = implementation.create()
    value.intervals.insert(1, 2, value)
    assert value.intervals[1] is value
    alive = weakref.ref(value)
    del value
    gc.collect()
    gc.collect()
    assert alive() is None


@every
def test_the_collector_sees_what_is_inside(implementation):
    root = implementation.Root()
    rep = root.create_rep()
    value = Value()
    rep.insert(1, 2, value)
    assert value in gc.get_referents(root.map)
    assert root.map in gc.get_referents(rep)
    value.root, value.rep = root, rep
    alive = weakref.ref(value)
    del value, root, rep
    gc.collect()
    assert alive() is None


def test_a_value_whose_end_changes_the_map(intervals):
    """Releasing a value can run anything: nothing native is held."""

    class Busy:
        def __init__(self, n):
            self.n = n

        def __del__(self):
            assert self.n not in intervals
            intervals.insert(1000 + self.n, 1001 + self.n, None)

    for n in range(200):
        intervals.insert(n, n + 1, Busy(n))
    for n in range(200):
        intervals.remove(n)
    gc.collect()
    assert len(intervals) == 200


def test_memory_is_flat(intervals):
    """Also where other threads look everything up once, and look up nothing more after that."""
    numbers = itertools.count()

    def one_round():
        starts = [next(numbers) * 10 for _ in range(200)]
        for start in starts:
            intervals.insert(start, start + 10, bytearray(1000))
        for start in starts:
            assert intervals.find(start + 9).start == start
        for start in starts:
            intervals.remove(start)

    memory_flat(one_round, 60, tolerance=1 << 20)


# With threads


def test_every_key_has_one_owner(intervals):
    n, rounds, space = 4, 300, 40
    owners = [None] * space

    def work(me):
        random_ = random.Random(me)
        for _ in range(rounds):
            start = random_.randrange(space - 4)
            end = start + random_.randrange(1, 4)
            try:
                intervals.insert(start, end, me)
            except ValueError:
                found = intervals.find(start)
                assert found is None or found.start <= start < found.end
                continue
            for key in range(start, end):
                assert owners[key] is None
                owners[key] = me
            assert intervals[end - 1] == me
            for key in range(start, end):
                assert owners[key] == me
                owners[key] = None
            assert intervals.remove(start) == me

    with frequent_switches():
        race(*(partial(work, me) for me in range(n)))
    assert len(intervals) == 0


def test_what_was_removed_is_not_found_again(intervals):
    """Values are numbered; `gone` says which have been removed for sure, and readers ask before they look."""
    slots, rounds = 4, 400
    gone = [0] * slots  # values of a slot up to this one
    done = threading.Event()

    def write(slot):
        for number in range(1, rounds + 1):
            start = slot * 100 + number % 7
            intervals.insert(start, slot * 100 + 50, number)
            assert intervals.remove(start) == number
            gone[slot] = number
        return slot

    def writers(slots):
        for slot in slots:
            write(slot)

    def read(seed):
        random_ = random.Random(seed)
        hits = 0
        while not done.is_set():
            slot = random_.randrange(slots)
            least = gone[slot]
            found = intervals.find(slot * 100 + 20)
            if found is not None:
                hits += 1
                assert found.value > least
                assert found.start == slot * 100 + found.value % 7
        return hits

    def all_writers():
        try:
            race(partial(writers, (0, 1)), partial(writers, (2, 3)))
        finally:
            done.set()

    with frequent_switches():
        race(all_writers, partial(read, 1), partial(read, 2))
    assert len(intervals) == 0


def test_values_that_are_released_while_others_look(intervals):
    """Each look-up returns a value that lives, though its map may let go of it at that moment."""
    done = threading.Event()

    def read():
        while not done.is_set():
            found = intervals.find(5)
            assert found is None or found.value == [found.start, found.end]

    def write():
        for i in range(3000):
            intervals.insert(i % 5, 10, [i % 5, 10])
            intervals.remove(i % 5)
        done.set()

    with frequent_switches():
        race(write, read, read)


def test_threads_come_and_go(intervals):
    """Replicas pass from thread to thread, with what they have."""
    for wave in range(30):
        intervals.insert(wave * 10, wave * 10 + 10, wave)

        def work(wave=wave):
            for i in range(wave + 1):
                assert intervals[i * 10 + 3] == i or i % 5 == 0

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if wave % 5 == 0:
            intervals.remove(wave * 10)
            intervals.insert(wave * 10, wave * 10 + 5, "again")


# Histories


class Specification:
    """The model, whose errors and intervals compare with those of the map."""

    def __init__(self):
        self.model = models.IntervalMap()

    def insert(self, start, end, value):
        self.model.insert(start, end, value)

    def find(self, key):
        return self.model.find(key)

    def remove(self, start):
        return self.model.remove(start)

    def __getitem__(self, key):
        return self.model[key]

    def __contains__(self, key):
        return key in self.model

    def __len__(self):
        return len(self.model)


def recorded(implementation, seed, waves=3, calls=25):
    history = History()
    reference = implementation.create()
    intervals = history.record(reference)

    def work(thread):
        random_ = random.Random(seed * 10 + thread)
        for call in range(calls):
            key = random_.randrange(6)
            try:
                match random_.randrange(10):
                    case 0 | 1 | 2:
                        intervals.insert(key, key + random_.randrange(1, 4), (thread, call))
                    case 3 | 4:
                        intervals.remove(key)
                    case 5:
                        intervals[key]
                    case 6:
                        _ = key in intervals
                    case 7:
                        len(intervals)
                    case _:
                        intervals.find(key)
            except (KeyError, ValueError):
                pass

    with frequent_switches():
        for _ in range(waves):
            race(*(partial(work, thread) for thread in range(4)))
    k42.destroy(reference)
    return history


@every
def test_histories_are_linearizable(implementation):
    for seed in range(8):
        check(
            recorded(implementation, seed),
            Specification,
            state=lambda specification: frozenset(specification.model.intervals),
        )


def test_a_history_that_is_not():
    history = History()
    intervals = history.record(models.IntervalMap())
    intervals.insert(1, 3, "a")
    intervals.remove(1)
    history.call("find", lambda key: models.Interval(1, 3, "a"), 2)
    with pytest.raises(NotLinearizable, match="find"):
        check(history, Specification)


# What is native


def test_roots_hold_what_cannot_be_called_as_a_representative():
    for native in (_native.SharedIntervalMap, _native.ReplicatedIntervalMap):
        native_map = native()
        with pytest.raises(TypeError):
            native(1)
        rep = native_map.join()
        del native_map
        rep.insert(1, 2, "kept alive by the representative")
        assert rep[1]
        with pytest.raises(TypeError):
            type(rep)()
