"""Does it scale: times, speed-ups, and the name of what is waited for."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from k42 import cli
from k42.errors import Error
from k42.sim import S85, scale, work

ROUNDS = 40


class Registry:
    hits = 0


def shared_attribute(registry: Any, processor: int) -> None:
    for _ in range(ROUNDS):
        registry.hits += 1


def test_one_shared_attribute_does_not_scale():
    result = scale(shared_attribute, Registry, processors=[24, 8])
    assert list(result.cycles) == [1, 8, 24]  # one alone in any case
    assert result.speed_up(1) == 1
    assert result.speed_up(24) < 1
    assert (result.stalls[0].label, result.stalls[0].writers) == ("Registry.hits", 24)
    assert result.stalled > 0.5
    assert "Registry.hits: 100% of stalls, written by 24 processors." in str(result)


class Distributed:
    def __init__(self) -> None:
        self.parts = [Registry() for _ in range(24)]


def distributed(counters: Distributed, processor: int) -> None:
    mine = counters.parts[processor]
    for _ in range(300):
        work(200)
        mine.hits += 1


def test_what_is_local_scales():
    packed, padded = (scale(distributed, Distributed, processors=[1, 24], padded=padded) for padded in (False, True))
    assert "Registry.hits of 24 objects: " in str(packed)
    assert "each written by 1 processor." in str(packed)
    assert padded.speed_up(24) >= 0.9 * 24 > packed.speed_up(24) + 3


# Found by itself: what a function names.

table: dict[str, int] = {}
lock = threading.Lock()


def count(name: str) -> None:
    with lock:
        table[name] = table.get(name, 0) + 1


def through_globals(processor: int) -> None:
    for i in range(5):
        count(f"key {i}")


def test_globals_are_shared_for_the_run():
    table.clear()
    before = lock
    result = scale(through_globals, processors=[1, 3])
    assert table == {f"key {i}": 1 + 3 for i in range(5)}
    assert lock is before
    assert type(table) is dict
    assert {"lock", "table[]", "table.length"} <= {row.label for row in result.stalls}


def test_closures_and_classes():
    class Cache:
        entries: dict[int, int] = {}  # noqa: RUF012 - it is to be shared by all
        guard = threading.Lock()

        @functools.cached_property
        def size(self) -> int:
            return len(self.entries)

        def put(self, key: int) -> None:
            with self.guard:
                self.entries[key] = key

    cache, real = Cache(), Cache.guard

    def work(processor: int) -> int:
        cache.put(processor)
        return cache.size

    result = scale(work, processors=[1, 4])
    assert Cache.entries == {n: n for n in range(4)}
    assert Cache.guard is real
    assert type(cache) is Cache
    assert {"guard", "entries[]"} <= {row.label for row in result.stalls}


def test_methods_and_objects_that_are_called():
    class Work:
        n = 0

        def run(self, processor: int) -> None:
            self.n += 1

        __call__ = run

    for callable_ in (Work(), Work().run):
        assert scale(callable_, processors=[1, 2]).stalls[0].label == "Work.n"
    with pytest.raises(Error, match="partial is not a function"):
        scale(functools.partial(shared_attribute, Registry()), processors=[1])


def test_all_is_put_back_after_an_error():
    table.clear()
    before = lock

    def work(processor: int) -> None:
        count("a")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        scale(work, processors=[2])
    assert lock is before
    assert type(table) is dict


def test_the_same_seed_gives_the_same_result():
    results = [scale(shared_attribute, Registry, processors=[1, 6], seed=seed) for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]


REPEATED = """
import threading
from k42.sim import scale
class Node:
    def __init__(self, name): self.name = name; self.n = 0
nodes, index, names, lock = {}, {1.5: [0], ("a", 1): [0], None: [0]}, set(), threading.Lock()
def work(processor):
    for i in range(12):
        with lock:
            node = nodes.setdefault(f"node {i}", Node(f"node {i}"))
            index["a", 1].append(i)
            names.add(node.name)
        node.n += 1
result = scale(work, processors=[1, 5])
print(result, result.cycles, result.stalls)
"""


def test_nothing_depends_on_the_process():
    outputs = {
        subprocess.run(
            [sys.executable, "-c", REPEATED],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_other_machines():
    small = dataclasses.replace(S85, name="small", processors=3)
    done: list[int] = []
    result = scale(shared_attribute, Registry, machine=small, progress=done.append)
    assert done == list(result.cycles) == [1, 2, 3]
    assert str(result).startswith("shared_attribute on small")
    for wrong in ({"processors": [25]}, {"processors": [0]}, {"machine": "s86"}):
        with pytest.raises(Error, match="s85"):
            scale(shared_attribute, Registry, **wrong)


def test_findings_speak_of_lines_too():
    class Pair:
        def __init__(self) -> None:
            self.written, self.read = 0, 0

    def work(pair: Pair, processor: int) -> None:
        for _ in range(ROUNDS):
            if processor % 2:
                pair.written += 1
            else:
                assert pair.read == 0

    text = str(scale(work, Pair, processors=[4]))
    assert "Pair.written: " in text
    assert "stalls, written by 2 processors." in text
    assert "written by none, but maybe what is on its line." in text


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    result = scale(shared_attribute, Registry, processors=[1, 2, 4])
    result.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    with pytest.raises(Error, match="could not be written"):
        result.plot(tmp_path / "a.nothing")


# The command.

PROGRAM = """
import queue, threading
class Registry: hits = 0
registry, lock, jobs = Registry(), threading.Lock(), queue.Queue()
def work(processor):
    for _ in range(10):
        with lock:
            registry.hits += 1
def fails(processor):
    registry.hits += 1
    if processor: raise KeyError("gone")
def waits(processor):
    jobs.get()
def stops(processor):
    raise KeyboardInterrupt
"""


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["sim", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "queue.py"  # as a module of the standard library
    file.write_text(PROGRAM)
    return file


def test_the_command(program, tmp_path):
    code, out, _ = run(f"{program}:work", "--processors", "1,4", "--json", tmp_path / "a.json")
    assert code == 0
    assert out.startswith("work on s85\n")
    assert "lock: " in out
    records = [json.loads(line) for line in (tmp_path / "a.json").read_text().splitlines()]
    assert next(record["value"] for record in records if record["metric"] == "speed_up") == 1
    assert {"time", "speed_up", "stalled"} == {record["metric"] for record in records}
    (tmp_path / "two.toml").write_text('like = "s85"\nprocessors = 2\n')
    code, out, err = run(f"{program}:work", "--machine", tmp_path / "two.toml", "--json", "-")
    assert code == 0
    assert "work on two" in err
    assert {json.loads(line)["processors"] for line in out.splitlines()} == {1, 2}


@pytest.mark.parametrize(
    ("function", "code", "message"),
    [
        ("nowhere.py:work", 2, "there is no such file"),
        ("queue.py:nothing", 2, "has no function 'nothing'; it has: Registry, registry, work, fails, waits, stops"),
        ("queue.py:fails", 2, "fails fails on a simulated processor: KeyError: 'gone' (queue.py, line 11)"),
        ("queue.py:waits", 2, "queue.Queue cannot be simulated: use a deque"),
        ("queue.py:stops", 130, ""),
        ("broken.py:work", 2, "broken.py fails: SyntaxError"),
        ("queue.py", 2, "is not a file and a function of it"),
    ],
)
def test_errors_of_the_command(program, monkeypatch, function, code, message):
    monkeypatch.chdir(program.parent)
    Path("broken.py").write_text("def work(:\n")
    found, _, err = run(function, "--processors", "1,2")
    assert found == code
    assert message in " ".join(err.replace("│", "").split())
