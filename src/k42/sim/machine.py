"""Descriptions of multiprocessors: what an access costs, and what is shared by whom. A machine is data."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

from k42.errors import Error


@dataclasses.dataclass(frozen=True)
class Cache:
    """One level of a processor's own caches.

    Attributes:
        size: in bytes.
        ways: how many lines of one set it holds.
        latency: of a hit, in cycles.
    """

    size: int
    ways: int
    latency: int


@dataclasses.dataclass(frozen=True)
class Machine:
    """A multiprocessor whose caches are kept coherent: by snooping on one bus, or by directories in a mesh.

    In a mesh each processor stands at a place of its own, with the memory and the directory of an equal share of the
    lines; messages take time for each step from place to place. All times are in cycles.

    Attributes:
        name: what it is called.
        processors: how many there are at most.
        mhz: cycles in a microsecond.
        line: bytes of a cache line.
        l1: first level, for data.
        l2: second level, which holds what the first holds.
        memory: until a line comes from memory.
        intervention: until a line comes from the cache of a processor that has it alone.
        upgrade: until the other copies of a line that is written to are invalid.
        bus_address: how long a transaction keeps the bus, or the directory of its line, from others, without data.
        bus_data: how much longer a line keeps it.
        outstanding: how many stores of a processor are on their way at a time.
        atomic: between the load and the store of an atomic change.
        call: of a round trip to a server in another address space, on one processor.
        jitter: how much longer or shorter a call may be, by chance.
        instructions: computing that goes with one access to what `Simulation.share` charges for.
        hop: of a message in the mesh, from one place to the next; 0: there is a bus.
    """

    name: str
    processors: int
    mhz: int
    line: int
    l1: Cache
    l2: Cache
    memory: int
    intervention: int
    upgrade: int
    bus_address: int
    bus_data: int
    outstanding: int
    atomic: int
    call: int
    jitter: int
    instructions: int = 4
    hop: int = 0

    def __post_init__(self) -> None:
        for level in ("l1", "l2"):
            cache: Cache = getattr(self, level)
            if cache.ways < 1 or cache.size < self.line * cache.ways or cache.size % (self.line * cache.ways):
                raise Error(f"machine {self.name}: {level} is no whole number of sets of {cache.ways} lines")
        for name in ("processors", "mhz", "line", "memory", "intervention", "upgrade", "bus_address", "outstanding"):
            if getattr(self, name) < 1:
                raise Error(f"machine {self.name}: {name} is at least 1")
        for name in ("instructions", "hop"):
            if getattr(self, name) < 0:
                raise Error(f"machine {self.name}: {name} is at least 0")

    def distance(self, one: int, other: int) -> int:
        """Return the cycles of a message from one processor's place in the mesh to another's."""
        if not self.hop:
            return 0
        columns = math.isqrt(self.processors - 1) + 1
        rows, places = abs(one // columns - other // columns), abs(one % columns - other % columns)
        return self.hop * (rows + places)


S85 = Machine(
    name="s85",
    processors=24,
    mhz=600,
    line=128,
    l1=Cache(size=128 << 10, ways=2, latency=1),
    l2=Cache(size=8 << 20, ways=4, latency=10),
    memory=250,
    intervention=300,
    upgrade=100,
    bus_address=13,
    bus_data=20,
    outstanding=8,
    atomic=10,
    call=1193,
    jitter=80,
    instructions=4,
)
"""The machine of the paper (section 5.1.1): IBM pSeries 680, 24 RS64-IV of 600 MHz, bus with distributed snooping,
128 KB two-way first-level data cache with lines of 128 bytes; a call to a server takes 1193 cycles (section 1.1).

Not in the paper: the second level's size, ways and latency; the latencies of memory and of other caches; the bus, and
how many stores wait for it; that calls are not all alike. They are estimates, fitted on figure 1 alone: with 24
processors a call takes 19, 12 and 6 times as long (lock, atomic, array), as in the paper. The least certain is the
atomic variant, which fails over and over where all want the line at once: a bus that is a tenth faster or slower makes
9 or 16 of its 12.

About one instruction in three accesses memory (Hennessy and Patterson), and more than half of those the stack: some
four others, of a cycle each, go with one that does not."""

MANYCORE = Machine(
    name="manycore",
    processors=128,
    mhz=3000,
    line=64,
    l1=Cache(size=64 << 10, ways=4, latency=4),
    l2=Cache(size=1 << 20, ways=8, latency=11),
    memory=240,
    intervention=80,
    upgrade=40,
    bus_address=4,
    bus_data=0,
    outstanding=16,
    atomic=10,
    call=1500,
    jitter=100,
    hop=3,
)
"""A server of today in one chip: 128 processors in a mesh, with directories.

The caches are those of Arm's Neoverse N1 (technical reference manual: 64 KB of four ways for data, 1 MB of eight ways,
4 and 11 cycles). The rest are estimates: that memory takes some 90 ns and a line of another processor some 40, as is
measured on such servers, and that a mesh takes a few cycles a step. No figure of the paper went into it."""

MACHINES = {machine.name: machine for machine in (S85, MANYCORE)}


def load(name: str | Path) -> Machine:
    """Return a machine by its name, or by the TOML file that describes it.

    The file gives values for the attributes of `Machine`; with ``like = "s85"`` it gives those that differ.

    Raises:
        Error: there is no such machine or file, or it is not a machine's description.
    """
    if str(name) in MACHINES:
        return MACHINES[str(name)]
    path = Path(name)
    if path.suffix != ".toml":
        raise Error(f"there is no machine {str(name)!r}; there are {', '.join(MACHINES)}, or FILE.toml")
    try:
        with path.open("rb") as file:
            described: dict[str, Any] = tomllib.load(file)
        for level in ("l1", "l2"):
            if level in described:
                described[level] = Cache(**described[level])
        like = described.pop("like", None)
        described.setdefault("name", path.stem)
        return Machine(**described) if like is None else dataclasses.replace(load(like), **described)
    except OSError as error:
        raise Error(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise Error(f"{path} does not describe a machine: {error}") from error
