"""Maps: keys to values, for many threads; the paper's DHash (section 4.4) with the interface of a Python dictionary.

`Map.create()` makes a `ReplicatedMap`, in which look-ups of what a processor has looked up before share nothing with
others. `SharedMap` and `PartitionedMap` are better at what is written more often than read.

The five questions of section 3.2, of `ReplicatedMap`; the other two have the master alone, in one part or in many:

- What is local: a table of replicas for each processor, which its owner alone changes. A look-up that finds its key
  there takes no lock and writes nothing that others read. Without a GIL, values that are immutable are copied to each
  replica, so that not even their reference counts are shared.
- What is shared: the master, in partitions by hash, each a table on cache lines of its own under a lock of its own.
- How representatives are made and join: the first call on a processor makes its table, which is empty. A look-up that
  misses it finds the master's entry, and enters its replica there, under the partition's lock.
- How local and global operations synchronise: by the replica's pointer to the value. Whoever changes an entry first
  takes the values out of its replicas, then changes the master, both under the partition's lock; a look-up that
  finds no value in its replica goes to the master, and so waits for the change. Old values of replicas are released
  once the requests that run then have ended.
- How representatives are organised: replicas are listed in the entry of the master, until it changes.

Tables grow and shrink one bucket at a time, so no call waits for a whole one. `k42.sim.models.map` says in plain Python
what maps do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, MutableMapping, ValuesView
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, cast, final, overload

from k42 import _native
from k42.objects import DistributedRoot, Object, SharedRoot
from k42.structures._native_rep import represented_by

K = TypeVar("K")
V = TypeVar("V")
D = TypeVar("D")

# Enough that threads on all CPUs rarely want the same lock; those that nothing is in take no memory.
_PARTITIONS = max(16, 1 << (4 * (os.cpu_count() or 1) - 1).bit_length())


if TYPE_CHECKING:

    class _Mapping(MutableMapping[K, V]):
        """What type checkers are told of the interface."""

else:

    class _Mapping(Generic[K, V]):
        """The interface is registered below: a reference is an instance of MutableMapping."""

        __slots__ = ()


class Map(Object, _Mapping[K, V]):
    """A dictionary that many threads use: a `collections.abc.MutableMapping`, and a few operations more.

    Operations on one key are linearizable: each takes effect at one moment between its call and its return. Those on
    several keys (iteration, `update`, `len`) take one after the other, except `empty`. Keys are compared as in a
    dictionary, but no lock is held while a `__hash__`, an `__eq__`, a `__del__` or a function given by the caller runs:
    these may use the map, and others go on meanwhile. There is no order of keys. References to two maps are equal if
    they are the same one; `dict(a) == dict(b)` compares what is in them.

    Every implementation keeps this contract. For one of your own, derive from this class; the three here have native
    representatives, to which no class can add methods. Sections 4.4 and 3.2 of the paper.

    >>> import k42
    >>> from k42.structures import Map
    >>> pages = Map.create()
    >>> pages["index.html"] = 7
    >>> pages["index.html"], pages.get("about.html"), len(pages)
    (7, None, 1)
    >>> pages.find_or_allocate("about.html", lambda: 8)
    (8, True)
    >>> pages.find_or_allocate("about.html", lambda: 9)
    (8, False)
    >>> pages.scatter("index.html", lambda n: n + 1)
    8
    >>> k42.destroy(pages)
    True
    """

    __slots__ = ()

    transfers: ClassVar[tuple[str, ...]] = ("items",)

    __reversed__ = None  # a map has no order

    @classmethod
    def create(cls, *, copy_immutable: bool = True) -> Self:
        """Create a map and return the reference to it; `Map` itself creates a `ReplicatedMap`.

        Args:
            copy_immutable: whether replicas have copies of their own of values that are immutable all through: exact
                int, float, complex, str and bytes, tuples and frozensets of these, up to 4 KiB each. Without it, what
                a look-up returns is the very object that was set, and the threads that look it up share its
                reference count: two then take longer than one. Has no effect with a GIL, or without replicas.
        """
        if cls is Map:
            return cast(Self, ReplicatedMap.create(copy_immutable=copy_immutable))
        return super().create(copy_immutable)

    @overload
    def get(self, key: K, default: None = None, /) -> V | None: ...
    @overload
    def get(self, key: K, default: V | D, /) -> V | D: ...
    def get(self, key: K, default: Any = None, /) -> Any:
        """Return the value of `key`, or `default` when there is none.

        Raises:
            TypeError: `key` is not hashable. So it is with all operations on a key, and so is the next.
            Destroyed: the map has been destroyed.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define get()")

    def __getitem__(self, key: K, /) -> V:
        raise NotImplementedError(f"{type(self).__qualname__} must define __getitem__()")

    def __setitem__(self, key: K, value: V, /) -> None:
        raise NotImplementedError(f"{type(self).__qualname__} must define __setitem__()")

    def __delitem__(self, key: K, /) -> None:
        raise NotImplementedError(f"{type(self).__qualname__} must define __delitem__()")

    def __contains__(self, key: object, /) -> bool:
        raise NotImplementedError(f"{type(self).__qualname__} must define __contains__()")

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__qualname__} must define __len__()")

    def __iter__(self) -> Iterator[K]:
        raise NotImplementedError(f"{type(self).__qualname__} must define __iter__()")

    @overload
    def pop(self, key: K, /) -> V: ...
    @overload
    def pop(self, key: K, /, default: V | D) -> V | D: ...
    def pop(self, key: K, /, default: Any = None) -> Any:
        """Remove `key` and return its value; `default`, if one is given, when there is none.

        Raises:
            KeyError: there is no such key, and no `default`.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define pop()")

    def popitem(self) -> tuple[K, V]:
        """Remove any key, and return it with its value.

        Raises:
            KeyError: the map is empty.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define popitem()")

    def setdefault(self, key: K, default: Any = None, /) -> Any:
        """Return the value of `key`; when there is none, it is `default` from now on."""
        raise NotImplementedError(f"{type(self).__qualname__} must define setdefault()")

    def find_or_allocate(self, key: K, factory: Callable[[], V], /) -> tuple[V, bool]:
        """Return the value of `key` and False; when there is none, `factory()`, which is its value then, and True.

        Of all that ask for a key before it has a value, one calls its factory, outside of any lock, and the others
        wait for it: exactly one of them gets True. Other operations do not wait; when one of them sets the key
        meanwhile, that value is found, and what the factory returned is dropped.

        Raises:
            Error: the factory asks the map for the same key by this method; or factories of several threads ask for
                each other's keys in a circle: one of them gets the error.

        What the factory raises passes to its caller; of those that wait one tries its own next.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define find_or_allocate()")

    def gather(self, key: K, /) -> tuple[V, dict[int, V]]:
        """Return what the master and the replicas have, at one moment: the value, and by processor those of replicas.

        Raises:
            KeyError: there is no such key.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define gather()")

    def scatter(self, key: K, fn: Callable[[V], V], /) -> V:
        """Replace the value of `key` by `fn(value)`, in the master and in every replica, in one step; return it.

        `fn` runs outside of any lock, and again when the value has changed meanwhile. A replica with a copy of its own
        has none from then on, until its next look-up.

        Raises:
            KeyError: there is no such key.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define scatter()")

    def empty(self) -> None:
        """Remove all keys, in one step: from then on nobody finds one, in the master or in a replica."""
        raise NotImplementedError(f"{type(self).__qualname__} must define empty()")

    def clear(self) -> None:
        """Remove all keys: another name for `empty`."""
        self.empty()

    def update(self, other: Any = (), /, **kwds: Any) -> None:
        """Set the keys of a mapping, or of pairs of key and value, and those given by name: one after the other."""
        MutableMapping.update(self, other, **kwds)

    def keys(self) -> KeysView[K]:
        """Return a view of the keys.

        To iterate over the map or one of its views takes a snapshot of each partition, one after the other: a key that
        is there all the time appears once, one that comes or goes meanwhile does or does not. It never fails for a
        change.
        """
        return KeysView(self)

    def values(self) -> ValuesView[V]:
        """Return a view of the values; see `keys`."""
        return _Values(self)

    def items(self) -> ItemsView[K, V]:
        """Return a view of pairs of key and value; see `keys`."""
        return _Items(self)

    # Of the views.

    def _values(self) -> Iterator[V]:
        return (value for _, value in self._items())

    def _items(self) -> Iterator[tuple[K, V]]:
        nothing = object()
        pairs = ((key, self.get(key, nothing)) for key in self)
        return (cast("tuple[K, V]", pair) for pair in pairs if pair[1] is not nothing)


MutableMapping.register(Map)


class _Values(ValuesView[V]):
    """The values of a map, in snapshots."""

    __slots__ = ()
    _mapping: Map[Any, V]

    def __iter__(self) -> Iterator[V]:
        return self._mapping._values()

    def __contains__(self, value: object) -> bool:
        return any(v is value or v == value for v in self)


class _Items(ItemsView[K, V]):
    """The pairs of a map, in snapshots."""

    __slots__ = ()
    _mapping: Map[K, V]

    def __iter__(self) -> Iterator[tuple[K, V]]:
        return self._mapping._items()


_native.map_mixins(KeysView, _Values, _Items, MutableMapping.update)


class _Table:
    """What the roots have in common: the native table, whole or in parts."""

    partitions: ClassVar[int] = _PARTITIONS

    def __init__(self, copy_immutable: bool = True) -> None:
        self.table = _native.MapTable(self.partitions, copy_immutable)

    def create_rep(self) -> _native.MapRep:
        """Return the representative of all processors: the master itself."""
        return self.table.whole()

    def export_state(self, form: str) -> dict[Any, Any]:
        """Return all that is in the map; its only form, "items", is a dictionary."""
        return dict(self.table.items())

    def import_state(self, form: str, state: Mapping[Any, Any]) -> None:
        """Put all of `state` in."""
        _fill(self.table.whole(), state.items())


def _fill(rep: _native.MapRep, pairs: Iterable[tuple[Any, Any]]) -> None:
    for key, value in pairs:
        rep[key] = value


@final
@represented_by(_native.MapRep)
class SharedMap(Map[K, V]):
    """One table under one lock. `len` is exact, an iteration is one snapshot."""

    __slots__ = ()

    class Root(_Table, SharedRoot):
        """Has the one table."""

        partitions = 1


@final
@represented_by(_native.MapRep)
class PartitionedMap(Map[K, V]):
    """Many tables by hash, each on lines of its own, under a lock of its own: for what is written as much as read."""

    __slots__ = ()

    class Root(_Table, SharedRoot):
        """Has the tables."""


@final
@represented_by(_native.MapRep)
class ReplicatedMap(Map[K, V]):
    """A partitioned master, and a table of replicas for each processor: for what is read more often than written."""

    __slots__ = ()

    class Root(_Table, DistributedRoot):
        """Has the master."""

        def create_rep(self) -> _native.MapRep:
            """Return a representative with an empty local table, made by the thread that uses it."""
            return self.table.join()


Map._default = ReplicatedMap
IMPLEMENTATIONS: tuple[type[Map[Any, Any]], ...] = (SharedMap, PartitionedMap, ReplicatedMap)
