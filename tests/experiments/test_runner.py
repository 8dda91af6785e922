from __future__ import annotations

import os
import threading

import pytest

from k42.errors import Error
from k42.experiments._record import Case
from k42.experiments._runner import Gate, cpus, default_processors, interleave, on_processors


def test_all_cases_take_turns_in_every_round() -> None:
    order: list[str] = []

    def case(name: str) -> Case:
        def measure() -> float:
            order.append(name)
            return float(len(order))

        return Case(name, 1, {}, measure)

    first, second = interleave([case("a"), case("b")], rounds=3)
    assert order == ["a", "b"] * 3
    assert (first.values, second.values) == ([1.0, 3.0, 5.0], [2.0, 4.0, 6.0])


def test_each_body_has_a_thread_on_a_cpu_of_its_own() -> None:
    everywhere = os.sched_getaffinity(0)

    def body(cpu: int, gate: Gate) -> float:
        gate.wait()
        assert os.sched_getaffinity(0) == {cpu}
        return float(cpu)

    processors = default_processors()[-1]
    assert on_processors(processors, body) == [float(cpu) for cpu in cpus()[:processors]]
    assert os.sched_getaffinity(0) == everywhere


def test_all_start_at_one_moment() -> None:
    processors = default_processors()[-1]
    starts = on_processors(processors, lambda _, gate: float(gate.wait()))
    assert len(set(starts)) == 1


def test_the_error_of_a_body_is_raised_and_no_one_waits_for_it() -> None:
    first = threading.Event()

    def body(_cpu: int, gate: Gate) -> float:
        if not first.is_set():
            first.set()
            raise Error("the cause")
        return float(gate.wait())

    with pytest.raises(Error, match="the cause"):
        on_processors(default_processors()[-1], body)


def test_more_processors_than_there_are_is_an_error() -> None:
    with pytest.raises(Error, match="4096 processors were asked for"):
        on_processors(4096, lambda _, gate: 0.0)
