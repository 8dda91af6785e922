from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from k42.errors import Error
from k42.experiments import counter
from k42.experiments._runner import default_processors

NAMES = {
    *("native-lock", "native-atomic", "native-array", "native-padded"),
    *("SharedCounter", "AtomicCounter", "PackedCounter", "DistributedCounter", "threading.Lock", "no-op"),
}


def test_all_are_measured() -> None:
    processors = default_processors()
    samples = counter.measure(processors, calls=500, rounds=5)
    records = [each.record("counter", "time_per_call", "ns") for each in samples]
    assert {(r.implementation, r.processors) for r in records} == {(n, c) for n in NAMES for c in processors}
    assert all(record.value > 0 and record.runs == 5 for record in records)
    lines = counter.findings(samples, processors)
    assert lines[0].startswith("DistributedCounter (1 proc.) / no-op (1 proc.) = ")
    assert lines[0].endswith("wanted: at most 1.5")


def test_a_lost_add_is_an_error() -> None:
    class Forgetful(counter.LockedCounter):
        def value(self) -> int:
            return super().value() - 1

    with pytest.raises(Error, match="1010 calls were counted as 1009"):
        counter.time_per_call(counter._of_python(Forgetful), 1, 10)


def test_quick(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, plot = tmp_path / "records.json", tmp_path / "plot.png"
    command = [sys.executable, "-m", "k42", "experiment", "counter", "--quick", "--json", str(path)]
    subprocess.run([*command, "--plot", str(plot)], check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert {record["implementation"] for record in records} == NAMES
    assert {(record["experiment"], record["metric"], record["unit"]) for record in records} == {
        ("counter", "time_per_call", "ns")
    }
    assert plot.read_bytes().startswith(b"\x89PNG")
