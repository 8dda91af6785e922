"""Interposition: arbiters get the calls, stacked, from everybody; and give them back."""

from __future__ import annotations

import gc
import threading
from collections import Counter as Tally

import pytest

import k42
from k42.structures import DistributedCounter, SharedCounter
from k42.structures.counter import IMPLEMENTATIONS
from k42.testing import PausePoint, frequent_switches, race, wait_until


class Node(k42.Object):
    """Recursive by its own reference; with special methods, a property, generators."""

    LIMIT = 9

    class Root(k42.DistributedRoot):
        def __init__(self):
            self.misses = 0

        def handle_miss(self):
            self.misses += 1
            return super().handle_miss()

    def __init__(self):
        self.items, self._label = {}, "none"

    def down(self, n):
        return 0 if n == 0 else 1 + self.root.ref.down(n - 1)

    def both(self, n):
        return self.root.ref.down(n) + self.root.ref.down(n)

    def misses(self):
        return self.root.misses

    def echo(self, *args, **kwargs):
        return args, kwargs

    def me(self):
        return self

    def fail(self):
        raise KeyError("inside")

    def each(self, n):
        yield from range(n)

    async def later(self, x):
        return x

    @property
    def label(self):
        return self._label

    @label.setter
    def label(self, value):
        self._label = value

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        return self.items[key]

    def __setitem__(self, key, value):
        self.items[key] = value

    def __contains__(self, key):
        return key in self.items

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def __call__(self, x):
        return x

    def __bool__(self):
        return True


@pytest.fixture
def node():
    ref = Node.create()
    yield ref
    try:
        k42.destroy(ref)
    except k42.Destroyed:
        pass


class Counting:
    """An arbiter that counts calls by name, and passes them on."""

    def __init__(self):
        self.lock, self.tally = threading.Lock(), Tally()

    def __call__(self, call):
        with self.lock:
            self.tally[call.name] += 1
        return call.proceed()


def test_7_two_arbiters_on_a_recursive_object(node):
    n, k = 4, 20
    node.down(1)
    first, second = Counting(), Counting()
    lower = k42.interpose(node, first)
    assert race(*[lambda: [node.both(3) for _ in range(k)]] * n) == [[6] * k] * n
    upper = k42.interpose(node, second)
    assert race(*[lambda: [node.down(5) for _ in range(k)]] * n) == [[5] * k] * n
    assert second.tally == {"down": 6 * n * k}
    assert first.tally == {"both": n * k, "down": 8 * n * k + 6 * n * k}
    lower.release()
    node.down(5)
    assert second.tally["down"] == 6 * n * k + 6
    assert first.tally["down"] == 14 * n * k
    assert type(k42.local(node)) is not Node
    upper.release()
    node.down(5)
    assert second.tally["down"] == 6 * n * k + 6
    assert type(k42.local(node)) is Node
    kinds = race(*[lambda: (node.down(1), type(k42.local(node)))[1]] * n)
    assert kinds == [Node] * n


def test_the_last_arbiter_gets_a_call_first(node):
    order = []

    def arbiter(name):
        def arbitrate(call):
            order.append(f"+{name}")
            result = call.proceed()
            order.append(f"-{name}")
            return result

        return arbitrate

    with k42.interpose(node, arbiter("a")), k42.interpose(node, arbiter("b")):
        node.echo()
    assert order == ["+b", "+a", "-a", "-b"]


def test_what_an_arbiter_is_given(node):
    calls = []
    with k42.interpose(node, lambda call: calls.append(call) or call.proceed()):
        assert node.echo(1, "x", k=2) == ((1, "x"), {"k": 2})
    (call,) = calls
    assert call.ref is node
    assert (call.name, call.args, call.kwargs) == ("echo", (1, "x"), {"k": 2})
    assert "call echo on <reference to" in repr(call)


def test_arguments_and_results_are_changed(node):
    def doubling(call):
        call.args = tuple(2 * a for a in call.args)
        call.kwargs = {k.upper(): v for k, v in call.kwargs.items()}
        return "changed", call.proceed()

    with k42.interpose(node, doubling):
        assert node.echo(1, 2, x=3) == ("changed", ((2, 4), {"X": 3}))
    with k42.interpose(node, lambda call: call.proceed()), k42.interpose(node, doubling):
        assert node.echo(1) == ("changed", ((2,), {}))
    assert node.echo(1) == ((1,), {})


def test_an_arbiter_that_proceeds_never_or_often_or_elsewhere(node):
    other = Node.create()
    with k42.interpose(node, lambda call: None):
        assert node.fail() is None
        assert node.each(3) is None  # not a generator: the caller gets what the arbiter says
        assert node.later(3) is None
    with k42.interpose(node, lambda call: [call.proceed() for _ in range(3)]):
        assert node.down(0) == [0, 0, 0]
    with k42.interpose(node, lambda call: getattr(other, call.name)(*call.args, **call.kwargs)):
        node["key"] = 1
    assert "key" in other
    assert "key" not in node
    k42.destroy(other)


def test_an_arbiter_that_raises(node):
    def refuse(call):
        raise PermissionError(call.name)

    with k42.interpose(node, refuse):
        for _ in range(3):
            with pytest.raises(PermissionError, match="down"):
                node.down(1)

    def translate(call):
        try:
            return call.proceed()
        except KeyError as error:
            raise ValueError("translated") from error

    with k42.interpose(node, translate), pytest.raises(ValueError, match="translated"):
        node.fail()
    with pytest.raises(KeyError):
        node.fail()
    assert k42.destroy(node)  # nothing is left inside


def test_return_self_is_the_reference(node):
    with k42.interpose(node, lambda call: call.proceed()):
        assert node.me() is node


def test_special_methods_go_to_the_arbiter(node):
    counting = Counting()
    with k42.interpose(node, counting):
        node["a"] = 1
        assert node["a"] == 1
        assert len(node) == 1
        assert "a" in node
        assert node(7) == 7
        assert bool(node)
        with node as entered:
            assert entered is node
    assert counting.tally == dict.fromkeys(
        ("__setitem__", "__getitem__", "__len__", "__contains__", "__call__", "__bool__", "__enter__", "__exit__"), 1
    )
    assert len(node) == 1


def test_attributes_do_not(node):
    counting = Counting()
    with k42.interpose(node, counting):
        node.label = "x"
        assert node.label == "x"
        assert node.LIMIT == 9
        with pytest.raises(AttributeError):
            node.nothing  # noqa: B018
    assert not counting.tally
    assert node.label == "x"


def test_generators_and_coroutines(node):
    counting = Counting()
    with k42.interpose(node, counting):
        each = node.each(2)
        coroutine = node.later(5)
    assert list(each) == [0, 1]
    with pytest.raises(StopIteration) as stopped:
        coroutine.send(None)
    assert stopped.value.value == 5
    assert counting.tally == {"each": 1, "later": 1}
    with k42.interpose(node, counting):
        each = node.each(2)
        with pytest.warns(RuntimeWarning, match="each"):
            assert k42.destroy(node) is False
        assert list(each) == [0, 1]


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_native_structures(kind):
    counter = kind.create()
    n, k = 3, 100
    counting, started = Counting(), threading.Barrier(n + 1)
    with k42.interpose(counter, counting):

        def work():
            started.wait()
            for _ in range(k):
                counter.add()

        race(*[work] * n, started.wait)
        assert counter.value() == n * k
        with pytest.raises(TypeError, match="k must be an int"):
            counter.add("x")
    assert counting.tally == {"add": n * k + 1, "value": 1}
    assert counter.value() == n * k
    assert type(k42.local(counter)).__module__ == "k42._native"
    k42.destroy(counter)


def test_calls_that_race_interposition_and_release_go_one_way_or_the_other():
    """After interpose() has returned no call goes past the arbiter, after release() none goes to it."""
    counter = DistributedCounter.create()
    n, rounds = 3, 100
    counting, turn, done = Counting(), threading.Barrier(n + 1), []

    def call():
        for _ in range(rounds):
            turn.wait()
            counter.add()  # races interpose()
            turn.wait()
            turn.wait()
            counter.add()  # after it
            turn.wait()
            turn.wait()
            counter.add()  # after release()
            turn.wait()

    def interpose():
        for _ in range(rounds):
            turn.wait()
            interposition = k42.interpose(counter, counting)
            turn.wait()
            before = counting.tally["add"]
            turn.wait()
            turn.wait()
            done.append(counting.tally["add"] - before)
            interposition.release()
            counting.tally.clear()
            turn.wait()
            turn.wait()
            assert not counting.tally

    with frequent_switches():
        race(*[call] * n, interpose)
    assert done == [n] * rounds
    assert counter.value() == 3 * n * rounds
    k42.destroy(counter)


def test_a_miss_that_interposition_overtakes():
    """The root has answered, the representative is not installed yet: an arbiter that comes between is not missed."""
    with PausePoint() as missing:

        class Slow(k42.Object):
            class Root(k42.SharedRoot):
                def handle_miss(self):
                    rep = super().handle_miss()
                    missing()
                    return rep

            def touch(self):
                return "touched"

        slow, results = Slow.create(), []
        counting, second = Counting(), threading.Event()

        def body():
            results.append(slow.touch())
            second.wait()
            results.append(slow.touch())

        thread = threading.Thread(target=body)
        thread.start()
        missing.reached()
        interposition = k42.interpose(slow, counting)
        missing.resume()
        wait_until(lambda: results)
        second.set()
        thread.join()
    assert results == ["touched"] * 2
    assert counting.tally == {"touch": 1}
    interposition.release()
    k42.destroy(slow)


def test_released_twice_and_by_several_threads(node):
    counting = Counting()
    interposition = k42.interpose(node, counting)
    interposition.release()
    interposition.release()
    node.down(1)
    assert not counting.tally
    for _ in range(20):
        interpositions = [k42.interpose(node, counting) for _ in range(4)]
        race(*[i.release for i in interpositions for _ in range(2)])
        assert type(k42.local(node)) is Node
    assert not counting.tally


def test_interposed_by_several_threads(node):
    n, rounds = 4, 25
    tallies = [Counting() for _ in range(n)]

    def work(i):
        for _ in range(rounds):
            with k42.interpose(node, tallies[i]):
                node.down(0)

    race(*[lambda i=i: work(i) for i in range(n)])
    assert all(tally.tally["down"] >= rounds for tally in tallies)
    assert type(k42.local(node)) is Node


def test_arbiters_that_come_and_go_leave_nothing(node):
    node.down(0)
    for _ in range(50):
        with k42.interpose(node, Counting()):
            node.down(0)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(200):
        with k42.interpose(node, Counting()):
            node.down(0)
    gc.collect()
    assert len(gc.get_objects()) - before < 100


def test_destroyed_while_an_arbiter_is_inside():
    with PausePoint() as inside:
        ref, results = Node.create(), []

        def arbiter(call):
            inside()
            return call.proceed()

        interposition = k42.interpose(ref, arbiter)
        thread = threading.Thread(target=lambda: results.append(ref.echo(1)))
        thread.start()
        inside.reached()
        assert k42.destroy(ref) is False
        with pytest.raises(k42.Destroyed):
            ref.echo(2)
        with pytest.raises(k42.Destroyed):
            k42.interpose(ref, arbiter)
        interposition.release()
        inside.resume()
        thread.join()
    assert results == [((1,), {})]


def test_an_arbiter_that_destroys_the_object():
    ref = SharedCounter.create()

    def arbiter(call):
        assert k42.destroy(ref) is False
        return call.proceed()

    k42.interpose(ref, arbiter)
    ref.add(2)
    with pytest.raises(k42.Destroyed):
        ref.add(2)


def test_hooks_of_representatives_that_only_arbiters_used():
    ended = []

    class Hooked(k42.Object):
        def touch(self):
            pass

        def on_release(self):
            ended.append(1)

    ref = Hooked.create()
    k42.interpose(ref, lambda call: call.proceed())
    ref.touch()
    k42.destroy(ref)
    assert ended == [1]


def test_looking_at_an_object_costs_no_miss(node):
    assert node.misses() == 1
    for _ in range(3):
        assert isinstance(node, Node)
        repr(node)
        with k42.interpose(node, lambda call: call.proceed()):
            pass
        assert node.misses() <= 4
    before = node.misses()
    for _ in range(5):
        assert isinstance(node, Node)
        repr(node)
    assert node.misses() == before


def test_refusals(node):
    for nothing in (None, 3, Node()):
        with pytest.raises(TypeError, match="needs a reference"):
            k42.interpose(nothing, print)
    with pytest.raises(TypeError, match="cannot be called"):
        k42.interpose(node, 3)
    assert type(k42.local(node)) is Node
