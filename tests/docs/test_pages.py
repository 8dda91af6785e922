"""The examples of the pages about objects and about the simulator run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from k42 import sim

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    pytest.param(code, id=f"{page}-{number}")
    for page in ("own-object.md", "what-scales.md", "simulator.md")
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.M | re.S))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code: str) -> None:
    script = code + "\nfrom concurrent.futures import ThreadPoolExecutor\n" if "latencies" in code else code
    if "latencies" in code:
        # What the page says of it: many threads record, and nothing is lost.
        script += (
            "before = latencies.summary()[0]\n"
            "with ThreadPoolExecutor(4) as pool:\n"
            "    list(pool.map(latencies.record, range(1000)))\n"
            "assert latencies.summary()[0] == before + 1000\n"
            "assert latencies.summary()[2] == 999\n"
        )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_machine_of_one_s_own(tmp_path: Path) -> None:
    [text] = re.findall(r"^```toml\n(.*?)^```", (ROOT / "docs" / "simulator.md").read_text(), re.M | re.S)
    file = tmp_path / "mine.toml"
    file.write_text(text)
    machine = sim.load(file)
    assert (machine.name, machine.processors, machine.l1.ways) == ("mine", 64, 8)
