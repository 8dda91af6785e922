"""The experiments that are compared with k42 run as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.usefixtures("userfaultfd")
@pytest.mark.parametrize("name", ["faults", "grep", "memclone"])
def test_quick(name: str, tmp_path: Path) -> None:
    pytest.importorskip("k42.vm")
    path = tmp_path / "records.json"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "k42",
            "experiment",
            name,
            "--quick",
            "--processors",
            "1",
            "--json",
            str(path),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert {record["experiment"] for record in records} == {name}
    assert {"linux", "k42"} <= {record["implementation"] for record in records}
    assert all(record["value"] > 0 and record["runs"] >= 5 for record in records)
