"""Pools: against the model one step at a time, and with real threads for what must hold among them."""

from __future__ import annotations

import gc
import queue
import signal
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import k42
from k42.sim.models import pool as models
from k42.structures import DistributedPool, Pool
from k42.structures.pool import IMPLEMENTATIONS

every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda cls: cls.__name__)


class Thing:
    """An item."""


def things(n):
    return [Thing() for _ in range(n)]


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


def conserved(pool):
    stat = pool.stat()
    assert stat.size == stat.taken + stat.local + stat.shared
    return stat


def waiting(pool, n, blocked):
    """Wait until n threads wait for an item: nothing tells, so give them time to get there."""
    deadline = time.monotonic() + 20
    while len(blocked) < n and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(blocked) == n
    time.sleep(0.05)


# Against the model


class Machine(RuleBasedStateMachine):
    """Three threads take turns; a processor goes from thread to thread, and only it knows which one it has."""

    CAP = 3

    @initialize(
        implementation=st.sampled_from(IMPLEMENTATIONS),
        count=st.integers(0, 8),
        capacity=st.one_of(st.none(), st.integers(8, 16)),
        makes=st.booleans(),
    )
    def create(self, implementation, count, capacity, makes):
        items = things(count) if makes else things(count + 1)
        factory = self.factory if makes else None
        capacity = capacity and capacity + 1
        self.made = None
        arguments = {"factory": factory, "items": items, "capacity": capacity}
        if implementation is DistributedPool:
            arguments["cap"] = self.CAP
        self.pool = implementation.create(**arguments)
        self.model = getattr(models, implementation.__name__)(**arguments)
        self.threads = [ThreadPoolExecutor(1) for _ in range(3)]
        self.taken = []

    def factory(self):
        """The model asks first; what it got the pool gets."""
        if self.made is None:
            self.made = Thing()
            return self.made
        made, self.made = self.made, None
        return made

    def both(self, i, call, *args):
        """What the pool and the model return or raise."""

        def outcome(method, *args):
            try:
                return method(*args)
            except models.Exhausted:
                return k42.PoolExhausted
            except (ValueError, k42.PoolExhausted) as error:
                return type(error)

        processor = self.threads[i].submit(k42.processors.current).result()
        expected = outcome(getattr(self.model, call), processor, *args)
        assert self.threads[i].submit(outcome, getattr(self.pool, call), *args).result() is expected
        return expected

    @rule(i=st.integers(0, 2), n=st.integers(1, 5))
    def take(self, i, n):
        for _ in range(n):
            item = self.both(i, "take")
            if isinstance(item, Thing):
                self.taken.append(item)

    @precondition(lambda self: self.taken)
    @rule(i=st.integers(0, 2), data=st.data(), n=st.integers(1, 5))
    def give_back(self, i, data, n):
        for _ in range(min(n, len(self.taken))):
            item = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
            assert self.both(i, "give_back", item) is None

    @rule(i=st.integers(0, 2), data=st.data())
    def give_back_what_is_free(self, i, data):
        if free := self.model.free_items():
            assert self.both(i, "give_back", data.draw(st.sampled_from(free))) is ValueError

    @rule(i=st.integers(0, 2))
    def give_back_what_is_foreign(self, i):
        assert self.both(i, "give_back", Thing()) is ValueError

    @rule(i=st.integers(0, 2))
    def new_thread(self, i):
        self.threads[i].shutdown()
        self.threads[i] = ThreadPoolExecutor(1)

    @invariant()
    def same_counts(self):
        assert self.pool.stat() == self.model.stat()
        assert self.pool.size() == len(self.model.items)
        assert self.pool.free() == len(self.model.free_items())

    def teardown(self):
        if hasattr(self, "pool"):
            for thread in self.threads:
                thread.shutdown()
            k42.destroy(self.pool)


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestAsTheModelSays = Machine.TestCase


# With threads


@every
def test_nobody_has_what_another_has(implementation):
    n, rounds, held = 4, 1500, 3
    pool = implementation.create(list, capacity=n * held)

    def work(i):
        mine = []
        for j in range(rounds):
            if len(mine) < held and (not mine or j * 7919 % 5 < 3):
                item = pool.take()
                assert not item
                item.append(i)
                mine.append(item)
            else:
                assert mine[-1].pop() == i
                pool.give_back(mine.pop())
        for item in mine:
            item.clear()
            pool.give_back(item)

    def watch(i):
        if i < n:
            return work(i)
        for _ in range(200):
            assert conserved(pool).size <= n * held
        return None

    in_threads(n + 1, watch)
    assert conserved(pool).taken == 0
    k42.destroy(pool)


@every
def test_no_item_is_stranded(implementation):
    """What lies free in the lists of some processors others can take, to the last item."""
    n, each = 3, 5
    pool = implementation.create(items=things(n * each))
    filled = threading.Barrier(n + 1)

    def work(i):
        if i < n:
            mine = [pool.take() for _ in range(each)]
            filled.wait()
            for item in mine:
                pool.give_back(item)
            filled.wait()
        else:
            filled.wait()
            filled.wait()
            assert len({pool.take() for _ in range(n * each)}) == n * each
            with pytest.raises(k42.PoolExhausted):
                pool.take()

    in_threads(n + 1, work)
    assert conserved(pool).taken == n * each
    k42.destroy(pool)


@every
def test_items_of_threads_that_have_ended(implementation):
    pool = implementation.create(Thing, capacity=4)
    seen = set()
    for _ in range(50):
        in_threads(4, lambda _: seen.add(pool.take()))
        assert conserved(pool).taken == 4
        for item in seen:
            pool.give_back(item)
        assert len(seen) == 4
    k42.destroy(pool)


@every
def test_never_more_than_the_capacity(implementation):
    made = []

    def factory():
        made.append(None)
        return Thing()

    n, capacity = 6, 2
    pool = implementation.create(factory, capacity=capacity)
    refused = []

    def work(_):
        for _ in range(300):
            try:
                item = pool.take()
            except k42.PoolExhausted:
                refused.append(None)
            else:
                pool.give_back(item)

    in_threads(n, work)
    assert len(made) == pool.size() <= capacity
    assert conserved(pool).taken == 0
    k42.destroy(pool)


@every
def test_of_all_who_give_back_one_succeeds(implementation):
    n = 4
    pool = implementation.create(items=[Thing()])
    for _ in range(200):
        item = pool.take()
        refused = []

        def give_back(_, item=item, refused=refused):
            try:
                pool.give_back(item)
            except ValueError:
                refused.append(None)

        in_threads(n, give_back)
        assert len(refused) == n - 1
        assert pool.stat()[:2] == (1, 0)
    k42.destroy(pool)


# Waiting


@every
def test_who_waits_gets_one(implementation):
    n, rounds = 6, 100
    pool = implementation.create(Thing, capacity=2)
    inside = threading.Semaphore(2)

    def work(_):
        for _ in range(rounds):
            with pool.item(timeout=None):
                assert inside.acquire(blocking=False)
                inside.release()

    in_threads(n, work)
    assert conserved(pool).taken == 0
    k42.destroy(pool)


@every
def test_a_timeout(implementation):
    pool = implementation.create(items=["only"])
    item = pool.take()
    for timeout in (0, 0.0, 0.01):
        with pytest.raises(k42.PoolExhausted, match="1 items"):
            pool.take(timeout=timeout)
    assert conserved(pool).taken == 1
    pool.give_back(item)
    assert pool.take(0.01) is item
    k42.destroy(pool)


@every
def test_who_has_waited_longest_comes_first(implementation):
    pool = implementation.create(items=["only"])
    item = pool.take()
    order, blocked = queue.SimpleQueue(), []

    def wait(i):
        blocked.append(i)
        with pool.item(timeout=30):
            order.put(i)

    threads = []
    for i in range(3):
        threads.append(threading.Thread(target=wait, args=(i,)))
        threads[-1].start()
        waiting(pool, i + 1, blocked)
    with pytest.raises(k42.PoolExhausted):
        pool.take()
    pool.give_back(item)
    for thread in threads:
        thread.join()
    assert [order.get() for _ in threads] == [0, 1, 2]
    assert conserved(pool).taken == 0
    k42.destroy(pool)


@every
def test_destroyed_while_somebody_waits(implementation):
    pool = implementation.create(items=["only"])
    pool.take()
    blocked, ended = [], []

    def wait():
        blocked.append(None)
        try:
            pool.take(timeout=None)
        except k42.Destroyed as error:
            ended.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    waiting(pool, 1, blocked)
    assert k42.destroy(pool)  # at once: whoever waits is in no request
    thread.join()
    assert len(ended) == 1


class Interrupted(Exception):
    pass


@every
def test_a_signal_ends_a_wait(implementation):
    pool = implementation.create(items=["only"])
    item = pool.take()

    def interrupt(_number, _frame):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interrupted):
            pool.take(timeout=None)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert conserved(pool).taken == 1
    pool.give_back(item)
    assert pool.take() is item
    k42.destroy(pool)


@every
def test_a_signal_that_comes_with_the_item(implementation):
    """Whoever is interrupted has no item: what was handed over to it is free again."""
    pool = implementation.create(items=["only"])
    item = pool.take()

    def interrupt(_number, _frame):
        pool.give_back(item)  # to who waits, which is interrupted
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interrupted):
            pool.take(timeout=None)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert pool.stat()[:2] == (1, 0)
    assert pool.take() is item
    k42.destroy(pool)


# Factories


@every
def test_a_factory_that_raises_changes_nothing(implementation):
    fail = True

    def factory():
        if fail:
            raise OSError("no luck")
        return Thing()

    pool = implementation.create(factory, capacity=1)
    for _ in range(3):
        with pytest.raises(OSError, match="no luck"):
            pool.take()
        assert pool.stat() == (0, 0, 0, 0)
    fail = False
    assert isinstance(pool.take(), Thing)
    assert pool.stat() == (1, 1, 0, 0)
    k42.destroy(pool)


@every
def test_who_waits_tries_when_a_factory_has_failed(implementation):
    making, go_on = threading.Event(), threading.Event()
    blocked, got = [], []

    def factory():
        if making.is_set():
            return Thing()
        making.set()
        go_on.wait()
        raise OSError("no luck")

    pool = implementation.create(factory, capacity=1)

    def first():
        with pytest.raises(OSError, match="no luck"):
            pool.take()

    def second():
        blocked.append(None)
        got.append(pool.take(timeout=30))

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    making.wait()
    assert pool.stat() == (0, 0, 0, 0)
    threads[1].start()
    waiting(pool, 1, blocked)
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(got) == pool.size() == 1
    k42.destroy(pool)


@every
def test_a_factory_may_use_its_pool(implementation):
    def factory():
        calls.append(None)
        if len(calls) < 3:
            pool.take()
        return Thing()

    calls = []
    pool = implementation.create(factory, capacity=8)
    pool.take()
    assert pool.stat()[:2] == (3, 3)
    k42.destroy(pool)


@every
def test_a_factory_that_makes_nothing_new(implementation):
    pool = implementation.create(lambda: "one", capacity=2)
    pool.take()
    with pytest.raises(ValueError, match="'one', which the pool has already"):
        pool.take()
    assert pool.stat()[:2] == (1, 1)
    k42.destroy(pool)


# Items


@every
def test_what_is_no_item_or_is_free(implementation):
    pool, other = implementation.create(items=[[1], [2]]), implementation.create(items=[[1]])
    item = pool.take()
    with pytest.raises(ValueError, match=r"\[1\] is no item of this pool"):
        pool.give_back([1])  # equal, but another
    with pytest.raises(ValueError, match="no item of this pool"):
        pool.give_back(other.take())
    pool.give_back(item)
    with pytest.raises(ValueError, match="is free already"):
        pool.give_back(item)
    assert pool.stat()[:2] == (2, 0)
    for ref in (pool, other):
        k42.destroy(ref)


@every
def test_an_item_for_a_with(implementation):
    pool = implementation.create(Thing)
    with pool.item() as one, pool.item(timeout=1) as other:
        assert one is not other
        assert pool.free() == 0
    assert pool.stat()[:2] == (2, 0)
    with pytest.raises(KeyError), pool.item():
        raise KeyError
    assert pool.free() == 2
    lease = pool.item()
    for _ in range(2):
        with lease as one:
            assert isinstance(one, Thing)
            with pytest.raises(RuntimeError, match="taken already"):
                lease.__enter__()
            assert pool.free() == 1
    with pytest.raises(RuntimeError, match="not been taken"):
        lease.__exit__(None, None, None)
    k42.destroy(pool)
    with pytest.raises(k42.Destroyed), lease:
        pass


@every
def test_the_pool_keeps_its_items_and_destroy_lets_them_go(implementation):
    pool = implementation.create(Thing, items=things(3))
    alive = [weakref.ref(pool.take()) for _ in range(5)]
    gc.collect()
    assert all(each() is not None for each in alive)
    mine = alive[0]()
    k42.destroy(pool)
    gc.collect()
    assert [each() for each in alive] == [mine] + [None] * 4
    with pytest.raises(k42.Destroyed):
        pool.give_back(mine)


@every
def test_a_pool_whose_items_and_factory_lead_back_to_it_is_collected(implementation):
    def abandoned():
        def make():
            item = Thing()
            item.pool = pool
            return item

        pool = implementation.create(make)
        for _ in range(3):
            pool.take()
        return weakref.ref(pool.take())

    item = abandoned()
    gc.collect()
    # Without a GIL, 3.13 has references that never die: their number of references is not known.
    if getattr(sys, "_is_gil_enabled", lambda: True)() or sys.version_info >= (3, 14):
        assert item() is None


# The interface


def test_the_default_is_distributed():
    pool = Pool.create(Thing)
    assert isinstance(pool, DistributedPool)
    assert isinstance(pool, Pool)
    assert isinstance(pool.take(), Thing)
    k42.destroy(pool)


def test_the_cap_of_a_distributed_pool():
    pool = DistributedPool.create(items=things(10), cap=4)
    mine = [pool.take() for _ in range(10)]
    for item in mine:
        pool.give_back(item)
        assert pool.stat().local <= 4
    assert pool.stat() == (10, 0, 4, 6)
    k42.destroy(pool)
    for cap in (0, -1, 2**16 + 1):
        with pytest.raises(ValueError, match="cap must be 1 to 65536"):
            DistributedPool.create(Thing, cap=cap)
    for cap in (True, 1.0, None):
        with pytest.raises(TypeError, match="cap must be an int"):
            DistributedPool.create(Thing, cap=cap)


@every
def test_wrong_arguments(implementation):
    for arguments, error, message in (
        ({}, ValueError, "needs a factory, or items"),
        ({"factory": 3}, TypeError, "factory must be callable"),
        ({"factory": Thing, "capacity": 0}, ValueError, "capacity must be"),
        ({"factory": Thing, "capacity": -1}, ValueError, "capacity must be"),
        ({"factory": Thing, "capacity": "2"}, TypeError, "capacity must be an int"),
        ({"items": [1, 2], "capacity": 1}, ValueError, "2 items are more than the capacity, 1"),
        ({"items": ["a", "a"]}, ValueError, "'a' is twice"),
        ({"items": 3}, TypeError, "iterable"),
    ):
        with pytest.raises(error, match=message):
            implementation.create(**arguments)
    pool = implementation.create(items=["only"])
    for timeout, error in ((-1, ValueError), (float("nan"), ValueError), ("1", TypeError), (True, TypeError)):
        with pytest.raises(error, match="timeout must"):
            pool.take(timeout)
    for call in (lambda: pool.take(1, 2), lambda: pool.take(j=1), lambda: pool.give_back(), lambda: pool.stat(1)):
        with pytest.raises(TypeError, match=r"\(\) (takes|needs)"):
            call()
    assert pool.stat() == (1, 0, 0, 1)
    k42.destroy(pool)
    for call in (pool.take, pool.free, pool.size, pool.stat):
        with pytest.raises(k42.Destroyed):
            call()


def test_a_representative_belongs_to_its_processor():
    pool = DistributedPool.create(items=["only"])
    rep = k42.local(pool)
    assert rep.take() == "only"
    with pytest.raises(k42.PoolExhausted):
        rep.take(timeout=0.01)
    rep.give_back("only")

    def elsewhere(i):
        if i:
            for call in (rep.take, lambda: rep.give_back("only")):
                with pytest.raises(RuntimeError, match="another processor"):
                    call()

    in_threads(2, lambda i: elsewhere(1))
    assert pool.free() == 1
    k42.destroy(pool)


def test_an_implementation_in_python():
    class Plain(Pool):
        class Root(k42.SharedRoot):
            def __init__(self, factory, items, capacity):
                self.items = list(items)

        def take(self, timeout=0):
            return self.root.items.pop()

        def give_back(self, item):
            self.root.items.append(item)

    plain = Plain.create(items=["one", "two"])
    with plain.item() as item:
        assert item == "two"
        assert plain.take() == "one"
    assert plain.take() == "two"
    k42.destroy(plain)


# Transfer


@pytest.mark.parametrize("target", IMPLEMENTATIONS, ids=lambda cls: cls.__name__)
@every
def test_state_goes_from_one_implementation_to_another(implementation, target):
    old = implementation.create(Thing, items=things(5), capacity=9)
    taken = [old.take() for _ in range(3)]
    old.give_back(taken.pop())
    (form,) = set(implementation.transfers) & set(target.transfers)
    root = _root(old)
    state = root.export_state(form)
    assert old.stat()[:2] == (5, 2)  # as before
    new = target.create(Thing)
    _root(new).import_state(form, state)
    assert new.stat()[:2] == (5, 2)
    for item in taken:
        new.give_back(item)
        with pytest.raises(ValueError, match="free already"):
            new.give_back(item)
    assert len({new.take() for _ in range(9)}) == 9
    with pytest.raises(k42.PoolExhausted):
        new.take()
    with pytest.raises(ValueError, match="has items already"):
        _root(new).import_state(form, state)
    for ref in (old, new):
        k42.destroy(ref)


@every
def test_an_export_lets_those_who_wait_ask_again(implementation):
    pool = implementation.create(items=["only"])
    item = pool.take()
    blocked, got = [], []

    def wait():
        blocked.append(None)
        got.append(pool.take(timeout=30))

    thread = threading.Thread(target=wait)
    thread.start()
    waiting(pool, 1, blocked)
    _root(pool).export_state("items")
    time.sleep(0.02)
    pool.give_back(item)
    thread.join()
    assert got == ["only"]
    k42.destroy(pool)


@every
def test_swaps_under_load(implementation):
    n, rounds = 4, 400
    other = next(each for each in IMPLEMENTATIONS if each is not implementation)
    pool = implementation.create(list, capacity=3)  # so one waits now and then

    def work(i):
        if i == n:
            for j in range(20):
                k42.swap(pool, (other, implementation)[j % 2])
                time.sleep(0.002)
            return
        for _ in range(rounds):
            with pool.item(timeout=None) as item:
                assert not item
                item.append(i)
                assert item.pop() == i

    in_threads(n + 1, work)
    assert isinstance(pool, implementation)
    assert conserved(pool).taken == 0
    assert pool.size() <= 3
    k42.destroy(pool)


@every
def test_who_waits_holds_up_no_swap(implementation):
    other = next(each for each in IMPLEMENTATIONS if each is not implementation)
    pool = implementation.create(items=["only"])
    item = pool.take()
    blocked, got = [], []

    def wait():
        blocked.append(None)
        got.append(pool.take(timeout=30))

    thread = threading.Thread(target=wait)
    thread.start()
    waiting(pool, 1, blocked)
    k42.swap(pool, other)
    pool.give_back(item)  # to the new one
    thread.join()
    assert got == ["only"]
    assert pool.stat()[:2] == (1, 1)
    k42.destroy(pool)


def _root(pool):
    """The root, which only the collector's view of the reference leads to from outside."""
    return next(each for each in gc.get_referents(pool) if isinstance(each, k42.Root))
