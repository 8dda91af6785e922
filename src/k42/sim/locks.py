"""Locks of the simulated machine, with the traffic that they make."""

from __future__ import annotations

from collections import deque

from k42.sim.simulation import Simulation


class SpinLock:
    """Test and set: one word that who wants it sets; who finds it set looks at it until it is free, and tries again.

    Args:
        simulation: where.
        address: of the word; None: on a line of its own.
    """

    def __init__(self, simulation: Simulation, address: int | None = None) -> None:
        self._sim = simulation
        self._word = simulation.allocate(8, padded=True) if address is None else address
        self.owner: int | None = None

    def acquire(self) -> None:
        """Take it."""
        sim = self._sim
        while True:
            sim.update(self._word)
            if self.owner is None:
                self.owner = sim.processor()
                return
            sim.spin(self._word, lambda: self.owner is None)

    def release(self) -> None:
        """Give it back.

        Raises:
            RuntimeError: another has it, or nobody.
        """
        if self.owner != self._sim.processor():
            raise RuntimeError("release of a lock that this processor does not have")
        self._sim.store(self._word)
        self.owner = None

    def __enter__(self) -> SpinLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class TicketLock:
    """Two words on one line: who wants it draws a number, and looks at the other until it is its turn.

    Args:
        simulation: where.
    """

    def __init__(self, simulation: Simulation) -> None:
        self._sim = simulation
        self._word = simulation.allocate(16, padded=True)
        self._drawn = self._served = 0
        self.owner: int | None = None

    def acquire(self) -> None:
        """Take it."""
        self._sim.update(self._word)
        mine, self._drawn = self._drawn, self._drawn + 1
        self._sim.spin(self._word + 8, lambda: self._served == mine)
        self.owner = self._sim.processor()

    def release(self) -> None:
        """Give it to the next.

        Raises:
            RuntimeError: another has it, or nobody.
        """
        if self.owner != self._sim.processor():
            raise RuntimeError("release of a lock that this processor does not have")
        self._sim.store(self._word + 8)
        self.owner = None
        self._served += 1

    def __enter__(self) -> TicketLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class QueueLock:
    """The lock of Mellor-Crummey and Scott: who waits looks at a word of its own.

    Args:
        simulation: where.
    """

    def __init__(self, simulation: Simulation) -> None:
        self._sim = simulation
        self._tail = simulation.allocate(8, padded=True)
        self._nodes = [simulation.allocate(16, padded=True) for _ in range(simulation.processors)]
        self._queue: deque[int] = deque()  # the owner first
        self._mine = [False] * simulation.processors

    @property
    def owner(self) -> int | None:
        """The processor that has it."""
        return self._queue[0] if self._queue and self._mine[self._queue[0]] else None

    def acquire(self) -> None:
        """Take it."""
        sim = self._sim
        me = sim.processor()
        sim.store(self._nodes[me])
        sim.update(self._tail)
        self._queue.append(me)
        if len(self._queue) == 1:
            self._mine[me] = True
            return
        sim.store(self._nodes[self._queue[-2]])
        sim.spin(self._nodes[me] + 8, lambda: self._mine[me])

    def release(self) -> None:
        """Give it to the next.

        Raises:
            RuntimeError: another has it, or nobody.
        """
        sim = self._sim
        me = sim.processor()
        if self.owner != me:
            raise RuntimeError("release of a lock that this processor does not have")
        sim.load(self._nodes[me])
        if len(self._queue) == 1:
            sim.update(self._tail)
            if len(self._queue) == 1:
                self._mine[me] = False
                self._queue.popleft()
                return
        follower = self._queue[1]
        sim.store(self._nodes[follower] + 8)
        self._mine[me] = False
        self._queue.popleft()
        self._mine[follower] = True

    def __enter__(self) -> QueueLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
