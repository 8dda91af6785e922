"""The interval maps of `k42.structures`: which interval a key is in, and what they refuse (section 4.1, figure 5)."""

from __future__ import annotations

from collections.abc import Iterator
from operator import index
from typing import Generic, NamedTuple, TypeVar

V = TypeVar("V")


def bound(n: int) -> int:
    """Return `n`, if it fits 64 bits without a sign.

    Raises:
        TypeError: it is no integer.
        OverflowError: it does not fit.
    """
    n = index(n)
    if not 0 <= n < 2**64:
        raise OverflowError(n)
    return n


class Interval(NamedTuple, Generic[V]):
    """The keys from `start` to `end`, exclusive, lead to `value`."""

    start: int
    end: int
    value: V


class IntervalMap(Generic[V]):
    """Disjoint intervals of integers of 64 bits.

    Where copies are kept is not the model's business: `SharedIntervalMap` and `ReplicatedIntervalMap` do the same.
    """

    def __init__(self) -> None:
        self.intervals: list[Interval[V]] = []

    def insert(self, start: int, end: int, value: V) -> None:
        """Add an interval.

        Raises:
            TypeError: a bound is no integer.
            OverflowError: a bound does not fit 64 bits without a sign.
            ValueError: the interval is empty, or overlaps another.
        """
        start, end = bound(start), bound(end)
        if start >= end or any(start < other.end and other.start < end for other in self.intervals):
            raise ValueError
        self.intervals.append(Interval(start, end, value))

    def find(self, key: int) -> Interval[V] | None:
        """Return the interval that contains the key, if there is one.

        Raises:
            TypeError: the key is no integer.
        """
        key = index(key)
        return next((interval for interval in self.intervals if interval.start <= key < interval.end), None)

    def remove(self, start: int) -> V:
        """Remove the interval that starts there, and return its value.

        Raises:
            TypeError: the start is no integer.
            KeyError: no interval starts there.
        """
        start = index(start)
        for interval in self.intervals:
            if interval.start == start:
                self.intervals.remove(interval)
                return interval.value
        raise KeyError

    def __getitem__(self, key: int) -> V:
        """Return the value of the interval that contains the key.

        Raises:
            KeyError: there is none.
        """
        interval = self.find(key)
        if interval is None:
            raise KeyError
        return interval.value

    def __contains__(self, key: int) -> bool:
        return self.find(key) is not None

    def __len__(self) -> int:
        return len(self.intervals)

    def __iter__(self) -> Iterator[Interval[V]]:
        return iter(sorted(self.intervals, key=lambda interval: interval.start))


class SharedIntervalMap(IntervalMap[V]):
    """One tree."""


class ReplicatedIntervalMap(IntervalMap[V]):
    """A master, and what each processor has copied of it."""
