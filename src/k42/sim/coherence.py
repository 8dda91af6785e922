"""Caches that are kept coherent: the MESI protocol (Papamarcos and Patel 1984), on a bus or with directories in a mesh.

Each processor has two levels of its own. A line is in the states M (one copy, which memory does not have), E (one copy)
or S (copies that are alike); where it is in no cache there is no state. Who needs the bus, or the directory of a line,
waits for it, and for the transfer of the same line that is on its way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from k42.sim.machine import Cache, Machine

_NOBODY: Sequence[int] = ()


@dataclasses.dataclass
class Counts:
    """What one processor's accesses came to."""

    accesses: int = 0
    hits: int = 0
    memory: int = 0  # lines from memory
    interventions: int = 0  # lines from another's cache
    upgrades: int = 0  # other copies invalidated, of a line that was here
    invalidated: int = 0  # copies that others took away
    evicted: int = 0  # lines that had to make room
    stalled: int = 0  # cycles beyond those of hits

    @property
    def misses(self) -> int:
        """Accesses that needed the bus."""
        return self.memory + self.interventions + self.upgrades


class _Level:
    """Which lines one level holds; the least recently used of a full set makes room."""

    __slots__ = ("_count", "_sets", "_ways")

    def __init__(self, cache: Cache, line: int) -> None:
        self._ways = cache.ways
        self._count = cache.size // (line * cache.ways)
        self._sets: dict[int, dict[int, None]] = {}  # of which most are empty

    def touch(self, line: int) -> bool:
        """Whether it is here; then it is the most recently used."""
        lines = self._sets.get(line % self._count)
        if lines is None or line not in lines:
            return False
        del lines[line]
        lines[line] = None
        return True

    def insert(self, line: int) -> int | None:
        """Put it here; returns the line that had to go."""
        place = line % self._count
        lines = self._sets.get(place)
        if lines is None:
            self._sets[place] = {line: None}
            return None
        victim = None
        if len(lines) == self._ways:
            victim = next(iter(lines))
            del lines[victim]
        lines[line] = None
        return victim

    def drop(self, line: int) -> None:
        """Take it out, if it is here."""
        if lines := self._sets.get(line % self._count):
            lines.pop(line, None)

    def holds(self, line: int) -> bool:
        """Whether it is here."""
        return line in self._sets.get(line % self._count, ())


class Memory:
    """The memory of one machine, as its processors see it.

    Args:
        machine: what accesses cost.
        processors: how many take part.
        check: verify the protocol's invariants after each access; slow.
    """

    def __init__(self, machine: Machine, processors: int, *, check: bool = False) -> None:
        self._machine = machine
        self._check = check
        self._l1 = [_Level(machine.l1, machine.line) for _ in range(processors)]
        self._l2 = [_Level(machine.l2, machine.line) for _ in range(processors)]
        self._copies: dict[int, dict[int, str]] = {}  # line: {processor: M, E or S}
        # When the bus is free; or each directory, of which there is one at each place of the mesh.
        self._free = [0] * (machine.processors if machine.hop else 1)
        self._latency = machine.l1.latency
        self._last = [-1] * processors  # line: of the latest access
        self._arrives: dict[int, int] = {}  # line: when the transfer of it that is on its way ends
        self.counts = [Counts() for _ in range(processors)]

    def is_local(self, processor: int, line: int, *, write: bool = False) -> bool:
        """Whether the access needs nothing of anybody else."""
        state = self._copies.get(line, {}).get(processor)
        return state is not None and (state != "S" or not write)

    def access(self, processor: int, line: int, now: int, *, write: bool = False) -> tuple[int, Sequence[int]]:
        """Make an access.

        Args:
            processor: whose.
            line: which line.
            now: when, in cycles. Accesses that are not local come in the order of their times.
            write: whether it is a store.

        Returns:
            When it is done, and the processors that lost their copies by it.
        """
        if latency := self.hit(processor, line, write=write):
            return now + latency, _NOBODY
        counts = self.counts[processor]
        counts.accesses += 1
        done, lost = self._over_the_bus(processor, line, now, write=write)
        counts.stalled += done - now
        if self._check:
            self.verify(line)
        return done, lost

    def hit(self, processor: int, line: int, *, write: bool = False) -> int:
        """Make an access if it needs nothing of anybody else: the cycles that it takes. 0: it does, and is not made."""
        copies = self._copies.get(line)
        state = copies.get(processor) if copies else None
        if copies is None or state is None or (write and state == "S"):
            return 0
        if write:
            copies[processor] = "M"
        counts = self.counts[processor]
        counts.accesses += 1
        counts.hits += 1
        # The last one again: it is the most recently used at both levels already.
        latency = self._latency if self._last[processor] == line else self._from_own(processor, line)
        if self._check:
            self.verify(line)
        return latency

    def claim(self, processor: int, first: int, count: int, now: int) -> int:
        """Make lines of zeros, one after the other, without reading them (the PowerPC's ``dcbz``).

        Args:
            processor: whose.
            first: the first line.
            count: how many.
            now: when, in cycles.

        Returns:
            When the bus has taken the last one.
        """
        machine, counts = self._machine, self.counts[processor]
        at = now
        for line in range(first, first + count):
            if latency := self.hit(processor, line, write=True):
                at += latency
                continue
            counts.accesses += 1
            counts.upgrades += 1
            at = self._turn(line, at, machine.bus_address) + machine.bus_address
            copies = self._copies.get(line)
            if copies:
                for other in [other for other in copies if other != processor]:
                    self._take_from(other, line)
            else:
                copies = self._copies[line] = {}
            if processor in copies:
                self._from_own(processor, line)
            else:
                self._hold(processor, line)
            copies[processor] = "M"
            if self._check:
                self.verify(line)
        counts.stalled += at - now
        return at

    def _from_own(self, processor: int, line: int) -> int:
        self._last[processor] = line
        self._l2[processor].touch(line)
        if self._l1[processor].touch(line):
            return self._machine.l1.latency
        self._l1[processor].insert(line)
        return self._machine.l2.latency

    def _over_the_bus(self, processor: int, line: int, now: int, *, write: bool) -> tuple[int, Sequence[int]]:
        machine, counts = self._machine, self.counts[processor]
        copies = self._copies.setdefault(line, {})
        others = [other for other in copies if other != processor]
        occupied = machine.bus_address + machine.bus_data
        if processor in copies:
            counts.upgrades += 1
            latency, occupied = machine.upgrade, machine.bus_address
        elif len(others) == 1 and copies[others[0]] != "S":
            counts.interventions += 1
            latency = machine.intervention
        else:
            counts.memory += 1
            latency = machine.memory
        if machine.hop:
            latency += self._messages(processor, line, others, write=write)
        done = self._turn(line, now, occupied) + latency
        lost: Sequence[int] = _NOBODY
        if write:
            for other in others:
                self._take_from(other, line)
            lost = others
            state = "M"
        else:
            for other in others:
                copies[other] = "S"
            state = "S" if others else "E"
        if processor in copies:
            self._from_own(processor, line)
        else:
            self._hold(processor, line)
        copies[processor] = state
        if state != "S":
            self._arrives[line] = done
        return done, lost

    def _turn(self, line: int, ready: int, cycles: int) -> int:
        """Take the bus, or the line's directory, for so long as soon as it is to be had: when that is."""
        place = line % len(self._free)
        start = max(ready, self._free[place], self._arrives.get(line, 0))
        self._free[place] = start + cycles
        return start

    def _messages(self, processor: int, line: int, others: list[int], *, write: bool) -> int:
        """What the ways in the mesh take: to the directory, from there to who has the line, and back."""
        distance, home = self._machine.distance, line % self._machine.processors
        there = distance(processor, home)
        alone = len(others) == 1 and self._copies[line][others[0]] != "S"
        if alone:
            return there + distance(home, others[0]) + distance(others[0], processor)
        if write and others:
            return there + max(distance(home, other) + distance(other, processor) for other in others)
        return 2 * there

    def _take_from(self, processor: int, line: int) -> None:
        del self._copies[line][processor]
        self._l1[processor].drop(line)
        self._l2[processor].drop(line)
        self.counts[processor].invalidated += 1

    def _hold(self, processor: int, line: int) -> None:
        self._last[processor] = line
        self._l1[processor].insert(line)
        victim = self._l2[processor].insert(line)
        if victim is None:
            return
        # What the second level does not hold, the first does not either. A line that memory does not have takes the
        # bus on its way there.
        self._l1[processor].drop(victim)
        copies = self._copies[victim]
        if copies.pop(processor) == "M":
            self._free[victim % len(self._free)] += self._machine.bus_address + self._machine.bus_data
        if not copies:
            del self._copies[victim]
        self.counts[processor].evicted += 1

    def copies(self, line: int) -> dict[int, str]:
        """Return who has a copy of a line, and in which state."""
        return dict(self._copies.get(line, {}))

    def verify(self, line: int) -> None:
        """Check one line: one writer, or many readers.

        Raises:
            AssertionError: the protocol is broken.
        """
        copies = self._copies.get(line, {})
        alone = [processor for processor, state in copies.items() if state in "ME"]
        if alone and len(copies) > 1:
            raise AssertionError(f"line {line} is alone at processor {alone[0]}, and in {len(copies)} caches")
        for processor in copies:
            if not self._l2[processor].holds(line):
                raise AssertionError(f"processor {processor} has line {line} in a state, and not in its cache")
