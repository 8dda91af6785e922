from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from rich.console import Console

from k42.errors import Error
from k42.experiments._record import Record
from k42.experiments._show import number, plot, size, table


def records(experiment: str, processors: tuple[int, ...], sizes: dict[str, tuple[int, ...]]) -> list[Record]:
    return [
        Record(experiment, "real", name, count, "time_per_page", "us", 1.5 * count, 5, 0.3, {"page_size": each})
        for name, page_sizes in sizes.items()
        for each in page_sizes
        for count in processors
    ]


def shown(found: list[Record]) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table("what it is", found))
    return capture.get()


def test_page_sizes_are_columns_where_all_have_them() -> None:
    text = shown(records("faults", (1, 2), {"linux": (4096, 65536), "k42": (4096, 65536)}))
    assert "what it is" in text
    assert "64 KiB pages" in text
    assert text.count("1.50 ±10%") == 4


def test_page_sizes_are_rows_where_only_some_have_them() -> None:
    text = shown(records("grep", (1, 2), {"linux": (4096,), "k42": (4096, 65536)}))
    rows = [line.split("│")[1].strip() for line in text.splitlines() if "│" in line]
    assert rows == ["linux", "k42, 4 KiB pages", "k42, 64 KiB pages"]


def test_without_pages_processors_are_columns() -> None:
    found = [Record("counter", "real", "no-op", n, "time_per_call", "ns", 2.0, 5, 0.4, {"calls": 9}) for n in (1, 2)]
    text = shown(found)
    assert "1 processor " in text
    assert "pages" not in text
    assert text.count("2.00 ±10%") == 2


@pytest.mark.parametrize("processors", [(1,), (1, 2), (1, 2, 4, 8)])
def test_plots_are_drawn(tmp_path: Path, processors: tuple[int, ...]) -> None:
    pytest.importorskip("matplotlib")
    both = [
        *records("grep", processors, {"linux": (4096,), "k42": (4096, 65536)}),
        *records("memclone", processors, {"linux": (4096, 65536), "k42": (4096, 65536)}),
        *(dataclasses.replace(each, parameters={}) for each in records("counter", processors, {"no-op": (0,)})),
    ]
    path = tmp_path / "new" / "plot.png"
    plot(both, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_an_unknown_kind_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(Error, match="could not be written"):
        plot(records("faults", (1,), {"linux": (4096,)}), tmp_path / "plot.nonsense")


def test_numbers_and_sizes_are_short() -> None:
    assert [number(value) for value in (0.1234, 4.0, 61.25, 123.4, 12345.6)] == [
        "0.123",
        "4.00",
        "61.2",
        "123",
        "12346",
    ]
    assert [size(value) for value in (512, 4096, 65536, 3 * 2**19)] == ["512 B", "4 KiB", "64 KiB", "1.5 MiB"]


def test_shares_are_shown_also_where_they_are_nothing(tmp_path: Path) -> None:
    found = [
        Record("objects", "real", f"benchmark/{name}", n, "share", "%", value, 5, 0.0, {"count": 9})
        for name, value in (("used on one", 100.0), ("used on several", 0.0))
        for n in (1, 2)
    ]
    rows = [line.split("│")[1:4] for line in shown(found).splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["benchmark/used on one", "100 ± 0%", "100 ± 0%"],
        ["benchmark/used on several", "0", "0"],
    ]
    pytest.importorskip("matplotlib")
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
