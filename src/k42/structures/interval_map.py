"""Interval maps: disjoint ranges of integers to values; one interface, and two implementations (4.1, figure 5).

An interval map is what a Process of the paper keeps its regions in: a fault looks up the address, and finds the region
around it. Ranges that are looked up often and changed seldom are what it is for: address ranges, blocks of a file,
spans of time, shards of a key space. A look-up takes time logarithmic in the number of intervals, where the paper's
lists took linear time.

`IntervalMap.create()` makes a `ReplicatedIntervalMap`. The five questions of section 3.2, of this one:

- What is local: a replica for each processor, a tree of copies of the intervals that were looked up there. Look-ups
  that find a copy take no lock, and write nothing but the reference count of the value that they return.
- What is shared: the master, a tree of all intervals under a lock.
- How representatives are made and join: the first call on a processor makes an empty replica. Each first look-up of an
  interval takes the master's lock and copies it; so does each look-up of a key that is in none.
- How local and global operations synchronise: a removal holds the master's lock, marks the copies of the interval on
  all processors as dead, and then removes it. A look-up reads the mark: it comes before the removal, or it goes to the
  master, and comes after it. So the map is linearizable. Inserting touches the master alone.
- How representatives are organised: each interval of the master lists its copies. Dead copies go when their owner
  meets them, and at the latest when they are more than half of a replica.

`SharedIntervalMap` is one tree under one lock: the non-distributed list of figure 5, with logarithmic look-up.

The representatives are native, and a call on the reference goes straight to them. `k42.sim.models.interval_map` says in
plain Python what they do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Generic, Self, TypeVar, cast, final

from k42 import _native
from k42._native import Interval
from k42.objects import DistributedRoot, Object, SharedRoot
from k42.structures._native_rep import represented_by

__all__ = ["IMPLEMENTATIONS", "Interval", "IntervalMap", "ReplicatedIntervalMap", "SharedIntervalMap"]

_V = TypeVar("_V")


class IntervalMap(Object, Generic[_V]):
    """Disjoint half-open intervals of integers from 0 to 2**64 - 1, each with a value.

    Every operation takes effect at one moment between its call and its return. Values can be anything, and are not
    looked at. The map keeps a value alive while it is there; one that is removed is released at once, unless other
    threads are within calls, which might be looking it up: then some later removal by the same thread releases it.

    For an implementation of your own, derive from this class. Sections 4.1 and 4.4 of the paper.

    >>> import k42
    >>> from k42.structures import IntervalMap
    >>> regions = IntervalMap.create()
    >>> regions.insert(0x1000, 0x3000, "text")
    >>> regions.insert(0x3000, 0x8000, "data")
    >>> regions[0x2fff], 0x8000 in regions, len(regions)
    ('text', False, 2)
    >>> regions.find(0x3000)
    k42.structures.Interval(start=12288, end=32768, value='data')
    >>> regions.insert(0x2000, 0x4000, "overlap")
    Traceback (most recent call last):
    ValueError: [8192, 16384) overlaps [4096, 12288), which is there: remove that first
    >>> regions.remove(0x1000)
    'text'
    >>> [interval.start for interval in regions]
    [12288]
    >>> k42.destroy(regions)
    True
    """

    __slots__ = ()

    transfers: ClassVar[tuple[str, ...]] = ("intervals",)  # a list of start, end and value

    @classmethod
    def create(cls) -> Self:
        """Create an empty map and return the reference to it; `IntervalMap` itself: a `ReplicatedIntervalMap`."""
        if cls is IntervalMap:
            return cast(Self, ReplicatedIntervalMap.create())
        return super().create()

    def insert(self, start: int, end: int, value: _V, /) -> None:
        """Let the keys from `start` to `end`, exclusive, lead to `value`.

        Raises:
            ValueError: `start` is not less than `end`, or the interval overlaps one that is there, which the message
                names; nothing was changed.
            OverflowError: `start` or `end` is less than 0, or 2**64 or more; nothing was changed.
            TypeError: they are no integers.
            Destroyed: the map has been destroyed.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define insert()")

    def find(self, key: int, /) -> Interval[_V] | None:
        """Return the interval that contains `key`: its `start`, `end` and `value`; None when there is none.

        Raises:
            TypeError: `key` is no integer.
            Destroyed: the map has been destroyed.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define find()")

    def remove(self, start: int, /) -> _V:
        """Remove the interval that starts at `start`, all of it, and return its value.

        Look-ups that begin after this has returned do not find it, on any processor.

        Raises:
            KeyError: no interval starts there.
            TypeError: `start` is no integer.
            Destroyed: the map has been destroyed.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define remove()")

    def __getitem__(self, key: int, /) -> _V:
        """Return the value of the interval that contains `key`; raises KeyError when there is none."""
        found = self.find(key)
        if found is None:
            raise KeyError(key)
        return found.value

    def __contains__(self, key: int, /) -> bool:
        return self.find(key) is not None

    def __len__(self) -> int:
        """Return how many intervals there are."""
        raise NotImplementedError(f"{type(self).__qualname__} must define __len__()")

    def __iter__(self) -> Iterator[Interval[_V]]:
        """Iterate over the intervals as they are now, in order; later changes are not seen."""
        raise NotImplementedError(f"{type(self).__qualname__} must define __iter__()")


class _Native:
    """What the roots have in common."""

    map: _native.SharedIntervalMap | _native.ReplicatedIntervalMap

    def create_rep(self) -> _native.IntervalMapRep:
        """Return a new representative: the one of all processors, or the calling processor's replica."""
        return self.map.join()

    def export_state(self, form: str) -> list[Interval[Any]]:
        """Return all intervals, in order."""
        return self.map.intervals()

    def import_state(self, form: str, state: Iterable[tuple[int, int, Any]]) -> None:
        """Insert these intervals into a map that is new."""
        for start, end, value in state:
            self.map.insert(start, end, value)


@final
@represented_by(_native.IntervalMapRep)
class SharedIntervalMap(IntervalMap[_V]):
    """One tree under one lock: the non-distributed Process of figure 5."""

    __slots__ = ()

    class Root(_Native, SharedRoot):
        """The tree."""

        def __init__(self) -> None:
            self.map = _native.SharedIntervalMap()


@final
@represented_by(_native.IntervalMapRep)
class ReplicatedIntervalMap(IntervalMap[_V]):
    """A copy of each interval on each processor that has looked it up: the distributed Process of figure 5."""

    __slots__ = ()

    class Root(_Native, DistributedRoot):
        """The master."""

        def __init__(self) -> None:
            self.map = _native.ReplicatedIntervalMap()


IntervalMap._default = ReplicatedIntervalMap
IMPLEMENTATIONS: tuple[type[IntervalMap[Any]], ...] = (SharedIntervalMap, ReplicatedIntervalMap)
