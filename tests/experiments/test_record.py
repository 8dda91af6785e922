from __future__ import annotations

import json
from pathlib import Path

import pytest

from k42.errors import Error
from k42.experiments._record import PAGE, Case, Record, Samples, compared, find, write_json

KEYS = [
    "experiment",
    "machine",
    "implementation",
    "processors",
    "metric",
    "unit",
    "value",
    "runs",
    "spread",
    "parameters",
]


def samples(implementation: str, values: list[float], processors: int = 1, page_size: int = PAGE) -> Samples:
    return Samples(Case(implementation, processors, {"page_size": page_size}, lambda: 0.0), values)


def test_a_record_sums_up_its_samples() -> None:
    record = samples("linux", [5.0, 1.0, 2.0, 4.0, 3.0]).record("faults", "time_per_page", "us")
    assert (record.value, record.spread, record.runs) == (3.0, 2.0, 5)


def test_json_has_the_documented_keys_and_one_line() -> None:
    record = samples("linux", [1.0] * 5).record("faults", "time_per_page", "us")
    line = record.to_json()
    assert "\n" not in line
    loaded = json.loads(line)
    assert list(loaded) == KEYS
    assert Record(**loaded) == record


def test_records_are_written_one_a_line(tmp_path: Path) -> None:
    records = [samples(name, [1.0] * 5).record("faults", "time_per_page", "us") for name in ("linux", "bare")]
    path = tmp_path / "new" / "records.json"
    write_json(records, path)
    assert [json.loads(line)["implementation"] for line in path.read_text().splitlines()] == ["linux", "bare"]


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Error, match="could not be written"):
        write_json([], tmp_path)


def test_a_ratio_is_taken_round_by_round() -> None:
    # The second round was disturbed, for both.
    assert samples("k42", [2.0, 200.0, 2.0]).ratio(samples("bare", [1.0, 100.0, 1.0])) == 2.0


def test_find_and_compare() -> None:
    found = [samples("linux", [1.0] * 5), samples("k42", [3.0] * 5), samples("k42", [6.0] * 5, processors=2)]
    assert find(found, "k42", 2, PAGE) is found[2]
    assert find(found, "k42", 2, 16 * PAGE) is None
    assert compared(found) == ["k42 (4 KiB) / linux, 1 proc. = 3.00", "k42 (4 KiB), 2 proc. / 1 proc. = 2.00"]
