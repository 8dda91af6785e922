"""Tools to test what threads share: recorded histories and whether they are linearizable, races, pauses, flat memory.

They are what k42 tests its own structures with, and need none of them. A typical test lets threads race on a recorded
object, then asks whether one thread alone could have seen the same:

>>> from k42.structures import SharedCounter
>>> from k42.testing import History, check, race
>>> class Counting:                      # what a counter is, in one thread
...     def __init__(self):
...         self.n = 0
...     def add(self, k=1):
...         self.n += k
...     def value(self):
...         return self.n
>>> history = History()
>>> counter = history.record(SharedCounter.create())
>>> def work():
...     for _ in range(10):
...         counter.add()
...         counter.value()
>>> _ = race(work, work)
>>> len(history.operations())
40
>>> check(history, Counting)
"""

from __future__ import annotations

from k42.testing._history import History, Operation
from k42.testing._linearizability import Blocked, NotLinearizable, check
from k42.testing._memory import memory_flat
from k42.testing._threads import PausePoint, frequent_switches, race, wait_until

__all__ = [
    "Blocked",
    "History",
    "NotLinearizable",
    "Operation",
    "PausePoint",
    "check",
    "frequent_switches",
    "memory_flat",
    "race",
    "wait_until",
]
