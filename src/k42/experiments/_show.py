"""How findings are shown: a table in the terminal, and a plot in a file."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

from k42.errors import Error
from k42.experiments._record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One hue for each who serves the faults, and for each way to count; its variants differ in lightness.
_COLOURS = {
    "linux": "#4c6a92",
    "linux-anonymous": "#8aa5c7",
    "linux-read": "#c4d2e4",
    "bare": "#4f8a5b",
    "bare-remote": "#2c5134",
    "bare-zero": "#a3c9aa",
    "k42": "#d1662f",
    "k42, 4 KiB pages": "#d1662f",
    "k42, 64 KiB pages": "#eeb08c",
    "k42-zero": "#eeb08c",
    "k42-process-shared": "#8a5a99",
    "k42-pm-shared": "#4f8a5b",
    "k42-both-shared": "#26364c",
    "k42-fcm-shared": "#26364c",
    "k42-fcm-replicated": "#eeb08c",
    "k42-fcm-partitioned": "#8a5a99",
    "native-lock": "#a9bdd9",
    "SharedCounter": "#4c6a92",
    "threading.Lock": "#26364c",
    "native-atomic": "#a3c9aa",
    "AtomicCounter": "#4f8a5b",
    "native-array": "#d8c3e0",
    "PackedCounter": "#8a5a99",
    "native-padded": "#eeb08c",
    "DistributedCounter": "#d1662f",
    "no-op": "#999999",
}

# Where a name is made of where the state lives and what it is: from Python, and in the core alone.
_HUES = {
    "Shared": ("#4c6a92", "#a9bdd9"),
    "Atomic": ("#4f8a5b", "#a3c9aa"),
    "Packed": ("#8a5a99", "#d8c3e0"),
    "Partitioned": ("#8a5a99", "#d8c3e0"),
    "Distributed": ("#d1662f", "#eeb08c"),
    "Replicated": ("#d1662f", "#eeb08c"),
}
_SHADES = ("#eeb08c", "#d1662f", "#8f3f17")  # for numbers of processors
_MANY = 5  # columns, from which on their heads are short
_OTHERS = ("#26364c", "#d1662f", "#4f8a5b", "#8a5a99", "#999999", "#4c6a92", "#e0a93b")


def size(nbytes: int) -> str:
    """A number of bytes as people write it: `size(65536)` is `64 KiB`."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes} B"


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:.0f}"


def counted(processors: int) -> str:
    """`1 processor`, `2 processors`."""
    return f"{processors} processor{'s' if processors != 1 else ''}"


def _page_size(record: Record) -> int:
    return record.parameters.get("page_size", 0)


def _operation(name: str) -> str:
    """The operation of an `operation/implementation`; empty where one experiment is one operation."""
    return name.rpartition("/")[0]


def _short(name: str) -> str:
    """The name without its operation."""
    return name.rpartition("/")[2]


def _colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each of the names in a panel."""
    others = itertools.cycle(_OTHERS)

    def colour(name: str) -> str:
        for prefix, (plain, core) in _HUES.items():
            if name.startswith(prefix):
                return core if name.endswith("(core)") else plain
        return next(others)

    return {name: _COLOURS.get(name) or colour(_short(name)) for name in names}


class _Layout:
    """How records are arranged: by series (a row, a colour) and by group (a column, a place on the axis).

    A series is an implementation, and a group a page size and a number of processors, if each implementation
    was measured with each page size; otherwise the page size, where there are several, is part of the series.
    Where there are no pages, a group is a number of processors.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.first = records[0]
        sizes: dict[str, set[int]] = {}
        for record in records:
            sizes.setdefault(record.implementation, set()).add(_page_size(record))
        self._by_size = len({frozenset(each) for each in sizes.values()}) == 1
        self._sizes = sizes
        self.cells = {(self._series(record), self._group(record)): record for record in records}
        self.series = list(dict.fromkeys(series for series, _ in self.cells))
        self.groups = sorted({group for _, group in self.cells})

    def _series(self, record: Record) -> str:
        name = record.implementation
        if self._by_size or len(self._sizes[name]) == 1:
            return name
        return f"{name}, {size(_page_size(record))} pages"

    def _group(self, record: Record) -> tuple[int, int]:
        return _page_size(record) if self._by_size else 0, record.processors

    def label(self, group: tuple[int, int]) -> str:
        """What stands above a column or below a place: a line or two."""
        page_size, processors = group
        return f"{size(page_size)} pages\n{counted(processors)}" if page_size else counted(processors)


def table(title: str, records: Sequence[Record]) -> Group:
    """The records as a table, between a title and a legend.

    Args:
        title: above the table.
        records: of one experiment, in one metric and unit.
    """
    layout = _Layout(records)
    result = Table()
    result.add_column(f"{layout.first.metric},\n{layout.first.unit}")
    for group in layout.groups:
        result.add_column(layout.label(group) if len(layout.groups) <= _MANY else str(group[1]), justify="right")
    for before, series in zip([layout.series[0], *layout.series], layout.series, strict=False):
        if _operation(before) != _operation(series):
            result.add_section()
        result.add_row(series, *(_cell(layout.cells.get((series, group))) for group in layout.groups))
    caption = f"Median of {layout.first.runs} interleaved rounds ± half of the interquartile range."
    if layout.first.runs == 1:
        caption = "Each column is a number of processors, each value one run, which comes out the same each time."
    return Group(f"[bold]{title}[/]", result, f"[dim]{caption}[/]")


def _cell(record: Record | None) -> str:
    if record is None:
        return ""
    if not record.value:
        return "0"
    if record.runs == 1:
        return number(record.value)
    return f"{number(record.value)} [dim]±{50 * record.spread / record.value:2.0f}%[/]"


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw the records, one panel an experiment or an operation of it, into a file of the kind that its name ends with.

    With one or two numbers of processors the panel has bars, side by side; with more it has lines against processors,
    as the paper's figures have it. Shares are bars in any case.

    Raises:
        Error: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Error("a plot needs matplotlib: pip install 'k42[plot]'") from error
    panels: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        panels.setdefault((record.experiment, _operation(record.implementation)), []).append(record)
    columns = min(len(panels), 3)
    width = columns * max(_width(panel) for panel in panels.values())
    figure = Figure(figsize=(width, 5 * math.ceil(len(panels) / columns)), layout="constrained")
    FigureCanvasAgg(figure)
    places = list(figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).flat)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    for axes, ((_, operation), panel) in zip(places, panels.items(), strict=False):
        first = panel[0]
        draw = _shares if first.unit == "%" else _bars if _few(panel) else _lines
        draw(axes, panel)
        labels = axes.get_legend_handles_labels()[1]
        legend = max(1, min(4, int(_width(panel) * 72 / (5 * max(map(len, labels)) + 40))))  # columns that find room
        rows = math.ceil(len(labels) / legend)
        title = f"{first.experiment}: {operation}" if operation else first.experiment
        axes.set_title(title, loc="left", fontweight="bold", pad=12 + 15 * rows)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), frameon=False, ncols=legend, fontsize="small")
        label = axes.set_xlabel if draw is _shares else axes.set_ylabel
        label(f"{first.metric.replace('_', ' ')}, {first.unit.replace('us', 'µs')}")
        axes.spines[["top", "right"]].set_visible(False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        raise Error(f"the plot could not be written: {error}") from error


def _few(panel: Sequence[Record]) -> bool:
    """Whether there is too little for lines."""
    return len({record.processors for record in panel}) <= 2


def _width(panel: Sequence[Record]) -> float:
    return max(5.5, 0.36 * len(panel)) if _few(panel) else 7.0


def _bars(axes: Axes, records: Sequence[Record]) -> None:
    """A bar for each series in each group, with its value above it."""
    layout = _Layout(records)
    colours = _colours(layout.series)
    width = 0.84 / len(layout.series)
    for i, series in enumerate(layout.series):
        own = {at: layout.cells[series, group] for at, group in enumerate(layout.groups)}
        bars = axes.bar(
            [at + (i - (len(layout.series) - 1) / 2) * width for at in own],
            [record.value for record in own.values()],
            width * 0.92,
            yerr=[record.spread / 2 for record in own.values()],
            error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
            color=colours[series],
            label=_short(series),
        )
        axes.bar_label(bars, [number(record.value) for record in own.values()], padding=2, fontsize=7)
    axes.set_xticks(range(len(layout.groups)), [layout.label(group) for group in layout.groups])
    values = [record.value for record in records]
    if max(values) > 8 * min(values):
        _logarithmic(axes, values)
        axes.set_ylim(bottom=min(values) / 2)


def _shares(axes: Axes, records: Sequence[Record]) -> None:
    """A row for each series, in their order, with a bar for each number of processors; for shares of a whole."""
    layout = _Layout(records)
    height = 0.8 / len(layout.groups)
    for at, group in enumerate(layout.groups):
        bars = axes.barh(
            [row + at * height for row in range(len(layout.series))],
            [layout.cells[series, group].value for series in layout.series],
            height * 0.92,
            color=_SHADES[at % len(_SHADES)],
            label=layout.label(group),
        )
        axes.bar_label(bars, [number(layout.cells[series, group].value) for series in layout.series], padding=2)
    names = [textwrap.fill(_short(series), 26) for series in layout.series]
    axes.set_yticks([row + (len(layout.groups) - 1) * height / 2 for row in range(len(names))], names)
    axes.invert_yaxis()
    axes.margins(x=0.15)


def _lines(axes: Axes, records: Sequence[Record]) -> None:
    """A line for each implementation and page size, against the number of processors; to be told apart in grey, too."""
    lines: dict[tuple[str, int], list[Record]] = {}
    for record in sorted(records, key=lambda record: record.processors):
        lines.setdefault((record.implementation, _page_size(record)), []).append(record)
    colours = _colours([name for name, _ in lines])
    looks = itertools.cycle(itertools.product(("-", "--", ":"), "os^Dv"))
    for ((name, page_size), own), (style, marker) in zip(lines.items(), looks, strict=False):
        axes.errorbar(
            [record.processors for record in own],
            [record.value for record in own],
            yerr=[record.spread / 2 for record in own],
            color=colours[name],
            linestyle=style,
            marker=marker,
            label=f"{name}, {size(page_size)} pages" if page_size else _short(name),
        )
    counts = sorted({record.processors for record in records})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("processors")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers, also between the powers of ten where there are few of them."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    few = max(values) < 20 * min(values)
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if few else "")
