"""The experiments of the paper, run on this machine: one module each, all with `run(options) -> Report`.

Times are taken here and never in tests: implementations that are compared take turns in every round of one
run, and what is reported is the median of at least five rounds with the interquartile range.
"""

from __future__ import annotations

from collections.abc import Callable

from k42.experiments import (
    attach,
    counter,
    fault_rate,
    faults,
    grep,
    memclone,
    memclone_shared,
    objects,
    paging,
    remote,
    structures,
    survival,
)
from k42.experiments._runner import Options, Report

__all__ = ["EXPERIMENTS", "Options", "Report"]

EXPERIMENTS: dict[str, Callable[[Options], Report]] = {
    "attach": attach.run,
    "counter": counter.run,
    "fault-rate": fault_rate.run,
    "faults": faults.run,
    "grep": grep.run,
    "memclone": memclone.run,
    "memclone-shared": memclone_shared.run,
    "objects": objects.run,
    "paging": paging.run,
    "remote": remote.run,
    "structures": structures.run,
    "survival": survival.run,
}
