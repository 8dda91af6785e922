"""Static types: of references, of what methods return, of the structures' generics; see sample.py."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

SAMPLE = Path(__file__).parent / "sample.py"


def test_mypy_agrees(tmp_path):
    api = pytest.importorskip("mypy.api", reason="mypy is not installed: make types does it")
    root = Path(__file__).parents[2]
    arguments = ["--config-file", str(root / "pyproject.toml"), "--cache-dir", str(tmp_path), str(SAMPLE)]
    report, errors, status = api.run(arguments)
    assert (status, errors) == (0, ""), report


def test_it_is_true():
    spec = importlib.util.spec_from_file_location("sample", SAMPLE)
    sample = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sample)
    allowed = os.sched_getaffinity(0)
    try:
        sample.main()
    finally:
        os.sched_setaffinity(0, allowed)
