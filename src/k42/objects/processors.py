"""Processors: dense slots, each owned by one live thread.

A thread takes one at its first call on a reference and gives it back at its end; the next thread that takes
it goes on with the representatives that it finds there. So there are as many as threads ever ran at the same
time, and nothing is lost or multiplied when threads come and go. Section 2.2 of the paper.

A processor is a slot for a thread, not a CPU: `pin` binds the two.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from k42._native import current_cpu as cpu
from k42._native import current_processor as current
from k42._native import processor_count as count

__all__ = ["Topology", "count", "cpu", "current", "node", "pin", "topology"]

_NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True)
class Topology:
    """The CPUs that this process may use.

    Attributes:
        cpus: their numbers, sorted.
        nodes: for each NUMA node that has any of them, by node number, the numbers of those CPUs, sorted.
    """

    cpus: tuple[int, ...]
    nodes: dict[int, tuple[int, ...]]


def topology() -> Topology:
    """Return the CPUs that the calling thread may use, and their NUMA nodes.

    Where the system does not tell the nodes, all CPUs are of node 0.

    >>> from k42 import processors
    >>> topology = processors.topology()
    >>> sorted(cpu for cpus in topology.nodes.values() for cpu in cpus) == list(topology.cpus)
    True
    """
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    nodes = {
        number: mine
        for number, all_cpus in _system_nodes().items()
        if (mine := tuple(c for c in all_cpus if c in cpus))
    }
    listed = {c for mine in nodes.values() for c in mine}
    if rest := tuple(c for c in cpus if c not in listed):
        nodes[0] = tuple(sorted((*nodes.get(0, ()), *rest)))
    return Topology(cpus, dict(sorted(nodes.items())))


def node(cpu_number: int | None = None) -> int:
    """Return the NUMA node of a CPU; without one, of the CPU on which the calling thread runs now."""
    if cpu_number is None:
        cpu_number = cpu()
    for number, cpus in _system_nodes().items():
        if cpu_number in cpus:
            return number
    return 0


def pin(cpu_number: int | None = None) -> int:
    """Bind the calling thread to one CPU, and return its number.

    Args:
        cpu_number: which one; None takes the thread's processor id modulo the CPUs that it may use, so that as many
            threads as there are CPUs get one each.

    Raises:
        ValueError: the thread may not use this CPU.

    `os.sched_setaffinity(0, processors.topology().cpus)`, with a topology that was asked for before, undoes it.
    """
    allowed = sorted(os.sched_getaffinity(0))
    chosen = allowed[current() % len(allowed)] if cpu_number is None else cpu_number
    if chosen not in allowed:
        raise ValueError(f"this thread may use the CPUs {allowed}, not CPU {chosen}")
    os.sched_setaffinity(0, {chosen})
    return chosen


def _system_nodes() -> dict[int, tuple[int, ...]]:
    """The CPUs of each NUMA node of the machine; read once."""
    if not _nodes:
        for path in _NODES.glob("node[0-9]*"):
            try:
                _nodes[int(path.name[4:])] = _listed((path / "cpulist").read_text())
            except OSError:
                continue
    return _nodes


_nodes: dict[int, tuple[int, ...]] = {}


def _listed(text: str) -> tuple[int, ...]:
    """The numbers in a list such as 0-3,8."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            numbers.extend(range(int(first), int(last or first) + 1))
    return tuple(numbers)
