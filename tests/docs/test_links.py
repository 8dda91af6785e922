"""What the documentation points to is there: files, and lines of code by the text that stands on them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(?:#L(\d+))?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_what_they_say(page: Path) -> None:
    wrong = []
    for text, target, line in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        file = page.parent / target
        if not file.exists():
            wrong.append(f"{target}: no such file")
        elif line:
            lines = file.read_text().splitlines()
            wanted = text.strip("`")
            if not (int(line) <= len(lines) and wanted in lines[int(line) - 1]):
                found = [number for number, code in enumerate(lines, 1) if wanted in code]
                wrong.append(f"{target}#L{line}: {wanted!r} stands on {found or 'no line'}")
    assert not wrong, "\n".join(wrong)


def test_the_tour_points_to_lines() -> None:
    tour = (ROOT / "docs" / "tour.md").read_text()
    assert len([line for _, _, line in LINK.findall(tour) if line]) >= 15
