"""Execution on a simulated multiprocessor: one thread a processor, of which one runs at a time, in simulated time.

A thread runs on by itself while what it does concerns nobody else: computing, and accesses to lines that no other
processor has ever accessed, for a bounded time. Before any other access every processor whose clock is behind comes
first. So a run depends on nothing but the program, the machine and the seed.

Why threads, and not greenlets: to k42 a thread is a processor, so that Clustered Objects have their representatives by
simulated processor without further ado; and a switch is only due where a line is shared.
"""

from __future__ import annotations

import bisect
import contextlib
import heapq
import random
import threading
from collections.abc import Callable
from typing import TypeVar

from k42.errors import Error
from k42.sim.attribution import Cell, Ledger, Stall
from k42.sim.charging import Charger, refusals
from k42.sim.coherence import Counts, Memory
from k42.sim.machine import Machine
from k42.sim.processor import Processor, here

_Body = Callable[[int], object]
_T = TypeVar("_T")


class Deadlock(Error):
    """All simulated processors wait for each other."""


class _Ended(BaseException):
    """The run ends early: unwinds the threads that are left."""


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
        # Whose turn it is has the baton: a lock that it alone finds free. All else is changed only with it.
        self._batons = [threading.Lock() for _ in range(count)]
        for baton in self._batons:
            baton.acquire()
        self._ready: list[tuple[int, int]] = []  # (clock, processor), of those that can go on
        self._users: dict[int, int] = {}  # line: the processor that alone has ever accessed it, or SEVERAL
        self._spinning: dict[int, list[int]] = {}  # line: processors that look at their copy of it
        self._running = 0  # processors whose program has not ended
        self._failure: BaseException | None = None
        self._over = threading.Event()
        self._ledger = Ledger()
        self._starts = [0]  # of what was allocated, ascending; and whose it is
        self._owners = [self._ledger.cell(self._ledger.name("elsewhere"), "", 0)]
        self._charger = Charger(self, self._ledger)

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
            body: called with the number of its processor, in a thread of its own.

        Returns:
            The cycles that each processor took.

        Raises:
            Deadlock: all wait for each other.
            BaseException: what a body raised; the others end then.
        """
        self._charger.refresh()
        self._running = self.processors
        self._ready[:] = [(clock, processor) for processor, clock in enumerate(self._clocks)]
        heapq.heapify(self._ready)
        threads = [
            threading.Thread(target=self._live, args=(processor, body), name=f"k42-sim-{processor}", daemon=True)
            for processor in range(self.processors)
        ]
        with refusals():
            for thread in threads:
                thread.start()
            try:
                self._pass_on()
                self._over.wait()
            except BaseException as interrupt:
                self._end(interrupt)
            for thread in threads:
                thread.join()
        if self._failure is not None:
            raise self._failure
        return [clock - start for clock, start in zip(self._clocks, self._started, strict=True)]

    def processor(self) -> int:
        """Return the processor that this thread is.

        Raises:
            Error: it is none of this simulation.
        """
        return self._here().number

    def _here(self) -> Processor:
        processor = here.processor
        if processor is None or processor.simulation is not self:
            raise Error("this thread is no processor of the simulation")
        return processor

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

    def spin(self, address: int, until: Callable[[], bool]) -> None:
        """Look at a word until it is as wanted. Looking again costs nothing until somebody has written to its line."""
        processor, line = self.processor(), address // self.machine.line
        self.load(address)
        while not until():
            if self._memory.is_local(processor, line):
                self._spinning.setdefault(line, []).append(processor)
                self._pass_on()
                self._await_turn(processor)
            self.load(address)

    def counts(self) -> list[Counts]:
        """Return what the accesses of each processor came to."""
        return self._memory.counts

    def _access(self, address: int, *, write: bool = False) -> None:
        owner = self._owners[bisect.bisect_right(self._starts, address) - 1]
        self._here().access(address, owner, write)

    def _wake(self, line: int, when: int) -> None:
        for waiting in self._spinning.pop(line, ()):
            self._clocks[waiting] = max(self._clocks[waiting], when)
            heapq.heappush(self._ready, (self._clocks[waiting], waiting))

    # Turns.

    def _live(self, processor: int, body: _Body) -> None:
        here.processor = Processor(self, processor, self._charger.records)
        with contextlib.suppress(_Ended):
            try:
                self._await_turn(processor)
                body(processor)
                self._running -= 1
                self._pass_on()
            except _Ended:
                raise
            except BaseException as failure:
                self._end(failure)

    def _let_earlier(self, processor: int) -> None:
        if self._failure is not None:
            raise _Ended
        mine = (self._clocks[processor], processor)
        if self._ready and self._ready[0] < mine:
            following = heapq.heapreplace(self._ready, mine)[1]
            self._batons[following].release()
            self._await_turn(processor)

    def _pass_on(self) -> None:
        if self._ready:
            self._batons[heapq.heappop(self._ready)[1]].release()
        elif self._running:
            self._end(Deadlock(f"{self._running} simulated processors wait, and none is left to wake them"))
        else:
            self._over.set()

    def _await_turn(self, processor: int) -> None:
        self._batons[processor].acquire()
        if self._failure is not None:
            raise _Ended

    def _end(self, failure: BaseException) -> None:
        if self._failure is None:
            self._failure = failure
        heapq.heappush(self._ready, (-1, -1))  # who runs alone is to look, too
        for baton in self._batons:
            with contextlib.suppress(RuntimeError):  # free already
                baton.release()
        self._over.set()
