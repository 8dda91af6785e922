"""The examples of the pages about the virtual memory system run as they stand, one after another."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "vm-howto.md").read_text(), re.M | re.S)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the virtual memory system is Linux's")


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory(prefix="k42-") as made:
        yield Path(made)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number: int, folder: Path) -> None:
    code = EXAMPLES[number]
    for needed in re.findall(r"^import (\w+)", code, re.M):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"the example needs {needed}")
    # A kernel of its own; in a short path, for its socket.
    environment = os.environ | {"XDG_RUNTIME_DIR": str(folder), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    if "no permission for userfaultfd" in done.stderr:
        pytest.skip("userfaultfd is not to be had here")
    assert done.returncode == 0, done.stderr
    assert not re.search(r"Traceback|Exception ignored", done.stderr)
