"""A simulated processor, as the thread that is it sees it: the shortest way from an access to its cost."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from k42.sim.attribution import Cell
    from k42.sim.containers import Record
    from k42.sim.simulation import Simulation

SEVERAL = -1

# How far (cycles) a processor may be ahead of the others while its lines are its own. So a line that becomes shared has
# not been accessed long before its time; and threads are switched seldom. Less than a call to a server takes.
AHEAD = 1000


class Processor:
    """One processor of a simulation.

    Args:
        simulation: whose.
        number: from 0.
        records: what is charged, by `id`.
    """

    __slots__ = (
        "_clocks",
        "_line",
        "_memory",
        "_ready",
        "_users",
        "instructions",
        "number",
        "records",
        "simulation",
    )

    def __init__(self, simulation: Simulation, number: int, records: dict[int, Record]) -> None:
        self.simulation = simulation
        self.number = number
        self.records = records
        self.instructions = simulation.machine.instructions
        self._clocks = simulation._clocks
        self._line = simulation.machine.line
        self._memory = simulation._memory
        self._ready = simulation._ready
        self._users = simulation._users

    def access(self, address: int, cell: Cell, write: bool = False, cycles: int = 0) -> None:
        """Compute for `cycles`, then read or write the word at `address`; `cell` has the cost."""
        number = self.number
        line = address // self._line
        clocks = self._clocks
        now = clocks[number] = clocks[number] + cycles
        if self._users.setdefault(line, number) != number:
            # Others come first whose time is earlier: also at a hit, since they may take the line away.
            self._users[line] = SEVERAL
            self.simulation._let_earlier(number)
        elif self._ready and self._ready[0][0] < now - AHEAD:
            self.simulation._let_earlier(number)
        cell.accesses += 1
        if write:
            cell.writers |= 1 << number
        latency = self._memory.hit(number, line, write)
        if latency:
            clocks[number] = now + latency
            return
        done, lost = self._memory.miss(number, line, now, write)
        cell.stalled += done - now
        clocks[number] = done
        if lost:
            self.simulation._wake(line, done)

    def charge(self, cell: Cell, write: bool = False) -> None:
        """Access the word of one cell, with the computing that goes with it."""
        self.access(cell.address, cell, write, self.instructions)


class _Here(threading.local):
    processor: Processor | None = None


here = _Here()
"""`here.processor`: the processor that the calling thread is, if it is one."""


def work(cycles: int) -> None:
    """Compute for so many cycles, on the simulated processor that the calling thread is; on no other thread."""
    processor = here.processor
    if processor is not None:
        processor.simulation.work(cycles)
