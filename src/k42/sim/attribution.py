"""Whose accesses they were: what each attribute of each object cost, for those who ask why a program does not scale."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stall:
    """What the accesses to one attribute, or to one part of a container, came to.

    Attributes:
        kind: the object's name or class.
        number: which one of that name it is, from 1; 0 where it is the only one.
        attribute: of the object; `a.length` and `a[]` are the header and the elements of the container that `a` holds.
            Empty for memory from `Simulation.allocate`.
        accesses: how many there were.
        stalled: cycles that processors waited for them, beyond the time of hits.
        share: of all stalled cycles of the run.
        writers: how many processors wrote it.
    """

    kind: str
    number: int
    attribute: str
    accesses: int
    stalled: int
    share: float
    writers: int

    @property
    def object(self) -> str:
        """The object's name or class, with its number where there are several."""
        return f"{self.kind} {self.number}" if self.number else self.kind

    @property
    def label(self) -> str:
        """Object and attribute, as a program would write them."""
        return f"{self.object}{self._attribute}"

    @property
    def common_label(self) -> str:
        """The same for all objects of the name."""
        return f"{self.kind}{self._attribute}"

    @property
    def _attribute(self) -> str:
        return f".{self.attribute}" if self.attribute and self.attribute[0] not in "[." else self.attribute


class Named:
    """One object's name: a text, and the how many'th of that text it is."""

    __slots__ = ("number", "text")

    def __init__(self, text: str, number: int) -> None:
        self.text = text
        self.number = number


class Cell:
    """Memory whose accesses are counted together."""

    __slots__ = ("accesses", "address", "named", "part", "stalled", "writers")

    def __init__(self, named: Named, part: str, address: int) -> None:
        self.named = named
        self.part = part
        self.address = address
        self.accesses = 0
        self.stalled = 0  # cycles
        self.writers = 0  # a bit for each processor


class Ledger:
    """The cells of one simulation."""

    def __init__(self) -> None:
        self._cells: list[Cell] = []
        self._numbers: dict[str, int] = {}

    def name(self, text: str) -> Named:
        """Return a name for one more object that is called so."""
        number = self._numbers[text] = self._numbers.get(text, 0) + 1
        return Named(text, number)

    def cell(self, named: Named, part: str, address: int) -> Cell:
        """Return a new cell."""
        cell = Cell(named, part, address)
        self._cells.append(cell)
        return cell

    def rows(self) -> list[Stall]:
        """Return what was accessed; who cost most comes first."""
        sums: dict[tuple[str, int, str], tuple[int, int, int]] = {}
        for cell in self._cells:
            if cell.accesses:
                text, number = cell.named.text, cell.named.number
                key = text, number if self._numbers[text] > 1 else 0, cell.part
                accesses, stalled, writers = sums.get(key, (0, 0, 0))
                sums[key] = accesses + cell.accesses, stalled + cell.stalled, writers | cell.writers
        total = sum(stalled for _, stalled, _ in sums.values())
        rows = [
            Stall(kind, number, part, accesses, stalled, stalled / total if total else 0.0, writers.bit_count())
            for (kind, number, part), (accesses, stalled, writers) in sums.items()
        ]
        return sorted(rows, key=lambda row: (-row.stalled, row.kind, row.number, row.attribute))
