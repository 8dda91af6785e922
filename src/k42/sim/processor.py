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
        cell.accesses += 1
        if write:
            cell.writers |= 1 << number
        if self._users.setdefault(line, number) != number:
            self._users[line] = SEVERAL
        elif not self._ready or self._ready[0][0] >= now - AHEAD:
            latency = self._memory.hit(number, line, write=write)
            if latency:
                clocks[number] = now + latency
                return
        # Others come first whose time is earlier: they may take the line away, and the bus is everybody's.
        self.simulation._let_earlier(number)
        self.simulation._over_the_bus(cell, number, line, write=write)

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
