"""The simulated multiprocessor: does a program scale on machines that one does not have, and if not, why not?

`scale` runs a function on ever more simulated processors, and says which attribute of which object they wait for. A
`Simulation` is one such run; what it charges for is told with `Simulation.share`, or access by access.
"""

from __future__ import annotations

from k42.sim.attribution import Stall
from k42.sim.coherence import Counts
from k42.sim.locks import QueueLock, SpinLock, TicketLock
from k42.sim.machine import MACHINES, MANYCORE, S85, Cache, Machine, load
from k42.sim.processor import work
from k42.sim.scale import Scaling, scale
from k42.sim.simulation import Deadlock, Simulation

__all__ = [
    "MACHINES",
    "MANYCORE",
    "S85",
    "Cache",
    "Counts",
    "Deadlock",
    "Machine",
    "QueueLock",
    "Scaling",
    "Simulation",
    "SpinLock",
    "Stall",
    "TicketLock",
    "load",
    "scale",
    "work",
]
