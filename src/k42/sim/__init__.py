"""The simulated multiprocessor, and the models that are to run on it.

So far a program says itself what it accesses (`Simulation.load`, `Simulation.store`, `Simulation.update`).
"""

from __future__ import annotations

from k42.sim.coherence import Counts
from k42.sim.locks import QueueLock, SpinLock, TicketLock
from k42.sim.machine import MACHINES, S85, Cache, Machine, load
from k42.sim.simulation import Deadlock, Simulation

__all__ = [
    "MACHINES",
    "S85",
    "Cache",
    "Counts",
    "Deadlock",
    "Machine",
    "QueueLock",
    "Simulation",
    "SpinLock",
    "TicketLock",
    "load",
]
