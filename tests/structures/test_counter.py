"""Counters: against the model one step at a time, and with real threads for what must hold among them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import k42
from k42 import _native
from k42.sim.models import counter as models
from k42.structures import AtomicCounter, Counter, DistributedCounter, PackedCounter, SharedCounter
from k42.structures.counter import IMPLEMENTATIONS

MODELS = {
    SharedCounter: models.SharedCounter,
    AtomicCounter: models.AtomicCounter,
    PackedCounter: models.PackedCounter,
    DistributedCounter: models.DistributedCounter,
}

every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda cls: cls.__name__)


def in_threads(n, work):
    """Runs work(i) in n threads that start together, on n processors: none ends before all have worked."""
    gate = threading.Barrier(n)
    failures = []

    def body(i):
        gate.wait()
        try:
            work(i)
        except BaseException as failure:
            failures.append(failure)
        gate.wait()

    threads = [threading.Thread(target=body, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


# Against the model


def outcome(call, *args):
    """What a call returns, or the type of what it raises."""
    try:
        return call(*args)
    except (TypeError, OverflowError) as error:
        return type(error)


edges = st.sampled_from([0, 2**31, 2**53, 2**62, 2**63, 2**64, 2**100]).flatmap(
    lambda n: st.sampled_from([n - 1, n, n + 1, 1 - n, -n, -n - 1])
)
numbers = st.one_of(st.integers(-5, 5), edges, st.integers())
arguments = st.one_of(numbers, st.booleans(), st.floats(), st.none(), st.just("1"))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 2), arguments),
        st.tuples(st.sampled_from(["add 1", "value", "approximate", "new thread"]), st.integers(0, 2), st.none()),
    ),
    max_size=30,
)


@every
@settings(deadline=None)
@given(start=arguments, steps=steps)
def test_as_the_model_says(implementation, start, steps):
    expected = outcome(MODELS[implementation], start)
    if isinstance(expected, type):
        with pytest.raises(expected):
            implementation.create(start)
        return
    counter, model = implementation.create(start), expected
    threads = [ThreadPoolExecutor(1) for _ in range(3)]
    try:
        for step, i, k in steps:
            # A processor goes from thread to thread; only it knows which one it has.
            processor = threads[i].submit(k42.processors.current).result()
            if step == "new thread":
                threads[i].shutdown()
                threads[i] = ThreadPoolExecutor(1)
            elif step in ("value", "approximate"):
                assert threads[i].submit(outcome, getattr(counter, step)).result() == outcome(model.value)
            else:
                args = (k,) if step == "add" else ()
                assert threads[i].submit(outcome, counter.add, *args).result() == outcome(model.add, processor, *args)
        assert outcome(counter.value) == outcome(model.value)
    finally:
        for thread in threads:
            thread.shutdown()
        k42.destroy(counter)


# With threads


@every
def test_no_add_is_lost(implementation):
    n, k = 8, 5000
    counter = implementation.create()

    def work(_):
        for _ in range(k):
            counter.add()

    in_threads(n, work)
    assert counter.value() == counter.approximate() == n * k
    k42.destroy(counter)


@every
def test_adds_of_any_size_and_sign(implementation):
    n, k = 6, 500
    counter = implementation.create(start=-1000)
    in_threads(n, lambda i: [counter.add((-1) ** j * (i * k + j)) for j in range(k)])
    assert counter.value() == -1000 + sum((-1) ** j * (i * k + j) for i in range(n) for j in range(k))
    k42.destroy(counter)


@every
def test_threads_come_and_go(implementation):
    width, waves, k = 4, 60, 50
    counter = implementation.create()
    for wave in range(1, waves + 1):
        threads = [threading.Thread(target=lambda: [counter.add() for _ in range(k)]) for _ in range(width)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counter.value() == wave * width * k
    k42.destroy(counter)


@every
def test_what_happened_before_is_counted(implementation):
    """Adders pass a token on; whoever has it knows of all adds that were made with it."""
    n, rounds = 4, 200
    counter = implementation.create()
    tokens = [threading.Semaphore(int(i == 0)) for i in range(n)]

    def work(i):
        for j in range(rounds):
            tokens[i].acquire()
            counter.add()
            assert counter.value() == j * n + i + 1
            tokens[(i + 1) % n].release()

    in_threads(n, work)
    k42.destroy(counter)


@every
def test_values_never_go_back(implementation):
    n, k = 3, 4000
    counter = implementation.create()
    started, done = [0] * n, [0] * n  # each entry has one writer

    def work(i):
        if i == n:
            last = 0
            while last < n * k:
                least = sum(done)
                value = counter.value()
                assert max(least, last) <= value <= sum(started)
                last = value
            return
        for j in range(k):
            started[i] = j + 1
            counter.add()
            done[i] = j + 1

    in_threads(n + 1, work)
    k42.destroy(counter)


@every
def test_approximate_has_ones_own_adds_and_all_in_the_end(implementation):
    n, k = 4, 1000
    counter = implementation.create()

    def work(_):
        for j in range(k):
            counter.add()
            assert j < counter.approximate() <= n * k

    in_threads(n, work)
    assert counter.approximate() == n * k
    k42.destroy(counter)


@every
def test_destroyed_while_threads_add(implementation):
    counter = implementation.create()
    added = threading.Barrier(4)

    def add_for_ever():
        while True:
            counter.add()

    def work(i):
        counter.add()
        added.wait()
        if i == 0:
            k42.destroy(counter)
        with pytest.raises(k42.Destroyed):
            add_for_ever()

    in_threads(4, work)
    for call in (counter.add, counter.value, counter.approximate):
        with pytest.raises(k42.Destroyed, match=implementation.__name__):
            call()


# The interface


def test_the_default_is_distributed():
    counter = Counter.create(5)
    assert isinstance(counter, DistributedCounter)
    assert isinstance(counter, Counter)
    assert counter.value() == 5
    k42.destroy(counter)


@every
def test_the_type_that_was_asked_for(implementation):
    counter = implementation.create(start=7)
    assert isinstance(counter, implementation)
    counter.add(k=3)
    assert k42.local(counter).value() == counter.value() == 10
    k42.destroy(counter)


@every
@pytest.mark.parametrize("k", [True, False, 1.0, "1", None, 2**63, -(2**63) - 1])
def test_what_is_no_number(implementation, k):
    error = OverflowError if type(k) is int else TypeError
    counter = implementation.create()
    with pytest.raises(error, match=r"^k must") as raised:
        counter.add(k)
    assert type(k) is int or type(k).__name__ in str(raised.value)
    assert counter.value() == 0
    k42.destroy(counter)
    with pytest.raises(error, match=r"^start must"):
        implementation.create(k)


@every
def test_wrong_arguments(implementation):
    counter = implementation.create()
    for call in (lambda: counter.add(1, 2), lambda: counter.add(1, k=2), lambda: counter.add(j=1)):
        with pytest.raises(TypeError, match=r"^add\(\) takes"):
            call()
    for method in (counter.value, counter.approximate):
        with pytest.raises(TypeError, match="takes no arguments"):
            method(1)
    with pytest.raises(TypeError):
        implementation.create(1, 2)
    assert counter.value() == 0
    k42.destroy(counter)


@every
@pytest.mark.parametrize("sign", [1, -1])
def test_a_full_count_refuses_and_stays(implementation, sign):
    counter = implementation.create()
    full = 2**63 - 1 if sign > 0 else -(2**63)
    counter.add(full)
    with pytest.raises(OverflowError, match="nothing was added"):
        counter.add(sign)
    assert counter.value() == full
    counter.add(-sign)
    assert counter.value() == full - sign
    k42.destroy(counter)


@pytest.mark.parametrize("implementation", [PackedCounter, DistributedCounter])
def test_a_sum_without_room_is_found_by_value(implementation):
    counter = implementation.create(start=2**63 - 1)
    counter.add()
    for method in (counter.value, counter.approximate):
        with pytest.raises(OverflowError):
            method()
    counter.add(-1)
    assert counter.value() == 2**63 - 1
    k42.destroy(counter)


# What is native


def test_a_call_needs_a_reference_of_its_type():
    one, other = SharedCounter.create(), DistributedCounter.create()
    with pytest.raises(TypeError):
        _native.CounterRep.add(other)
    for not_one in (other, k42.local(one), object()):
        with pytest.raises(TypeError):
            type(one).add(not_one)
    for ref in (one, other):
        k42.destroy(ref)


def test_native_methods_are_of_native_representatives():
    counter = DistributedCounter.create()
    for kind, method in ((type(counter), str.upper), (str, _native.CounterRep.add)):
        with pytest.raises(TypeError, match="an interface of native representatives"):
            _native.native_method(kind, method)
    k42.destroy(counter)


def test_representatives_of_another_kind_are_called_by_name():
    class Slow:
        def add(self, k=1):
            return self

        def value(self):
            return "slow"

    class Odd(Counter):
        add = _native.CounterRep.add
        value = _native.CounterRep.value

        class Root(k42.SharedRoot):
            def __init__(self, start):
                pass

            def create_rep(self):
                return Slow()

    odd = Odd.create()
    assert odd.add(k=2) is odd
    assert odd.value() == "slow"
    with pytest.raises(TypeError):
        odd.add(1, 2, 3)
    k42.destroy(odd)


def test_an_implementation_in_python():
    class Plain(Counter):
        class Root(k42.SharedRoot):
            def __init__(self, start):
                self.start = start

        def __init__(self):
            self.n = self.root.start

        def add(self, k=1):
            self.n += k

        def value(self):
            return self.n

    plain = Plain.create(3)
    plain.add(4)
    assert plain.value() == 7
    with pytest.raises(NotImplementedError, match=r"approximate\(\)"):
        plain.approximate()
    k42.destroy(plain)


def test_parts_keep_their_count_alive():
    count = _native.PaddedCount(3)
    parts = [count.join() for _ in range(100)]
    del count
    for part in parts:
        part.add(2)
    assert parts.pop().value() == 203
