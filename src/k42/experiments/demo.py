"""A first look at k42, in two minutes: grep and memclone on Linux and on k42, as a table and a plot."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group
from rich.table import Table

from k42.experiments import grep, memclone
from k42.experiments._record import PAGE, PAGE_SIZES
from k42.experiments._runner import Options, default_processors
from k42.experiments._show import number, plot, size


def run(plot_file: Path) -> Group:
    """Run both experiments and draw their plot.

    Args:
        plot_file: where the plot goes.

    Returns:
        One line for each experiment and number of processors.

    Raises:
        Error: an experiment failed; what it read being wrong is such a failure.
    """
    options = Options(default_processors(), quick=False)
    searched = grep.run(options).records
    touched = memclone.run(options).records
    plot([*searched, *touched], plot_file)

    table = Table()
    table.add_column("experiment")
    table.add_column("CPUs", justify="right")
    table.add_column("Linux mmap", justify="right")
    for page_size in PAGE_SIZES:
        table.add_column(f"k42\n{size(page_size)} pages", justify="right")
    table.add_column("contents\nchecked")
    for records in searched, touched:
        cells = {(r.implementation, r.parameters["page_size"], r.processors): r for r in records}
        for processors in options.processors:
            linux = cells["linux", PAGE, processors]
            own = [cells["k42", page_size, processors] for page_size in PAGE_SIZES]
            table.add_row(
                linux.experiment,
                str(processors),
                f"{number(linux.value)} {linux.unit}",
                *(f"{number(r.value)} {r.unit} [dim]×{r.value / linux.value:.2f}[/]" for r in own),
                "every byte",
            )
        table.add_section()
    caption = (
        f"grep: each process searches a common file of {grep.NBYTES // 10**6} MB.\n"
        f"memclone: each thread touches {memclone.PAGES} new pages of 4 KiB.\n"
        f"Medians of {searched[0].runs} and {touched[0].runs} interleaved rounds; ×: of Linux's time. "
        f"Plot: {plot_file}"
    )
    return Group("[bold]The same work on Linux and on k42[/]", table, f"[dim]{caption}[/]")
