"""The counters of `k42.structures`: what each counts, and what it refuses (section 1.1 of the paper, figure 1)."""

from __future__ import annotations

from abc import ABC, abstractmethod

LEAST, MOST = -(2**63), 2**63 - 1


def fitting(n: int) -> int:
    """Return `n`, if it fits 64 bits with a sign.

    Raises:
        OverflowError: it does not.
    """
    if not LEAST <= n <= MOST:
        raise OverflowError(n)
    return n


def number(k: object) -> int:
    """Return `k`, if it is an int of 64 bits that is no bool.

    Raises:
        TypeError: it is something else.
        OverflowError: it does not fit.
    """
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(k)
    return fitting(k)


class Counter(ABC):
    """A count that processors add to."""

    @abstractmethod
    def add(self, processor: int, k: int = 1) -> None:
        """Count `k` more, on this processor."""

    @abstractmethod
    def value(self) -> int:
        """Return the count."""


class SharedCounter(Counter):
    """One count for all processors, which adds change one after the other."""

    def __init__(self, start: int = 0) -> None:
        self.count = number(start)

    def add(self, processor: int, k: int = 1) -> None:  # noqa: D102 - as in Counter
        self.count = fitting(self.count + number(k))

    def value(self) -> int:  # noqa: D102
        return self.count


class AtomicCounter(SharedCounter):
    """The same: what orders the adds is not the model's business."""


class DistributedCounter(Counter):
    """A part for each processor, on which it is alone."""

    def __init__(self, start: int = 0) -> None:
        self.start = number(start)
        self.parts: dict[int, int] = {}

    def add(self, processor: int, k: int = 1) -> None:  # noqa: D102
        self.parts[processor] = fitting(self.parts.get(processor, 0) + number(k))

    def value(self) -> int:  # noqa: D102
        return fitting(self.start + sum(self.parts.values()))


class PackedCounter(DistributedCounter):
    """The same: which parts share a cache line is not the model's business."""
