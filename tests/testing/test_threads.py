"""The helpers that let threads meet."""

from __future__ import annotations

import sys
import threading

import pytest

import k42
from k42.testing import PausePoint, _threads, frequent_switches, memory_flat, race, wait_until


def test_race_returns_results_in_order():
    assert race(*(lambda i=i: i * i for i in range(10))) == [i * i for i in range(10)]
    assert race() == []


def test_all_run_at_the_same_time_on_processors_of_their_own():
    n = 6
    barrier = threading.Barrier(n)

    def work():
        barrier.wait()
        return k42.processors.current()

    assert len(set(race(*[work] * n))) == n
    # Without any barrier of their own, too: no thread ends early, and hands its processor on.
    assert len(set(race(*[k42.processors.current] * n))) == n


def test_the_first_exception_is_raised_and_tells_of_others():
    first = threading.Event()

    def one():
        try:
            raise KeyError("one")
        finally:
            first.set()

    def two():
        first.wait()
        raise KeyError("one")

    with pytest.raises(KeyError, match="one") as raised:
        race(one, two, lambda: 1)
    assert raised.value.__notes__ == ["another function raised KeyError('one')"]


def test_a_failure_is_not_hidden_by_those_who_wait_for_it(monkeypatch):
    monkeypatch.setattr(_threads, "_GRACE", 0.05)
    never = threading.Event()

    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:
        race(never.wait, fails)
    assert raised.value.__notes__ == ["left behind, still running: function 0"]
    never.set()


def test_switches_are_as_before_afterwards():
    before = sys.getswitchinterval()

    def fails():
        with frequent_switches():
            assert sys.getswitchinterval() < before
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert sys.getswitchinterval() == before


def test_wait_until_gives_up():
    def false_hope():
        return False

    with pytest.raises(TimeoutError, match=r"false_hope was not true within 0.01 s"):
        wait_until(false_hope, 0.01)


def test_a_pause_point_that_nobody_reaches_or_resumes(monkeypatch):
    monkeypatch.setattr(_threads, "_PATIENCE", 0.01)
    with pytest.raises(TimeoutError, match="no thread came"):
        PausePoint().reached()
    with pytest.raises(TimeoutError, match="nobody called resume"):
        PausePoint()()


def test_a_pause_point_is_resumed_when_the_test_fails():
    point = PausePoint()
    thread = threading.Thread(target=point)
    thread.start()

    def fails():
        with point:
            point.reached()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    thread.join()


def test_memory_that_grows():
    hoard = []
    with pytest.raises(AssertionError, match=r"memory grew by \d+\.\d MiB in 750 rounds after 250 to warm up: \d{5}"):
        memory_flat(lambda: hoard.append(bytearray(20_000)), 1000)
    hoard.clear()
    memory_flat(lambda: hoard.clear() or hoard.append(bytearray(20_000)), 1000)


def test_what_is_filled_while_it_warms_up_is_no_leak():
    cache = {}
    i = iter(range(10**6))
    memory_flat(lambda: cache.setdefault(next(i) % 200, bytearray(100_000)), 1000)
