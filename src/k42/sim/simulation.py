"""Execution on a simulated multiprocessor, of whose processors one runs at a time, in simulated time.

A processor runs on by itself while what it does concerns nobody else: computing, and hits on lines that no other one
has ever accessed. Before any other access every processor whose clock is behind comes first. So a run depends on
nothing but the program, the machine and the seed.
"""

from __future__ import annotations

import bisect
import functools
import heapq
import random
from collections.abc import Callable
from typing import TypeVar

from k42.errors import Error
from k42.sim.attribution import Cell, Ledger, Stall
from k42.sim.charging import Charger, refusals
from k42.sim.coherence import Counts, Memory
from k42.sim.machine import Machine
from k42.sim.processor import SEVERAL, Processor, here
from k42.sim.turns import MAIN, Turns, turns

_Body = Callable[[int], object]
_T = TypeVar("_T")


class Deadlock(Error):
    """All simulated processors wait for each other."""


class Simulation:
    """One run of a program on a machine.

    Args:
        machine: on what.
        processors: how many of its processors take part; None: all.
        seed: of what varies by chance: how far apart the processors start.
        check: verify the protocol of the caches after each access; slow.

    Raises:
        Error: the machine does not have so many.
    """

    def __init__(self, machine: Machine, processors: int | None = None, *, seed: int = 0, check: bool = False) -> None:
        count = machine.processors if processors is None else processors
        if not 1 <= count <= machine.processors:
            raise Error(f"{count} processors were asked for, and {machine.name} has 1 to {machine.processors}")
        self.machine = machine
        self.processors = count
        self._memory = Memory(machine, count, check=check)
        self._next_address = machine.line
        chance = random.Random(seed)
        self._clocks = [chance.randrange(machine.call) for _ in range(count)]
        self._started = list(self._clocks)
        self._line = machine.line
        self._me = MAIN  # the processor that runs
        self._ready: list[tuple[int, int]] = []  # (clock, processor), of those that can go on and do not run
        self._users: dict[int, int] = {}  # line: the processor that alone has ever accessed it, or SEVERAL
        self._spinning: dict[int, list[int]] = {}  # line: processors that look at their copy of it
        self._turns: Turns = turns([])
        self._ledger = Ledger()
        self._starts = [0]  # of what was allocated, ascending; and whose it is
        self._owners = [self._ledger.cell(self._ledger.name("elsewhere"), "", 0)]
        self._charger = Charger(self, self._ledger)
        self._processors = [Processor(self, number, self._charger.records) for number in range(count)]

    def allocate(self, size: int, *, padded: bool = False, name: str = "memory") -> int:
        """Return the address of new memory.

        Args:
            size: in bytes.
            padded: on lines of its own; else right after what was allocated last.
            name: what `stalls` calls it.
        """
        return self._allocate(size, self._ledger.cell(self._ledger.name(name), "", 0), padded=padded)

    def _allocate(self, size: int, owner: Cell | None, *, padded: bool) -> int:
        """`owner` has the cost of accesses by address; None where there are none."""
        line = self.machine.line
        if padded:
            self._next_address = -(-self._next_address // line) * line
        address = self._next_address
        self._next_address += -(-size // line) * line if padded else size
        if owner is not None:
            self._starts.append(address)
            self._owners.append(owner)
        return address

    def share(self, shared: _T, *, padded: bool = False, name: str | None = None) -> _T:
        """Charge for accesses to an object, and to all that it leads to, without a change to the code that makes them.

        Attributes of instances of classes written in Python, and elements of lists, dicts, sets, deques and arrays
        (`array`), lie in simulated memory from then on; what is stored into them during a run does so, too. A
        processor's access to them is an access to its caches. Other threads' accesses are as ever. Locks of `threading`
        become simulated ones. Instances and containers stay the objects that they are, and behave as they did, but for
        `type()`, which returns a subclass. What is written in C beyond these stays as it is, and costs nothing:
        bytearrays, too, and what C code such as `heapq` does to a list behind its methods.

        Each access stands alone: between the load and the store of `x.n += 1` other processors may have their turn, so
        that updates are lost, as on a free-threaded interpreter; but in each run the same.

        Args:
            shared: an object, a container, or a tuple of them.
            padded: put each object and each container on lines of its own; else one comes right after the other.
            name: what `stalls` calls it; None: as its class.

        Returns:
            `shared`; where that is a lock, or a tuple with one, what stands for it.

        Raises:
            Error: something in it cannot be simulated; the message says what.
        """
        return self._charger.share(shared, padded=padded, name=name)

    def unshare(self) -> None:
        """Give back its class to all that is shared: from now on its accesses cost nothing. Not during a run."""
        self._charger.unshare()

    def stalls(self) -> list[Stall]:
        """Return what the accesses to each attribute and each part of a container cost; the most expensive first."""
        return self._ledger.rows()

    def run(self, body: _Body) -> list[int]:
        """Run `body` on each processor; once.

        Args:
            body: called with the number of its processor.

        Returns:
            The cycles that each processor took.

        Raises:
            Deadlock: all wait for each other.
            BaseException: what a body raised; the others end then.
        """
        around = here.processor  # a processor of another simulation may run this one
        self._charger.refresh()
        self._turns = turns([functools.partial(self._live, body, number) for number in range(self.processors)])
        self._ready[:] = [(clock, processor) for processor, clock in enumerate(self._clocks)]
        heapq.heapify(self._ready)
        with refusals():
            try:
                while self._ready:
                    self._go_on(MAIN)
                if waiting := self._turns.waiting():
                    raise Deadlock(f"{waiting} simulated processors wait, and none is left to wake them")
            finally:
                self._ready[:] = [(-1, MAIN)]  # who still runs, on a thread of its own, comes to its end by that
                self._turns.end()
                self._me = MAIN
                here.processor = around
        return [clock - start for clock, start in zip(self._clocks, self._started, strict=True)]

    def processor(self) -> int:
        """Return the processor that runs.

        Raises:
            Error: none does.
        """
        if self._me < 0:
            raise Error("this is no processor of the simulation")
        return self._me

    def now(self) -> int:
        """Return this processor's time, in cycles."""
        return self._clocks[self.processor()]

    def work(self, cycles: int) -> None:
        """Compute for so long, on what only this processor needs."""
        self._clocks[self.processor()] += cycles

    def load(self, address: int) -> None:
        """Read a word."""
        self._access(address)

    def store(self, address: int) -> None:
        """Write a word."""
        self._access(address, write=True)

    def update(self, address: int) -> None:
        """Change a word atomically: load with a reservation, store if that still holds, else all again."""
        processor, line = self.processor(), address // self.machine.line
        while True:
            self._access(address)
            self._clocks[processor] += self.machine.atomic
            self._let_earlier(processor)
            if self._memory.is_local(processor, line):
                break
        self._access(address, write=True)

    def claim(self, address: int, size: int) -> None:
        """Make zeros of whole lines without reading them; see `Memory.claim`."""
        processor, line = self.processor(), self.machine.line
        first, end = address // line, -(-(address + size) // line)
        for number in range(first, end):
            if self._users.setdefault(number, processor) != processor:
                self._users[number] = SEVERAL
        counts, owner = self._memory.counts[processor], self._owners[bisect.bisect_right(self._starts, address) - 1]
        before = counts.accesses, counts.stalled
        for start in range(first, end, self.machine.outstanding):
            self._let_earlier(processor)
            count = min(self.machine.outstanding, end - start)
            self._clocks[processor] = self._memory.claim(processor, start, count, self._clocks[processor])
        self._clocks[processor] += self.machine.upgrade
        owner.accesses += counts.accesses - before[0]
        owner.stalled += counts.stalled - before[1]
        owner.writers |= 1 << processor

    def spin(self, address: int, until: Callable[[], bool]) -> None:
        """Look at a word until it is as wanted. Looking again costs nothing until somebody has written to its line."""
        processor, line = self.processor(), address // self.machine.line
        self.load(address)
        while not until():
            if self._memory.is_local(processor, line):
                self._spinning.setdefault(line, []).append(processor)
                self._go_on(processor)
            self.load(address)

    def counts(self) -> list[Counts]:
        """Return what the accesses of each processor came to."""
        return self._memory.counts

    def _access(self, address: int, *, write: bool = False) -> None:
        processor, line = self._me, address // self._line
        if processor < 0:
            raise Error("this is no processor of the simulation")
        owner = self._owners[bisect.bisect_right(self._starts, address) - 1]
        owner.accesses += 1
        if write:
            owner.writers |= 1 << processor
        if self._users.setdefault(line, processor) != processor:
            self._users[line] = SEVERAL
        elif latency := self._memory.hit(processor, line, write=write):
            self._clocks[processor] += latency
            return
        # Others come first whose time is earlier: they may take the line away, and the bus is everybody's.
        self._let_earlier(processor)
        self._over_the_bus(owner, processor, line, write=write)

    def _over_the_bus(self, owner: Cell, processor: int, line: int, *, write: bool) -> None:
        """Make an access to which others may have something to say, at its time."""
        counts = self._memory.counts[processor]
        before = counts.stalled
        done, lost = self._memory.access(processor, line, self._clocks[processor], write=write)
        owner.stalled += counts.stalled - before
        self._clocks[processor] = done
        if lost and line in self._spinning:
            self._wake(line, done)

    def _wake(self, line: int, when: int) -> None:
        for waiting in self._spinning.pop(line):
            self._clocks[waiting] = max(self._clocks[waiting], when)
            heapq.heappush(self._ready, (self._clocks[waiting], waiting))

    # Turns.

    def _let_earlier(self, processor: int) -> None:
        mine = (self._clocks[processor], processor)
        if self._ready and self._ready[0] < mine:
            self._switch(processor, heapq.heapreplace(self._ready, mine)[1])

    def _go_on(self, me: int) -> None:
        """Lets who comes first go on: without me, who am not ready. If there is nobody, `run` says so."""
        self._switch(me, heapq.heappop(self._ready)[1] if self._ready else MAIN)

    def _switch(self, me: int, to: int) -> None:
        self._me = to
        # Several processors may be one thread. Who comes back to be unwound pays for nothing any more.
        here.processor = None
        self._turns.switch(me, to)
        here.processor = None if me == MAIN else self._processors[me]

    def _live(self, body: _Body, number: int) -> None:
        here.processor = self._processors[number]
        body(number)
