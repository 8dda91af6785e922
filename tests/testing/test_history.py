"""What a history records, and how it is drawn."""

from __future__ import annotations

from itertools import pairwise

import pytest

from k42.testing import History, Operation, PausePoint, frequent_switches, race
from k42.testing._history import table


class Thing:
    size = 3

    def twice(self, x, *, plus=0):
        return 2 * x + plus

    def fail(self):
        raise KeyError("no")


def test_results_and_errors_are_recorded_and_passed_on():
    history = History()
    thing = history.record(Thing())
    assert thing.twice(2, plus=1) == 5
    with pytest.raises(KeyError):
        thing.fail()
    assert thing.size == 3
    assert history.call("named", len, "abc") == 3
    twice, fail, named = history.operations()
    assert (twice.name, twice.args, twice.kwargs, twice.result, twice.error) == ("twice", (2,), {"plus": 1}, 5, None)
    assert (fail.name, fail.result, type(fail.error)) == ("fail", None, KeyError)
    assert (named.name, named.args, named.result) == ("named", ("abc",), 3)
    assert [(op.invoked, op.returned) for op in (twice, fail, named)] == [(0, 1), (2, 3), (4, 5)]
    assert {op.thread for op in (twice, fail, named)} == {0}
    assert str(twice) == "twice(2, plus=1) -> 5"
    assert str(fail) == "fail() raised KeyError('no')"


def test_a_mapping_is_recorded():
    history = History()
    d = history.record({})
    d["a"] = 1
    assert d["a"] == 1
    assert "a" in d
    assert len(d) == 1
    del d["a"]
    with pytest.raises(KeyError):
        d["a"]
    names = [op.name for op in history.operations()]
    assert names == ["__setitem__", "__getitem__", "__contains__", "__len__", "__delitem__", "__getitem__"]


def test_an_operation_that_runs_has_not_returned():
    history = History()
    with PausePoint() as point:

        def look():
            point.reached()
            try:
                return history.operations()
            finally:
                point.resume()

        _, (running,) = race(lambda: history.call("wait", point), look)
    assert running.returned is None
    assert str(running) == "wait() has not returned"
    (done,) = history.operations()
    assert done.returned == 1


def test_what_runs_inside_another_call():
    history = History()
    history.call("outer", lambda: history.call("inner", lambda: 1))
    outer, inner = history.operations()
    assert (outer.name, outer.invoked, outer.returned) == ("outer", 0, 3)
    assert (inner.name, inner.invoked, inner.returned) == ("inner", 1, 2)
    assert table([outer, inner]).splitlines() == [
        "thread 0",
        "┌ outer()",
        "│ ┌ inner()",
        "│ └ -> 1",
        "└ -> 1",
    ]


def test_tickets_of_threads():
    n, k = 4, 500
    history = History()
    box = history.record([])
    with frequent_switches():
        race(*[lambda: [box.append(i) for i in range(k)]] * n)
    operations = history.operations()
    tickets = sorted([op.invoked for op in operations] + [op.returned for op in operations])
    assert tickets == list(range(2 * n * k))
    assert [op.invoked for op in operations] == sorted(op.invoked for op in operations)
    assert {op.thread for op in operations} == set(range(n))
    for thread in range(n):
        mine = [op for op in operations if op.thread == thread]
        assert [op.args for op in mine] == [(i,) for i in range(k)]
        assert all(a.returned < b.invoked for a, b in pairwise(mine))


def test_the_table():
    operations = [
        Operation(0, "add", (1,), invoked=0, returned=3),
        Operation(1, "value", result=0, invoked=1, returned=2),
        Operation(1, "stop", invoked=4),
    ]
    assert table(operations).splitlines() == [
        "thread 0    thread 1",
        "┌ add(1)",
        "│           ┌ value()",
        "│           └ -> 0",
        "└ -> None",
        "            ┌ stop()",
    ]
