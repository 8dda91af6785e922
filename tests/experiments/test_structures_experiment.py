from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from k42 import _native
from k42.experiments import structures
from k42.experiments._runner import default_processors

OPERATIONS = {
    *("no-op", "call", "counter.add", "counter.value", "gate.enter+leave", "gate.with"),
    *("map.get", "map.get object", "map.set", "intervals.get"),
    *("pool.take+give_back", "pool.with"),
}


def test_all_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structures, "WARM_UP", 20)
    processors = default_processors()
    rows = structures.rows()
    assert len({row.name for row in rows}) == len(rows)
    assert {row.name.rpartition("/")[0] for row in rows} == OPERATIONS
    samples = structures.measure(rows, processors, calls=20, rounds=5)
    records = [each.record("structures", "time_per_call", "ns") for each in samples]
    assert {(r.implementation, r.processors) for r in records} == {(row.name, c) for row in rows for c in processors}
    assert all(record.value > 0 and record.runs == 5 for record in records)
    lines = structures.findings(samples, processors)
    assert lines[0].startswith("counter.add/DistributedCounter / no-op/once (1 proc.) = ")
    assert any(line.startswith("no-op/translation (core) (1 proc.) = ") for line in lines)


def test_peers_that_are_missing_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structures, "_peer", lambda _module: None)
    rows = structures.rows()
    assert not any(peer in row.name for row in rows for peer in structures.PEERS)
    samples = structures.measure(rows, (1,), calls=1, rounds=5)
    assert structures.findings(samples, (1,))[-2:] == [
        "cereggii is not installed, so it was not measured",
        "prometheus_client is not installed, so it was not measured",
    ]


def test_a_native_loop_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no native loop 'nonsense'"):
        _native.CoreLoop("nonsense")


def test_quick(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, plot = tmp_path / "records.json", tmp_path / "plot.png"
    command = [sys.executable, "-m", "k42", "experiment", "structures", "--quick", "--processors", "1"]
    subprocess.run([*command, "--json", str(path), "--plot", str(plot)], check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert {record["implementation"].rpartition("/")[0] for record in records} == OPERATIONS
    assert {(record["experiment"], record["metric"], record["unit"]) for record in records} == {
        ("structures", "time_per_call", "ns")
    }
    assert plot.read_bytes().startswith(b"\x89PNG")
