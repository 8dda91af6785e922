"""The examples of the README run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTIONS = re.split(r"^## ", (ROOT / "README.md").read_text(), flags=re.M)
EXAMPLES = [
    (section.splitlines()[0], code)
    for section in SECTIONS
    for code in re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
]


def test_each_use_has_an_example() -> None:
    titles = [title for title, _ in EXAMPLES]
    assert titles == ["A Clustered Object", "Ready-made structures", "A mapped file", "Will it scale?"]


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_example_runs(title: str, code: str, tmp_path: Path) -> None:
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}  # a kernel of its own
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    if title == "Will it scale?":
        assert re.search(r"Site.hits: \d+% of stalls, written by 24 processors\.", done.stdout), done.stdout
    if title == "A mapped file":
        assert done.stdout.startswith(str((ROOT / "LICENSE").stat().st_size))
