"""What an experiment finds: samples of one case, the record that sums them up, and its form in JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from k42.errors import Error

PAGE = 4096  # bytes: what Linux maps at a time, and so the distance of touches
PAGE_SIZES = (PAGE, 16 * PAGE)  # bytes: of the mappings that are compared


@dataclasses.dataclass(frozen=True)
class Record:
    """One finding, as one line of JSON.

    Attributes:
        experiment: its name, as in `k42 experiment NAME`.
        machine: `real`.
        implementation: what was measured.
        processors: how many worked at the same time.
        metric: what `value` is, such as `time_per_page`.
        unit: of `value` and `spread`.
        value: the median of the runs.
        runs: how many there were.
        spread: the interquartile range of the runs.
        parameters: what else tells this record from others of the experiment.
    """

    experiment: str
    machine: str
    implementation: str
    processors: int
    metric: str
    unit: str
    value: float
    runs: int
    spread: float
    parameters: Mapping[str, int]

    @classmethod
    def of(
        cls,
        values: Sequence[float],
        *,
        experiment: str,
        implementation: str,
        processors: int,
        metric: str,
        unit: str,
        parameters: Mapping[str, int],
    ) -> Record:
        """Sum the values of the runs up; the rest is as it is here."""
        quarter, median, three_quarters = statistics.quantiles(values, n=4, method="inclusive")
        return cls(
            experiment=experiment,
            machine="real",
            implementation=implementation,
            processors=processors,
            metric=metric,
            unit=unit,
            value=median,
            runs=len(values),
            spread=three_quarters - quarter,
            parameters=parameters,
        )

    def to_json(self) -> str:
        """The record as one line of JSON, without the line's end."""
        return json.dumps(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure: `measure` runs it once and returns its value."""

    implementation: str
    processors: int
    parameters: Mapping[str, int]
    measure: Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Samples:
    """The values of one case, one a round."""

    case: Case
    values: list[float]

    def record(self, experiment: str, metric: str, unit: str) -> Record:
        """Sum the samples up."""
        return Record.of(
            self.values,
            experiment=experiment,
            implementation=self.case.implementation,
            processors=self.case.processors,
            metric=metric,
            unit=unit,
            parameters=self.case.parameters,
        )

    def ratio(self, other: Samples) -> float:
        """The median of the rounds' quotients: what was noisy in a round was so for both."""
        return statistics.median(a / b for a, b in zip(self.values, other.values, strict=True))


def find(samples: Iterable[Samples], implementation: str, processors: int, page_size: int) -> Samples | None:
    """The samples of one case; None if it was not measured."""
    wanted = (implementation, processors, page_size)
    for each in samples:
        case = each.case
        if (case.implementation, case.processors, case.parameters["page_size"]) == wanted:
            return each
    return None


def compared(samples: Sequence[Samples]) -> list[str]:
    """What to read from an experiment of `linux` and `k42`: ratios, a line each."""
    lines = []
    counts = sorted({each.case.processors for each in samples})
    for page_size in PAGE_SIZES:
        name = f"k42 ({page_size // 1024} KiB)"
        own = [(count, find(samples, "k42", count, page_size)) for count in counts]
        for count, each in own:
            if each and (linux := find(samples, "linux", count, PAGE)):
                lines.append(f"{name} / linux, {count} proc. = {each.ratio(linux):.2f}")
        (few, one), (many, all_of) = own[0], own[-1]
        if many > few and one and all_of:
            lines.append(f"{name}, {many} proc. / {few} proc. = {all_of.ratio(one):.2f}")
    return lines


def write_json(records: Sequence[Record], path: Path) -> None:
    """Write the records to a file, one a line.

    Raises:
        Error: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(record.to_json() + "\n" for record in records))
    except OSError as error:
        raise Error(f"the records could not be written: {error}") from error
