"""The checker: what it accepts and rejects, and that it agrees with trying every order."""

from __future__ import annotations

import random
import threading
from itertools import permutations
from unittest.mock import ANY

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k42.testing import Blocked, History, NotLinearizable, Operation, check, frequent_switches, race


class Counter:
    def __init__(self):
        self.n = 0

    def add(self, k=1):
        self.n += k

    def value(self):
        return self.n


class Register:
    def __init__(self):
        self.x = 0

    def write(self, x):
        self.x = x

    def read(self):
        return self.x

    def swap(self, x):
        self.x, old = x, self.x
        return old


class Gate:
    """At most one inside; entering waits."""

    def __init__(self):
        self.inside = 0

    def enter(self):
        if self.inside:
            raise Blocked
        self.inside = 1

    def leave(self):
        if not self.inside:
            raise RuntimeError("nobody is inside")
        self.inside = 0


def op(thread, invoked, returned, name, *args, result=None, error=None):
    return Operation(thread, name, args, {}, result, error, invoked, returned)


def accepted(operations, model, **options):
    try:
        check(operations, model, **options)
    except NotLinearizable:
        return False
    return True


# Known histories


@pytest.mark.parametrize(
    ("operations", "model"),
    [
        ([], Counter),
        # A read beside a write sees either value, and only later ones must agree.
        ([op(0, 0, 3, "write", 1), op(1, 1, 2, "read", result=0)], Register),
        ([op(0, 0, 3, "write", 1), op(1, 1, 2, "read", result=1)], Register),
        ([op(0, 0, 5, "write", 1), op(1, 1, 2, "read", result=0), op(1, 3, 4, "read", result=1)], Register),
        # Herlihy and Wing: what was invoked and has not returned may have taken effect or not.
        ([op(0, 0, None, "write", 1), op(1, 1, 2, "read", result=0), op(1, 3, 4, "read", result=1)], Register),
        ([op(0, 0, None, "write", 1), op(1, 1, 2, "read", result=0)], Register),
        # An order that none of the threads sees: 2 before 1.
        ([op(0, 0, 3, "swap", 1, result=2), op(1, 1, 2, "swap", 2, result=0), op(0, 4, 5, "read", result=1)], Register),
        # Entering waits for the other to leave.
        ([op(0, 0, 1, "enter"), op(1, 2, 5, "enter"), op(0, 3, 4, "leave")], Gate),
        ([op(0, 0, 1, "enter"), op(1, 2, None, "enter")], Gate),
        ([op(0, 0, 1, "leave", error=RuntimeError())], Gate),
        ([op(0, 0, 1, "leave", error=NotImplementedError())], Gate),  # a kind of RuntimeError
        # Equal tickets overlap.
        ([op(0, 0, 1, "write", 1), op(1, 1, 2, "read", result=0)], Register),
    ],
)
def test_linearizable(operations, model):
    check(operations, model)


@pytest.mark.parametrize(
    ("operations", "model", "culprit"),
    [
        # A lost update.
        ([op(0, 0, 2, "add"), op(1, 1, 3, "add"), op(0, 4, 5, "value", result=1)], Counter, 2),
        # A stale read.
        ([op(0, 0, 1, "write", 1), op(1, 2, 3, "read", result=0)], Register, 1),
        # A value that goes back, while the write still runs.
        ([op(0, 0, 5, "write", 1), op(1, 1, 2, "read", result=1), op(1, 3, 4, "read", result=0)], Register, 2),
        # Two readers who disagree about the order of two writes.
        (
            [
                op(0, 0, 9, "write", 1),
                op(1, 1, 9, "write", 2),
                op(2, 2, 3, "read", result=1),
                op(2, 4, 5, "read", result=2),
                op(3, 6, 7, "read", result=1),
            ],
            Register,
            4,
        ),
        # Both got the old value.
        ([op(0, 0, 2, "swap", 1, result=0), op(1, 1, 3, "swap", 2, result=0)], Register, 1),
        # Two inside, where one has room.
        ([op(0, 0, 1, "enter"), op(1, 2, 3, "enter")], Gate, 1),
        # An error where there should be none, none where there should be one, and another one.
        ([op(0, 0, 1, "add", error=OverflowError())], Counter, 0),
        ([op(0, 0, 1, "leave")], Gate, 0),
        ([op(0, 0, 1, "leave", error=Exception())], Gate, 0),
    ],
)
def test_not_linearizable(operations, model, culprit):
    with pytest.raises(NotLinearizable) as raised:
        check(operations, model)
    assert raised.value.culprit is operations[culprit]


def test_two_allocated_one_key():
    class Keys:
        def __init__(self):
            self.there = set()

        def find_or_allocate(self, key):
            try:
                return "found" if key in self.there else "allocated"
            finally:
                self.there.add(key)

    def both(second):
        return [
            op(0, 0, 4, "find_or_allocate", "a", result="allocated"),
            op(1, 1, 5, "find_or_allocate", "b", result="allocated"),
            op(2, 2, 3, "find_or_allocate", "a", result=second),
        ]

    for key in (None, lambda op: op.args[0]):
        assert accepted(both("found"), Keys, key=key)
        assert not accepted(both("allocated"), Keys, key=key)


def test_the_counter_example():
    operations = [op(i % 2, 2 * i, 2 * i + 1, "add") for i in range(100)]
    operations += [
        op(0, 200, 203, "add"),
        op(1, 201, 204, "add"),
        op(2, 202, 205, "value", result=99),
        op(0, 206, 207, "value", result=7),
    ]
    with pytest.raises(NotLinearizable) as raised:
        check(operations, Counter)
    failure = raised.value
    assert failure.culprit is operations[102]
    assert failure.operations == tuple(operations[:103])
    lines = str(failure).splitlines()
    assert lines[0] == "no order of these operations explains value() -> 99"
    assert lines[1] == "(after 87 operations before, which leave Counter: {'n': 87})"
    assert lines[2].split() == ["thread", "0", "thread", "1", "thread", "2"]
    assert lines[-7:-1] == [
        "┌ add()",
        "│           ┌ add()",
        "│           │           ┌ value()",
        "└ -> None   │           │",
        "            └ -> None   │",
        "                        └ -> 99",
    ]
    assert lines[-1] == "value() of thread 2 should have been: -> 100 or -> 101 or -> 102"


def test_a_short_counter_example_is_whole():
    with pytest.raises(NotLinearizable, match=r"^no order[^\n]*\nthread 0\n┌ value\(\)"):
        check([op(0, 0, 1, "value", result=1)], Counter)


def test_what_waits_in_vain():
    with pytest.raises(NotLinearizable, match=r"enter\(\) of thread 1 should have been: still waiting"):
        check([op(0, 0, 1, "enter"), op(1, 2, 3, "enter")], Gate)


# Models


def test_a_model_without_the_method():
    with pytest.raises(AttributeError, match="no attribute 'subtract'"):
        check([op(0, 0, 1, "subtract")], Counter)


def test_any_result():
    class Loose(Counter):
        def value(self):
            return ANY

    assert accepted([op(0, 0, 1, "value", result=17)], Loose)


def test_objects_that_were_given_are_the_same_in_the_model():
    one, other = object(), [1]
    history = [
        op(0, 0, 1, "__setitem__", "a", one),
        op(0, 2, 3, "__setitem__", "b", other),
        op(0, 4, 5, "get", "a", result=one),
        op(0, 6, 7, "get", "b", result=other),
    ]
    assert accepted(history, dict)
    assert not accepted([*history, op(0, 8, 9, "get", "a", result=object())], dict)


def test_states_are_told_apart_by_all_that_they_contain():
    """Whatever a specification is made of, a second order of the two pushes is not taken for the first one."""

    class Slots:
        __slots__ = ("pushed",)

        def __init__(self):
            self.pushed = []

        def push(self, x):
            self.pushed.append(x)

        def all(self):
            return list(self.pushed)

    class Named(list):
        def __init__(self):
            self.last = None

        def push(self, x):
            self.last = x

        def all(self):
            return [{1: 2, 2: 1}[self.last], self.last]

    class Part:
        def __init__(self):
            self.inner = Slots()

        def push(self, x):
            self.inner.push(x)

        def all(self):
            return self.inner.all()

    class Ordered(dict):
        def push(self, x):
            self[x] = True

        def all(self):
            return list(self)

    for model in (Slots, Named, Part, Ordered):
        for order in ([1, 2], [2, 1]):
            pushes = [op(0, 0, 2, "push", 1), op(1, 1, 3, "push", 2)]
            assert accepted([*pushes, op(0, 4, 5, "all", result=order)], model), model
        assert not accepted([*pushes, op(0, 4, 5, "all", result=[1, 1])], model), model


def test_a_state_that_cannot_be_hashed():
    class Bytes(bytearray):
        def push(self, x):
            self.append(x)

    class Unhashable:
        __slots__ = ()
        __hash__ = None

    class Holds:
        def __init__(self):
            self.x = Unhashable()

        def push(self, x):
            pass

    with pytest.raises(TypeError, match="unhashable"):
        check([op(0, 0, 1, "push", 1)], Holds)
    check([op(0, 0, 1, "push", 1)], Holds, state=id)


# Against every order


def by_brute_force(operations, model):
    """Whether some order of all operations, and of any of those that have not returned, explains them."""

    def explains(order):
        spec = model()
        for o in order:
            try:
                result, error = getattr(spec, o.name)(*o.args), None
            except Blocked:
                return False
            except Exception as raised:
                result, error = None, raised
            if o.returned is None:
                continue
            if result != o.result or (error is None) != (o.error is None):
                return False
        return True

    def in_time(order):
        return not any(
            later.returned is not None and later.returned < order[i].invoked
            for i in range(len(order))
            for later in order[i + 1 :]
        )

    pending = [o for o in operations if o.returned is None]
    returned = [o for o in operations if o.returned is not None]
    return any(
        in_time(order) and explains(order)
        for bits in range(1 << len(pending))
        for order in permutations(returned + [o for i, o in enumerate(pending) if bits >> i & 1])
    )


@st.composite
def small_histories(draw):
    """Up to six operations of three threads, with results that are right or nearly so."""
    kinds = draw(
        st.sampled_from(
            [
                [("write", True, False), ("read", False, True), ("swap", True, True)],
                [("enter", False, False), ("leave", False, False)],
            ]
        )
    )
    threads = draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
    # Each thread's tickets are in its own order; how those of different threads mix is drawn.
    left = {t: 2 * threads.count(t) for t in threads}
    ends: dict[int, list[int]] = {t: [] for t in threads}
    for ticket in range(2 * len(threads)):
        t = draw(st.sampled_from(sorted(t for t in left if left[t])))
        left[t] -= 1
        ends[t].append(ticket)
    operations = []
    for t, tickets in ends.items():
        for i in range(0, len(tickets), 2):
            name, takes, gives = draw(st.sampled_from(kinds))
            last = i + 2 == len(tickets)
            error = RuntimeError() if name == "leave" and draw(st.booleans()) else None
            operations.append(
                op(
                    t,
                    tickets[i],
                    None if last and draw(st.integers(0, 3)) == 0 else tickets[i + 1],
                    name,
                    *([draw(st.integers(1, 2))] if takes else []),
                    result=draw(st.integers(0, 2)) if gives else None,
                    error=error,
                )
            )
    return operations, Gate if kinds[0][0] == "enter" else Register


@settings(deadline=None, max_examples=300)
@given(small_histories())
def test_as_by_brute_force(drawn):
    operations, model = drawn
    assert accepted(operations, model) == by_brute_force(operations, model)


# Whatever one thread could have seen is accepted


def stretched(seed, n, threads, width, step):
    """A history of `n` operations that `step` makes one after the other, each stretched to both sides by up to `width`.

    The moments at which they take effect stay inside of their intervals, and those of one thread do not overlap.
    """
    random_ = random.Random(seed)
    made = [(random_.randrange(threads), *step(random_)) for _ in range(n)]
    free = dict.fromkeys(range(threads), -1.0)
    following: dict[int, float] = dict.fromkeys(range(threads), float(n))
    upper = [0.0] * n
    for i in reversed(range(n)):
        upper[i] = following[made[i][0]]
        following[made[i][0]] = i
    operations = []
    for i, (thread, name, args, result, error) in enumerate(made):
        invoked = random_.uniform(max(free[thread], i - width), i)
        returned = random_.uniform(i, min((i + upper[i]) / 2, i + width))
        free[thread] = returned
        operations.append(op(thread, invoked, returned, name, *args, result=result, error=error))
    return operations


def steps_of(model, choices):
    """Make calls on one specification, with what it answers."""
    spec = model()

    def step(random_):
        name, *args = random_.choice(choices)
        try:
            return name, args, getattr(spec, name)(*args), None
        except KeyError as error:
            return name, args, None, error

    return step


COUNTER = [("add", 1), ("add", -2), ("add", 5), ("value",)]
REGISTER = [("write", 1), ("write", 2), ("swap", 3), ("swap", 4), ("read",)]
MAP = [
    *(("__setitem__", key, value) for key in "abc" for value in (1, 2)),
    *((name, key) for key in "abc" for name in ("pop", "__getitem__", "__contains__")),
]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 40),
    threads=st.integers(1, 4),
    width=st.sampled_from([0.4, 2, 10]),
    kind=st.sampled_from([(Counter, COUNTER, {}), (Register, REGISTER, {}), (dict, MAP, {"key": lambda o: o.args[0]})]),
)
def test_stretched_sequential_histories_are_accepted(seed, n, threads, width, kind):
    model, choices, options = kind
    check(stretched(seed, n, threads, width, steps_of(model, choices)), model, **options)


@pytest.mark.parametrize("width", [2, 20])
def test_long_histories(width):
    """As long as recorded ones are: the search visits few configurations, or this would not end."""
    for seed, (model, choices) in enumerate([(Counter, COUNTER), (Register, REGISTER), (dict, MAP)]):
        operations = stretched(seed, 300, 4, width, steps_of(model, choices))
        check(operations, model)
        # One wrong result, near the end: all that can be searched is.
        late = max(
            (o for o in operations if o.name in ("value", "read", "__getitem__") and o.error is None),
            key=lambda o: o.invoked,
        )
        wrong = [
            op(o.thread, o.invoked, o.returned, o.name, *o.args, result="wrong") if o is late else o for o in operations
        ]
        assert not accepted(wrong, model)


# Recorded


def test_a_recorded_dict():
    history = History()
    d = history.record({})

    def work(seed):
        random_ = random.Random(seed)
        for _ in range(100):
            name, *args = random_.choice(MAP)
            try:
                getattr(d, name)(*args)
            except KeyError:
                pass

    with frequent_switches():
        race(*(lambda seed=seed: work(seed) for seed in range(4)))
    check(history, dict, key=lambda o: o.args[0])
    check(history, dict, state=lambda d: frozenset(d.items()))


def test_a_recorded_loss():
    """A counter that loses an update, as deterministically as two threads can."""

    class Careless(Counter):
        def add(self, k=1):
            n = self.n
            both_have_read.wait()
            self.n = n + k

    both_have_read = threading.Barrier(2)
    history = History()
    counter = history.record(Careless())
    race(counter.add, counter.add)
    counter.value()
    with pytest.raises(NotLinearizable, match=r"value\(\) of thread 0 should have been: -> 2|of thread \d"):
        check(history, Counter)
