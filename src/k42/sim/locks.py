"""Locks of the simulated machine, with the traffic that they make."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Self

from k42.errors import Error
from k42.sim.processor import Processor, here

if TYPE_CHECKING:
    from k42.sim.simulation import Simulation


class _Lock:
    """What the three locks have in common."""

    _sim: Simulation
    owner: int | None

    def acquire(self) -> None:
        """Take it."""
        raise NotImplementedError

    def release(self) -> None:
        """Give it back, or to the next.

        Raises:
            RuntimeError: another has it, or nobody.
        """
        raise NotImplementedError

    def _expect_mine(self) -> int:
        """The processor that calls, which has it."""
        me = self._sim.processor()
        if self.owner != me:
            raise RuntimeError("release of a lock that this processor does not have")
        return me

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class SpinLock(_Lock):
    """Test and set: one word that who wants it sets; who finds it set looks at it until it is free, and tries again.

    Args:
        simulation: where.
        address: of the word; None: on a line of its own.
    """

    def __init__(self, simulation: Simulation, address: int | None = None) -> None:
        self._sim = simulation
        self._word = simulation.allocate(8, padded=True, name="SpinLock") if address is None else address
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
        self._expect_mine()
        self._sim.store(self._word)
        self.owner = None


class TicketLock(_Lock):
    """Two words on one line: who wants it draws a number, and looks at the other until it is its turn.

    Args:
        simulation: where.
    """

    def __init__(self, simulation: Simulation) -> None:
        self._sim = simulation
        self._word = simulation.allocate(16, padded=True, name="TicketLock")
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
        self._expect_mine()
        self._sim.store(self._word + 8)
        self.owner = None
        self._served += 1


class QueueLock(_Lock):
    """The lock of Mellor-Crummey and Scott: who waits looks at a word of its own.

    Args:
        simulation: where.
    """

    def __init__(self, simulation: Simulation) -> None:
        self._sim = simulation
        self._tail = simulation.allocate(8, padded=True, name="QueueLock")
        every = range(simulation.processors)
        self._nodes = [simulation.allocate(16, padded=True, name="QueueLock node") for _ in every]
        self._queue: deque[int] = deque()  # the owner first
        self._mine = [False] * simulation.processors

    @property
    def owner(self) -> int | None:  # type: ignore[override]
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
        me = self._expect_mine()
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


class StandIn:
    """A lock of `threading` that simulated processors share: test and set for them, for other threads the lock itself.

    Args:
        simulation: where.
        lock: what it stands for.
        address: of its word.
        again: whether who has it may take it again, as an RLock.

    Raises:
        Error: the lock is held.
    """

    def __init__(self, simulation: Simulation, lock: Any, address: int, *, again: bool) -> None:
        if not lock.acquire(blocking=False):
            raise Error("a lock that is held cannot become a simulated one: share it before, or after")
        lock.release()
        self._sim = simulation
        self._lock = lock
        self._word = address
        self._spin = SpinLock(simulation, address)
        self._again = again
        self._depth = 0

    def _processor(self) -> Processor | None:
        """The processor that calls, after the computing that goes with it."""
        processor = here.processor
        if processor is None or processor.simulation is not self._sim:
            return None
        self._sim.work(processor.instructions)
        return processor

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take it; returns whether it was taken.

        Raises:
            Error: there is a timeout.
        """
        processor = self._processor()
        if processor is None:
            return self._lock.acquire(blocking, timeout)  # type: ignore[no-any-return]
        if timeout != -1:
            raise Error("a timeout of a lock cannot be simulated: wait without, or not at all")
        if self._again and self._spin.owner == processor.number:
            self._sim.load(self._word)
            self._sim.store(self._word)
        elif blocking:
            self._spin.acquire()
        else:
            self._sim.update(self._word)
            if self._spin.owner is not None:
                return False
            self._spin.owner = processor.number
        self._depth += 1
        return True

    def release(self) -> None:
        """Give it back.

        Raises:
            RuntimeError: nobody has it; or it is an RLock, and another has it.
        """
        processor = self._processor()
        if processor is None:
            self._lock.release()
            return
        owner = self._spin.owner
        if owner is None or (self._again and owner != processor.number):
            raise RuntimeError("release of a lock that is not held")
        self._sim.store(self._word)
        self._depth -= 1
        if not self._depth:
            self._spin.owner = None

    def locked(self) -> bool:
        """Whether somebody has it."""
        if self._processor() is None:
            return self._lock.locked()  # type: ignore[no-any-return]
        self._sim.load(self._word)
        return self._spin.owner is not None

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()
