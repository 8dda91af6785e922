"""Maps: against the model one step at a time, and the interface of a Python dictionary."""

from __future__ import annotations

import gc
import pickle
import sys
import weakref
from collections.abc import MutableMapping
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import k42
from k42 import _native
from k42.sim.models import map as models
from k42.structures import Map, PartitionedMap, ReplicatedMap, SharedMap
from k42.structures.map import IMPLEMENTATIONS

every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda cls: cls.__name__)
FREE_THREADED = not getattr(sys, "_is_gil_enabled", lambda: True)()


class Key:
    """Equal to every key of its number, and of the same hash as many others."""

    def __init__(self, n):
        self.n = n

    def __eq__(self, other):
        return isinstance(other, Key) and other.n == self.n

    def __hash__(self):
        return self.n % 3

    def __repr__(self):
        return f"Key({self.n})"


# Against the model. Small ints are nobody's to copy, so replicas are what the model says.

keys = st.one_of(
    st.integers(-3, 20),
    st.booleans(),
    st.sampled_from([0.0, 1.0, 1.5, 2**70, -(2**70)]),
    st.sampled_from(["", "a", "b", "ä", "\U0001f600", "ab" * 20]),
    st.sampled_from([b"", b"a", b"ab"]),
    st.sampled_from([(), (1,), (1.0,), (True, "a"), (1, "a"), ((1,), 2), ((1.0,), 2), (None,)]),
    st.none(),
    st.frozensets(st.integers(0, 2), max_size=2),
    st.integers(0, 8).map(Key),
)
values = st.integers(0, 100)
processors = st.integers(0, 2)


class Machine(RuleBasedStateMachine):
    implementation: type[Map]
    model_class: type[models.Map]

    def __init__(self):
        super().__init__()
        self.map = self.implementation.create()
        self.model = self.model_class()
        self.threads = [ThreadPoolExecutor(1) for _ in range(3)]

    def teardown(self):
        for thread in self.threads:
            thread.shutdown()
        k42.destroy(self.map)

    def both(self, i, real, expected):
        """The same result or type of error, with the call made on thread i."""

        def outcome(call):
            try:
                return call()
            except (KeyError, TypeError, ZeroDivisionError, k42.Error) as error:
                return type(error)

        processor = self.threads[i].submit(k42.processors.current).result()
        got = self.threads[i].submit(outcome, real).result()
        want = outcome(lambda: expected(processor))
        assert got == want, (got, want)

    @rule(i=processors, key=keys)
    def get(self, i, key):
        self.both(i, lambda: self.map.get(key, "none"), lambda p: self.model.get(p, key, "none"))

    @rule(i=processors, key=keys)
    def contains(self, i, key):
        self.both(i, lambda: key in self.map, lambda p: self.model.get(p, key, None) is not None)

    @rule(i=processors, key=keys, value=values)
    def set(self, i, key, value):
        self.both(i, lambda: self.map.__setitem__(key, value), lambda p: self.model.set(p, key, value))

    @rule(i=processors, key=keys)
    def pop(self, i, key):
        self.both(i, lambda: self.map.pop(key), lambda p: self.model.pop(p, key))

    @rule(i=processors, key=keys)
    def delete(self, i, key):
        self.both(i, lambda: self.map.__delitem__(key), lambda p: self.model.pop(p, key) and None)

    @rule(i=processors, key=keys, value=values)
    def setdefault(self, i, key, value):
        self.both(i, lambda: self.map.setdefault(key, value), lambda p: self.model.setdefault(p, key, value))

    @rule(i=processors, key=keys, value=values)
    def find_or_allocate(self, i, key, value):
        def factory():
            return 100 // value  # which may fail

        self.both(
            i,
            lambda: self.map.find_or_allocate(key, factory),
            lambda p: self.model.find_or_allocate(p, key, factory),
        )

    @rule(i=processors, key=keys)
    def own_key(self, i, key):
        self.both(
            i,
            lambda: self.map.find_or_allocate(key, lambda: self.map.find_or_allocate(key, int)),
            lambda p: self.model.find_or_allocate(p, key, lambda: self.model.find_or_allocate(p, key, int)),
        )

    @rule(i=processors, key=keys)
    def set_while_made(self, i, key):
        def factory(set_it):
            set_it(key, 5)
            return 6

        self.both(
            i,
            lambda: self.map.find_or_allocate(key, lambda: factory(self.map.__setitem__)),
            lambda p: self.model.find_or_allocate(p, key, lambda: factory(lambda k, v: self.model.set(p, k, v))),
        )

    @rule(i=processors, key=keys)
    def scatter(self, i, key):
        self.both(
            i, lambda: self.map.scatter(key, lambda v: v // 2), lambda p: self.model.scatter(p, key, lambda v: v // 2)
        )

    @rule(i=processors, key=keys)
    def gather(self, i, key):
        self.both(i, lambda: self.map.gather(key), lambda p: self.model.gather(p, key))

    @rule(i=processors)
    def empty(self, i):
        self.both(i, self.map.empty, self.model.empty)

    @precondition(lambda self: self.model.values)
    @rule()
    def popitem(self):
        key, value = self.map.popitem()
        assert self.model.pop(-1, key) == value

    @rule(i=processors)
    def new_thread(self, i):
        self.threads[i].shutdown()
        self.threads[i] = ThreadPoolExecutor(1)

    @invariant()
    def the_same(self):
        assert len(self.map) == len(self.model.values)
        assert dict(self.map.items()) == self.model.values
        assert set(self.map) == set(self.map.keys()) == set(self.model.values)


def machine(implementation):
    made = type(
        implementation.__name__,
        (Machine,),
        {"implementation": implementation, "model_class": getattr(models, implementation.__name__)},
    ).TestCase
    made.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
    return made


TestSharedMap = machine(SharedMap)
TestPartitionedMap = machine(PartitionedMap)
TestReplicatedMap = machine(ReplicatedMap)


# A mutable mapping


@every
def test_a_mutable_mapping(implementation):
    m = implementation.create()
    assert isinstance(m, MutableMapping)
    assert isinstance(m, Map)
    m.update({"a": 1, "b": 2}, c=3)
    m.update([("d", 4)])
    assert dict(m) == {"a": 1, "b": 2, "c": 3, "d": 4}
    assert sorted(m) == sorted(m.keys()) == ["a", "b", "c", "d"]
    assert sorted(m.values()) == [1, 2, 3, 4]
    assert m.keys() & {"a", "x"} == {"a"}
    assert ("a", 1) in m.items()
    assert ("a", 2) not in m.items()
    assert 4 in m.values()
    assert 5 not in m.values()
    assert len(m.items()) == len(m.keys()) == len(m.values()) == 4
    assert m.pop("a") == 1
    assert m.pop("a", 7) == m.pop("a", default=7) == m.get("a", 7) == 7
    with pytest.raises(KeyError, match="popitem"):
        [m.popitem() for _ in range(4)]
    assert not m
    m.update(z=1)
    m.clear()
    assert list(m) == []
    k42.destroy(m)


def test_the_default_is_replicated():
    m = Map.create(copy_immutable=False)
    assert isinstance(m, ReplicatedMap)
    k42.destroy(m)
    for call in (lambda: m["a"], lambda: m.get("a"), lambda: len(m), lambda: list(m), lambda: m.keys() & {1}):
        with pytest.raises(k42.Destroyed):
            call()


@every
def test_equal_by_identity(implementation):
    a, b = implementation.create(), implementation.create()
    assert a == a
    assert a != b
    assert len({a, b}) == 2
    for m in (a, b):
        k42.destroy(m)


@every
def test_unhashable_keys(implementation):
    m = implementation.create()
    for call in (
        lambda: m[[]],
        lambda: m.get([]),
        lambda: m.__setitem__([], 1),
        lambda: m.pop({}),
        lambda: [] in m,
        lambda: m.setdefault([]),
        lambda: m.find_or_allocate([], int),
        lambda: m.gather([]),
        lambda: m.scatter([], int),
        lambda: m.__delitem__(([],)),
    ):
        with pytest.raises(TypeError, match="unhashable"):
            call()
    assert len(m) == 0
    k42.destroy(m)


@every
def test_missing_keys(implementation):
    m = implementation.create()
    for key in ("a", (1, 2), ()):
        for call in (m.__getitem__, m.__delitem__, m.pop, m.gather, lambda k: m.scatter(k, int)):
            with pytest.raises(KeyError) as raised:
                call(key)
            assert raised.value.args == (key,)
    k42.destroy(m)


@every
def test_wrong_arguments(implementation):
    m = implementation.create()
    for call, match in (
        (lambda: m.get(), "from 1 to 2 arguments, not 0"),
        (lambda: m.get(1, 2, 3), "from 1 to 2"),
        (lambda: m.get(key=1), "no argument"),
        (lambda: m.get(1, 2, default=3), "from 1 to 2"),
        (lambda: m.setdefault(default=3), "by position"),
        (lambda: m.find_or_allocate(1), "takes 2 arguments"),
        (lambda: m.scatter(1, nothing=2), "no argument"),
        (lambda: m.empty(1), "takes no arguments"),
        (lambda: m.popitem(1), "takes no arguments"),
    ):
        with pytest.raises(TypeError, match=match):
            call()
    with pytest.raises(TypeError):
        implementation.create(1)
    k42.destroy(m)


@every
def test_calls_through_the_type(implementation):
    m = implementation.create()
    type(m).__setitem__(m, "a", 1)
    assert type(m).get(m, "a") == m.__getitem__("a") == k42.local(m)["a"] == 1
    assert k42.local(m).get("a") == 1
    assert "a" in k42.local(m)
    assert len(k42.local(m)) == 1
    with pytest.raises(TypeError):
        type(m).get({}, "a")
    k42.destroy(m)


# Code of others that runs in the middle


@every
def test_an_equality_that_changes_the_map(implementation):
    m = implementation.create()

    class Changing(Key):
        armed = False

        def __eq__(self, other):
            if Changing.armed:
                Changing.armed = False
                m.pop("x", None)
                m.empty()
                for i in range(50):
                    m[Key(i)] = i
            return super().__eq__(other)

        __hash__ = Key.__hash__

    for operation in (
        lambda k: m.get(k),
        lambda k: m.__setitem__(k, 1),
        lambda k: m.pop(k, None),
        lambda k: m.setdefault(k, 2),
        lambda k: m.find_or_allocate(k, int),
    ):
        for _ in range(3):
            for i in range(6):
                m[Changing(i)] = i
                m.get(Changing(i))
            Changing.armed = True
            operation(Changing(4))
            Changing.armed = False
            assert m[Key(40)] == 40
    k42.destroy(m)


@every
def test_an_equality_that_raises(implementation):
    class Bad(Key):
        def __eq__(self, other):
            raise ZeroDivisionError

        __hash__ = Key.__hash__

    m = implementation.create()
    m[Key(1)] = 1
    m[Key(1)]
    for call in (
        lambda: m[Bad(1)],
        lambda: m.__setitem__(Bad(1), 1),
        lambda: m.pop(Bad(1)),
        lambda: m.setdefault(Bad(1)),
        lambda: m.find_or_allocate(Bad(1), int),
        lambda: m.scatter(Bad(1), int),
        lambda: Bad(1) in m,
    ):
        with pytest.raises(ZeroDivisionError):
            call()
    assert dict(m) == {Key(1): 1}
    k42.destroy(m)


@every
def test_a_finaliser_that_uses_the_map(implementation):
    m = implementation.create()
    runs = []

    class Dying:
        def __init__(self, n):
            self.n = n

        def __del__(self):
            runs.append(self.n)
            if self.n:
                m["k"] = Dying(self.n - 1)
            m.get("k")

    m["k"] = Dying(5)
    m.get("k")
    while m.pop("k", None) is not None:
        pass
    assert runs == [5, 4, 3, 2, 1, 0]
    k42.destroy(m)


@every
def test_what_is_removed_goes_at_once(implementation):
    class Value:
        pass

    m = implementation.create()
    for remove in (
        lambda: m.pop("v"),
        lambda: m.__delitem__("v"),
        lambda: m.__setitem__("v", 1),
        m.empty,
        m.popitem,
        lambda: m.scatter("v", lambda _: None),
    ):
        m.empty()
        value = Value()
        gone = weakref.ref(value)
        m["v"] = value
        assert m["v"] is value
        del value
        remove()
        gc.collect()
        assert gone() is None
    k42.destroy(m)


@every
def test_references_are_balanced(implementation):
    key, value = ("key", 10**30), ["value"]
    before = sys.getrefcount(key), sys.getrefcount(value)
    m = implementation.create()
    for _ in range(20):
        m[key] = value
        m[key], m.get(key), m.setdefault(key), m.find_or_allocate(key, int)
        m.gather(key)
        m.scatter(key, lambda v: v)
        list(m.items()), list(m.values()), list(m)
        m.pop(key)
        m.find_or_allocate(key, lambda: value)
        m.popitem()
    m[key] = value
    m[key]
    iterator = iter(m.items())
    next(iterator)
    del iterator
    k42.destroy(m)
    del m
    gc.collect()
    assert (sys.getrefcount(key), sys.getrefcount(value)) == before


@every
@pytest.mark.skipif(FREE_THREADED, reason="references that nobody counts are not collected: destroy() frees the map")
def test_a_map_in_a_cycle_is_collected(implementation):
    m = implementation.create()
    m["self"] = m
    m["self"]
    m[Key(1)] = [m]
    gone = weakref.ref(m)
    del m
    gc.collect()
    assert gone() is None


# Copies


@pytest.mark.parametrize(
    "value",
    [
        10**6,
        -(10**40),
        2.5,
        1 + 2j,
        "not interned, " * 3,
        "ä€\U0001f600" * 3,
        b"bytes " * 3,
        (1000, "a b", (2.5, None)),
        frozenset({1000, "x y", (3, 4.5)}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_copies_of_immutable_values(value):
    value = pickle.loads(pickle.dumps(value))  # constants of the program are nobody's to count, so they are not copied
    m = ReplicatedMap.create()
    m["k"] = value
    for _ in range(3):
        assert m["k"] == value
        assert type(m["k"]) is type(value)
    master, replicas = m.gather("k")
    assert master is value
    assert list(replicas) == [k42.processors.current()]
    (replica,) = replicas.values()
    assert replica == value
    assert (replica is value) != FREE_THREADED
    m.scatter("k", lambda v: v)
    assert m["k"] == value
    k42.destroy(m)


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [[1], Text("text"), "x" * 5000, ("a", [1]), (1, (2, (3, (4, (5, (6,)))))), frozenset({Key(1)}), object(), None],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_copied(value):
    m = ReplicatedMap.create()
    m["k"] = value
    assert m["k"] is value
    assert m["k"] is value
    assert m.scatter("k", lambda _: value) is value
    assert m["k"] is value
    master, replicas = m.gather("k")
    assert master is value
    assert next(iter(replicas.values())) is value
    k42.destroy(m)


def test_no_copies_where_none_are_wanted():
    m = ReplicatedMap.create(copy_immutable=False)
    value = ("not", "copied", 10**30)
    m["k"] = value
    assert m["k"] is m["k"] is value
    k42.destroy(m)


# State, and what is native


@every
@pytest.mark.parametrize("other", IMPLEMENTATIONS, ids=lambda cls: f"to {cls.__name__}")
def test_state_goes_from_one_to_another(implementation, other):
    state = {"a": 1, (2, 3): [4], Key(5): None}
    source, target = (cls.Root.__new__(cls.Root) for cls in (implementation, other))
    source.__init__()
    target.__init__()
    source.import_state("items", state)
    exported = source.export_state("items")
    assert exported == state
    target.import_state("items", exported)
    assert target.export_state("items") == source.export_state("items") == state
    assert implementation.transfers == other.transfers == ("items",)


def test_tables_take_powers_of_two():
    for partitions in (0, 3, 2**40):
        with pytest.raises(ValueError, match="power of two"):
            _native.MapTable(partitions, True)
    with pytest.raises(TypeError):
        _native.MapTable("1", True)


def test_a_table_lives_as_long_as_its_representatives():
    table = _native.MapTable(4, True)
    reps = [table.join(), table.whole(), table.join()]
    items = table.items()
    del table
    reps[0]["a"] = 10**30
    assert [rep["a"] for rep in reps] == [10**30] * 3
    assert list(items) == [("a", 10**30)]
    while reps:
        reps.pop()["b"] = 1
    gc.collect()


def test_a_representative_of_another_processor_goes_to_the_master():
    m = ReplicatedMap.create()
    m["a"] = 1
    mine = k42.local(m)
    assert mine["a"] == 1
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(mine.__getitem__, "a").result() == 1
    assert list(m.gather("a")[1]) == [k42.processors.current()]
    k42.destroy(m)


def test_an_implementation_in_python():
    class Plain(Map):
        class Root(k42.SharedRoot):
            def __init__(self, copy_immutable):
                self.values = {}

        def __getitem__(self, key):
            return self.root.values[key]

        def __setitem__(self, key, value):
            self.root.values[key] = value

        def __len__(self):
            return len(self.root.values)

    plain = Plain.create()
    plain["a"] = 3
    assert plain["a"] == 3
    assert len(plain) == 1
    with pytest.raises(NotImplementedError, match=r"gather\(\)"):
        plain.gather("a")
    k42.destroy(plain)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_map_has_no_order_to_reverse(implementation):
    it = implementation.create()
    with pytest.raises(TypeError):
        reversed(it)
    k42.destroy(it)
