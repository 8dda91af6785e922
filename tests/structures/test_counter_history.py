"""Counters by their recorded histories.

Those with one representative are linearizable. Those with a part a processor promise less, exactly what the docstring
of `Counter.value` says; every counter keeps that.
"""

from __future__ import annotations

import random
from functools import partial

import pytest

import k42
from k42.sim.models import counter as models
from k42.structures import AtomicCounter, SharedCounter
from k42.structures.counter import IMPLEMENTATIONS
from k42.testing import History, NotLinearizable, Operation, check, frequent_switches, race

every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda cls: cls.__name__)


class Sequential:
    """The specification: the model of a counter, which one processor uses."""

    def __init__(self, start=0):
        self.model = models.SharedCounter(start)

    def add(self, k=1):
        self.model.add(0, k)

    def value(self):
        return self.model.value()


def check_value(operations, start=0):
    """Check what every `value()` guarantees.

    Adds that returned before it began are counted; adds that ran at the same time are, or not, each for itself. When
    no add is negative, a value that began after another one had returned is no less.
    """
    adds = [op for op in operations if op.name == "add" and op.error is None]
    amount = {op: op.args[0] if op.args else 1 for op in adds}
    values = [op for op in operations if op.name == "value"]
    for value in values:
        before = {op for op in adds if op.returned is not None and op.returned < value.invoked}
        sums = {start + sum(amount[op] for op in before)}
        for op in adds:
            if op not in before and op.invoked < value.returned:
                sums |= {n + amount[op] for n in sums}
        assert value.result in sums, f"{value}, where only {sorted(sums)} are possible"
    if min(amount.values(), default=0) >= 0:
        for value in values:
            for earlier in values:
                if earlier.returned < value.invoked:
                    assert earlier.result <= value.result, f"{earlier}, and after it {value}"


def recorded(implementation, amounts, seed, waves=3, threads=4, calls=20):
    """What threads did to one counter, wave after wave: each wave goes on with the processors of the last."""
    history = History()
    reference = implementation.create()
    counter = history.record(reference)

    def work(thread):
        random_ = random.Random(seed * threads + thread)
        for _ in range(calls):
            if random_.random() < 0.3:
                counter.value()
            else:
                counter.add(random_.choice(amounts))

    with frequent_switches():
        for _ in range(waves):
            race(*(partial(work, thread) for thread in range(threads)))
    counter.value()
    k42.destroy(reference)
    return history.operations()


MIXED = (1, 1, -1, 3, -7, 100)
POSITIVE = (0, 1, 1, 2, 30)


@pytest.mark.parametrize("implementation", [SharedCounter, AtomicCounter], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("amounts", [MIXED, POSITIVE], ids=["mixed", "positive"])
def test_one_count_is_linearizable(implementation, amounts):
    for seed in range(4):
        check(recorded(implementation, amounts, seed), Sequential)


@every
@pytest.mark.parametrize("amounts", [MIXED, POSITIVE], ids=["mixed", "positive"])
def test_every_value_keeps_its_guarantee(implementation, amounts):
    for seed in range(4):
        check_value(recorded(implementation, amounts, seed))


@every
def test_one_thread_alone(implementation):
    """Then there is nothing weaker about parts."""
    check(recorded(implementation, MIXED, 0, threads=1, calls=100), Sequential)


@pytest.mark.parametrize("implementation", [SharedCounter, AtomicCounter], ids=lambda cls: cls.__name__)
def test_adds_that_are_refused(implementation):
    """A count that is full except for one: of the adds that race, as many get in as have room."""
    most = 2**63 - 1
    for _ in range(20):
        history = History()
        reference = implementation.create(most - 1)
        counter = history.record(reference)

        def work(counter=counter):
            for k in (1, -1, 1):
                try:
                    counter.add(k)
                except OverflowError:
                    pass

        with frequent_switches():
            race(work, work, work)
        counter.value()
        check(history, lambda: Sequential(most - 1))
        k42.destroy(reference)


# The check itself


def op(thread, invoked, returned, name, *args, result=None):
    return Operation(thread, name, args, {}, result, None, invoked, returned)


@pytest.mark.parametrize(
    "operations",
    [
        # An add that had returned is missing.
        [op(0, 0, 1, "add", 3), op(1, 2, 3, "value", result=0)],
        # Counted twice; counted in half; counted before it began.
        [op(0, 0, 3, "add", 3), op(1, 1, 2, "value", result=6)],
        [op(0, 0, 3, "add", 2), op(1, 1, 2, "value", result=1)],
        [op(0, 2, 3, "add", 3), op(1, 0, 1, "value", result=3)],
        # It goes back: the add still runs.
        [op(0, 0, 9, "add", 3), op(1, 1, 2, "value", result=3), op(2, 3, 4, "value", result=0)],
    ],
)
def test_what_breaks_the_guarantee(operations):
    with pytest.raises(AssertionError):
        check_value(operations)
    with pytest.raises(NotLinearizable):
        check(operations, Sequential)


def test_the_guarantee_is_weaker_than_linearizability():
    """The later one of two adds is counted, and the earlier is not: a part was read before, the other after."""
    operations = [op(0, 0, 5, "value", result=10), op(1, 1, 2, "add", 1), op(2, 3, 4, "add", 10)]
    check_value(operations)
    with pytest.raises(NotLinearizable):
        check(operations, Sequential)


def test_with_negative_adds_a_value_may_be_less():
    operations = [op(0, 0, 9, "add", 3), op(3, 0, 9, "add", -1)]
    check_value([*operations, op(1, 1, 2, "value", result=3), op(2, 3, 4, "value", result=-1)])
