"""Pools: items that whoever needs one takes and gives back, as the Global Page Manager does with frames (section 4.2).

`Pool.create()` makes a `DistributedPool`, from which threads on any number of processors take without waiting for each
other. The items are any objects: buffers, connections, parsers; what a pool is for is that they are dear to make, or
that there must not be more of them.

The five questions of section 3.2, of `DistributedPool` (the right-hand side of figure 7):

- What is local: a list of free items for each processor, of at most `cap`. Its owner takes and gives there without a
  lock, and without writing to any cache line but those of the list and of the item's own record.
- What is shared: the list of the root, which takes what overflows; the roster of all items, which is only read when
  an item comes back; and the factory. Items move between a processor's list and the root's in chunks of half a `cap`.
- How representatives are made and join: the first call on a processor makes its list, which is empty. A thread that
  takes over a processor goes on with the list that it finds.
- How local and global operations synchronise: by a lock that is biased to the owner of a list. Whoever needs the lists
  of others (to take from them, to count) closes the pool for some microseconds, in which all go by the root's lock.
- How representatives are organised: in a list, each on cache lines of its own.

No item is stranded: a processor that finds its own list and the root's empty takes half of the fullest list that there
is, before a new item is made, and nobody is refused while an item is free anywhere. So where there are fewer free items
than processors, they wander, and taking costs some microseconds; and while somebody waits, every item that comes back
goes to who has waited longest, by way of the root's lock.

`SharedPool` (the left-hand side of figure 7) has one representative and one list under one lock: all is global.

The representatives are native, and a call on the reference goes straight to them. `k42.sim.models.pool` says in plain
Python what they do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Generic, Self, TypeVar, cast, final

from k42 import _native
from k42._native import PoolStat
from k42.objects import DistributedRoot, Object, Root, SharedRoot
from k42.structures._native_rep import represented_by

__all__ = ["IMPLEMENTATIONS", "DistributedPool", "Pool", "PoolStat", "SharedPool"]

_T = TypeVar("_T")


class Pool(Object, Generic[_T]):
    """Items to take and to give back; it keeps them alive, and knows them by identity.

    Every implementation keeps this contract. For one of your own, derive from this class, with a `Root` that takes the
    arguments of `create`; the two here have native representatives, to which no class can add methods. Section 4.2 of
    the paper.

    >>> import k42
    >>> from k42.structures import Pool
    >>> buffers = Pool.create(lambda: bytearray(4096), capacity=8)
    >>> with buffers.item() as buffer:
    ...     buffer[:2] = b"hi"
    >>> buffers.size(), buffers.free()
    (1, 1)
    >>> k42.destroy(buffers)
    True
    """

    __slots__ = ()

    transfers = ("items",)  # the factory, the capacity, and all items

    @classmethod
    def create(
        cls, factory: Callable[[], _T] | None = None, *, items: Iterable[_T] = (), capacity: int | None = None
    ) -> Self:
        """Create a pool and return the reference to it; `Pool` itself creates a `DistributedPool`.

        Args:
            factory: makes an item when none is free; without one there are only `items`. It is called without any
                lock held, on the thread that wants the item, within its call of `take`.
            items: to begin with; all are free.
            capacity: the most items that there may be, taken ones included; None: as many as are wanted.

        Raises:
            TypeError: `factory` cannot be called, or `capacity` is no int.
            ValueError: there is neither a factory nor an item; `capacity` is less than 1, or than the items; or an
                item is there twice.
        """
        if cls is Pool:
            return cast(Self, DistributedPool.create(factory, items=items, capacity=capacity))
        return cls._create(factory, items, capacity)

    @classmethod
    def _create(cls, factory: Callable[[], _T] | None, items: Iterable[_T], *others: int | None) -> Self:
        items = tuple(items)
        if factory is None and not items:
            raise ValueError("a pool needs a factory, or items to begin with")
        return super().create(factory, items, *others)

    def take(self, timeout: float | None = 0) -> _T:
        """Return a free item, which is the caller's until it gives it back; where none is free, a new one.

        Waiting is no part of a request: it holds up nobody who destroys or swaps the pool, and Ctrl-C ends it.

        Args:
            timeout: how long to wait, in seconds, where all are taken and there may be no more; None: for ever.

        Raises:
            PoolExhausted: all are taken still. Nothing has changed.
            TypeError, ValueError: `timeout` is no number of seconds; the factory returned an item that is there
                already.
            Destroyed: the pool has been destroyed, perhaps while the caller waited.
            Exception: whatever the factory raises. Nothing has changed, and the next call tries again.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define take()")

    def give_back(self, item: _T) -> None:
        """Let others have an item that was taken, on any thread; the caller must not use it any more.

        Raises:
            ValueError: the item is none of this pool, or it is free already (of several threads that give it back at
                the same time, one succeeds). Nothing has changed.
            Destroyed: the pool has been destroyed.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define give_back()")

    def item(self, timeout: float | None = 0) -> AbstractContextManager[_T, None]:
        """Return an item for a `with`: it is taken on entry, as by `take`, and given back on exit.

        Args:
            timeout: as of `take`.
        """
        return _native.PoolItem(self.root.ref, timeout)

    def free(self) -> int:
        """Return how many items are free, as `stat` counts them.

        Raises:
            Destroyed: the pool has been destroyed.
        """
        stat = self.stat()
        return stat.local + stat.shared

    def size(self) -> int:
        """Return how many items there are, free and taken.

        Raises:
            Destroyed: the pool has been destroyed.
        """
        return self.stat().size

    def stat(self) -> PoolStat:
        """Return how many items are where: `size == taken + local + shared`, all at one moment.

        It is for reports, not for each call: a distributed pool is closed meanwhile, for some microseconds.

        Returns:
            A named tuple: `size`; `taken`, which includes items that are on their way to who waited for them; `local`,
            free in the lists of processors; `shared`, free in the list of all.

        Raises:
            Destroyed: the pool has been destroyed.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define stat()")


class _PoolRoot(Root):
    """What the roots of both have: the native pool."""

    pool: _native.SharedPool | _native.DistributedPool

    def export_state(self, form: str) -> _native.PoolState:
        """Return the state of the pool; those who wait for an item then ask the reference again.

        Whoever has an item that is taken gives it back to the pool that imports this. Called while nobody is inside of
        the pool, with a form of `transfers`.
        """
        state = self.pool.export_state()
        self.pool.wake()
        return state

    def import_state(self, form: str, state: _native.PoolState) -> None:
        """Take the state of another pool over, which this one replaces.

        Called while nobody is inside of the pool, with a form of `transfers`.

        Raises:
            ValueError: this pool has items of its own.
        """
        self.pool.import_state(state["factory"], state["capacity"], state["free"], state["taken"])

    def _released(self) -> list[tuple[Any, int]]:
        if hasattr(self, "pool"):  # else making it failed
            self.pool.wake()  # whoever waits finds the reference empty
        return super()._released()


@final
@represented_by(_native.PoolRep)
class SharedPool(Pool[_T]):
    """One list of free items under one lock: the left-hand side of figure 7."""

    __slots__ = ()

    class Root(_PoolRoot, SharedRoot):
        """The items, and the list."""

        def __init__(
            self, factory: Callable[[], Any] | None = None, items: Iterable[Any] = (), capacity: int | None = None
        ) -> None:
            self.pool: _native.SharedPool = _native.SharedPool(factory, items, capacity)

        def create_rep(self) -> _native.SharedPoolRep:
            """Return the representative of all processors."""
            return self.pool.join()


@final
@represented_by(_native.PoolRep)
class DistributedPool(Pool[_T]):
    """A list of free items for each processor, and one for what overflows: the right-hand side of figure 7."""

    __slots__ = ()

    class Root(_PoolRoot, DistributedRoot):
        """The items, and the list of what overflows."""

        def __init__(
            self,
            factory: Callable[[], Any] | None = None,
            items: Iterable[Any] = (),
            capacity: int | None = None,
            cap: int = 64,
        ) -> None:
            self.pool: _native.DistributedPool = _native.DistributedPool(factory, items, capacity, cap)

        def create_rep(self) -> _native.PoolPart:
            """Return the calling processor's list, made by the thread that uses it, in memory near to it."""
            return self.pool.join()

    @classmethod
    def create(
        cls,
        factory: Callable[[], _T] | None = None,
        *,
        items: Iterable[_T] = (),
        capacity: int | None = None,
        cap: int = 64,
    ) -> Self:
        """Create a pool and return the reference to it.

        Args:
            factory: as of `Pool.create`.
            items: as of `Pool.create`.
            capacity: as of `Pool.create`.
            cap: how many free items a processor keeps, 1 to 65536; half as many move at a time.

        Raises:
            TypeError: `cap` is no int; or as `Pool.create`.
            ValueError: `cap` is out of range; or as `Pool.create`.
        """
        return cls._create(factory, items, capacity, cap)


Pool._default = DistributedPool
IMPLEMENTATIONS: tuple[type[Pool[Any]], ...] = (SharedPool, DistributedPool)
