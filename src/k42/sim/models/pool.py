"""The pools of `k42.structures`: which item each take gets, and what they refuse (section 4.2 of the paper, figure 7).

Who waits is no matter of the model: it runs one step at a time, so nothing comes while it waits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Exhausted(Exception):
    """All items are taken, and there may be no more."""


class Pool(ABC, Generic[T]):
    """Items that processors take and give back."""

    def __init__(
        self, factory: Callable[[], T] | None = None, items: Iterable[T] = (), capacity: int | None = None
    ) -> None:
        self.factory = factory
        self.capacity = capacity
        self.items = list(items)  # all
        self.shared = list(self.items)  # the free ones in the list of all, the last to go first

    @abstractmethod
    def take(self, processor: int) -> T:
        """Return an item, on this processor.

        Raises:
            Exhausted: there is none, and may be no other.
        """

    @abstractmethod
    def give_back(self, processor: int, item: T) -> None:
        """Let others have an item, on this processor.

        Raises:
            ValueError: it is no item of the pool, or free.
        """

    @abstractmethod
    def free_items(self) -> list[T]:
        """Return the items that are free."""

    def stat(self) -> tuple[int, int, int, int]:
        """Return how many items there are, taken, free in the lists of processors, free in the list of all."""
        free, shared = len(self.free_items()), len(self.shared)
        return len(self.items), len(self.items) - free, free - shared, shared

    def make(self) -> T:
        """Return a new item."""
        if self.factory is None or (self.capacity is not None and len(self.items) >= self.capacity):
            raise Exhausted
        item = self.factory()
        if any(item is other for other in self.items):
            raise ValueError(item)
        self.items.append(item)
        return item

    def check_taken(self, item: T) -> None:
        """Raise ValueError unless this is an item of the pool that is taken."""
        if all(item is not other for other in self.items) or any(item is other for other in self.free_items()):
            raise ValueError(item)


class SharedPool(Pool[T]):
    """One list for all processors."""

    def take(self, processor: int) -> T:  # noqa: D102 - as in Pool
        return self.shared.pop() if self.shared else self.make()

    def give_back(self, processor: int, item: T) -> None:  # noqa: D102
        self.check_taken(item)
        self.shared.append(item)

    def free_items(self) -> list[T]:  # noqa: D102
        return self.shared


class DistributedPool(Pool[T]):
    """A list for each processor, of at most `cap` items; chunks of half a `cap` move between it and the list of all."""

    def __init__(
        self,
        factory: Callable[[], T] | None = None,
        items: Iterable[T] = (),
        capacity: int | None = None,
        cap: int = 64,
    ) -> None:
        super().__init__(factory, items, capacity)
        self.cap = cap
        self.chunk = max(1, cap // 2)
        self.local: dict[int, list[T]] = {}  # by processor, in the order of their first calls

    def take(self, processor: int) -> T:  # noqa: D102
        mine = self.local.setdefault(processor, [])
        if not mine:
            move(self.shared, mine, self.chunk)
        if not mine:
            fullest = max(reversed(self.local.values()), key=len)
            move(fullest, mine, min(self.chunk, (len(fullest) + 1) // 2))
        return mine.pop() if mine else self.make()

    def give_back(self, processor: int, item: T) -> None:  # noqa: D102
        mine = self.local.setdefault(processor, [])
        self.check_taken(item)
        if len(mine) == self.cap:
            move(mine, self.shared, self.chunk)
        mine.append(item)

    def free_items(self) -> list[T]:  # noqa: D102
        return sum(self.local.values(), self.shared)


def move(source: list[T], target: list[T], most: int) -> None:
    """Move items from the end of one list to that of another, one by one."""
    for _ in range(min(most, len(source))):
        target.append(source.pop())
