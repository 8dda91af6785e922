"""Roots: what the representatives of an object share, and who decides which processor uses which one.

Sections 2.2.1 and 3.2 of the paper.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

from k42 import _native
from k42.objects import processors
from k42.objects._creation import Reps

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])


class Root:
    """The root of a Clustered Object: its shared portion, and the handler of its misses.

    A class names its root as an inner class `Root`; `create` makes one instance of it for each object and
    passes its own arguments on. Derive from `SharedRoot`, `ClusteredRoot`, `DistributedRoot` or `PartitionedRoot`, or
    from this class with a `handle_miss` of your own. `__init__` is yours: it need not call `super().__init__()`.

    A root has `rep_class`, the class of its representatives, and `ref`, the reference to its object. The
    reference is there before `__init__` runs, so that a root can make its object known to others.

    Section 2.2.1 of the paper.
    """

    # No __slots__: from 3.13 on attributes lie in the object itself only where a class has none.
    rep_class: type[Any]
    ref: Any
    _made: Reps  # once there are any: an object that nobody calls has none

    def __init__(self) -> None:
        pass

    def handle_miss(self) -> Any:
        """Return the representative that the calling processor shall use; the runtime installs it there.

        Called at the first call on a processor, within that call's request, on its thread. What it raises
        passes to the caller, and the next call misses again. To have the representative used for this one call and not
        installed, return `k42.uninstalled(rep)`.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define handle_miss()")

    def create_rep(self) -> Any:
        """Return a new representative: a `rep_class` whose `root` is set before its `__init__` runs.

        It must not call the object's own reference, which has no representative to call yet: `Error` says so.
        """
        make: Any = self.rep_class.__new__  # a class may have a __new__ of its own
        rep = make(self.rep_class)
        rep.root = self
        rep.__init__()
        return rep

    def reps(self) -> tuple[Any, ...]:
        """Return the representatives made so far, as they are at one moment."""
        return self._reps.all()

    @contextmanager
    def locked_reps(self) -> Iterator[tuple[Any, ...]]:
        """Return a context manager for an iteration that none joins: its value is all the representatives.

        While its body runs no representative is made but by the calling thread: first calls on other processors
        wait. The body must not wait for other threads. Raises `Error` where taking the lock would never end.
        """
        with self._reps.locked(self._name()):
            yield self._reps.all()

    def gather(self, fn: Callable[[Any], _T]) -> list[_T]:
        """Return `fn(rep)` of every representative, while none is made; see `locked_reps`.

        The owners of the representatives go on calling them meanwhile. Section 3.3 of the paper.
        """
        with self.locked_reps() as reps:
            return [fn(rep) for rep in reps]

    def scatter(self, fn: Callable[[Any], object]) -> None:
        """Call `fn(rep)` on every representative, while none is made; see `locked_reps`.

        What representatives made later need to know of it, the root must tell them. Section 3.3 of the paper.
        """
        with self.locked_reps() as reps:
            for rep in reps:
                fn(rep)

    # State transfer, for k42.swap(); in it nobody is inside the object. These methods, and those of representatives,
    # run on any thread; they must not call the object by its reference, nor wait for a thread that may be calling it.

    def export_state(self, form: str) -> Any:
        """Return what the root itself has to give to another implementation, in this form; it changes nothing.

        Of a class whose representatives are native, that is all of the object's state. Hot-swapping.
        """
        return None

    def import_state(self, form: str, state: Any) -> None:
        """Take what another implementation's root has exported in this form. The root is new, and has no reps."""

    def _export(self, form: str, switch: _native.Switch) -> tuple[Any, list[tuple[int, Any]]]:
        """The root's state, and that of each representative with a processor that uses it."""
        reps = [(self._processor(key), rep) for key, rep in self._reps.items() if hasattr(rep, "export_state")]
        states = _in_parallel(lambda item: item[1].export_state(form), reps, switch)
        return self.export_state(form), [(p, state) for (p, _), state in zip(reps, states, strict=True)]

    def _import(self, form: str, exported: tuple[Any, list[tuple[int, Any]]], switch: _native.Switch) -> None:
        state, states = exported
        self.import_state(form, state)
        by_key: dict[Hashable, list[Any]] = {}
        for processor, rep_state in states:
            by_key.setdefault(self._key(processor), []).append(rep_state)
        _in_parallel(lambda item: self._rep_of(item[0]).import_state(form, item[1]), by_key.items(), switch)

    def _key(self, processor: int) -> Hashable:
        """Which representative takes over what one on this processor has exported."""
        return None

    def _processor(self, key: Hashable) -> int:
        """A processor that uses the representative of this key."""
        return processors.current()

    # For the runtime.

    @property
    def _reps(self) -> Reps:
        try:
            return self._made
        except AttributeError:
            return _first_reps(self)

    def _released(self) -> list[tuple[Any, int]]:
        """Break the cycles, once nobody uses the object; return the representatives with a hook, and their processors.

        The runtime calls it. It knows itself of those that it has found in its own tables.
        """
        try:
            reps = self._made
        except AttributeError:
            return []  # nobody has called the object
        hooked = [(rep, self._processor(key)) for key, rep in reps.items() if hasattr(type(rep), "on_release")]
        reps.clear()
        return hooked

    def _rep_of(self, key: Hashable) -> Any:
        return self._reps.once(key, self.create_rep, self._name())

    def _name(self) -> str:
        return self.rep_class.__qualname__


# What threads make for a root that has no Reps yet, by its id, until the root has one.
_first: dict[int, Reps] = {}


def _first_reps(root: Root) -> Reps:
    # Of threads that race the first one's lasts: setdefault is atomic. It is not root.__dict__ that decides: where the
    # collector runs while 3.11 makes that dictionary, another thread makes a second one of the same values, and both
    # free them.
    made = _first.setdefault(id(root), Reps())
    try:
        made = root._made  # who was first has left _first already
    except AttributeError:
        root._made = made
    _first.pop(id(root), None)
    return made


def _in_parallel(fn: Callable[[Any], _T], items: Iterable[Any], switch: _native.Switch) -> list[_T]:
    """Return fn of each item; with several items, on several threads, which all work on the switch."""

    def work(item: Any) -> _T:
        with switch:
            return fn(item)

    items = list(items)
    if len(items) < 2:
        return [fn(item) for item in items]
    with ThreadPoolExecutor(min(len(items), len(os.sched_getaffinity(0))), "k42-transfer") as pool:
        return list(pool.map(work, items))


class SharedRoot(Root):
    """One representative for all processors: an ordinary shared object behind a reference.

    - What is local: nothing but the pointer to the representative, in each processor's translation table.
    - What is shared: the representative, and with it all state. It brings its own lock.
    - How reps are made and join: the first call makes the only one; calls that race with it wait for it, and
      each processor's first call installs it there.
    - How local and global operations synchronise: all are global; the representative's lock orders them.
    - How reps are organised: there is one.

    Section 3.2 of the paper.
    """

    def handle_miss(self) -> Any:
        """Return the only representative; the first caller makes it."""
        return self._rep_of(None)


class ClusteredRoot(Root):
    """A representative for each cluster: `size` processors with neighbouring ids, or those of a NUMA node.

    Set `size` in the class: processors kC to kC + C - 1 share a representative. Without it the clusters are the NUMA
    nodes of the CPUs on which the processors' threads make their first calls; pin the threads (see
    `k42.processors.pin`) for that to stay true.

    - What is local: the representative of each cluster, shared by its processors alone. It brings its own lock.
    - What is shared: the root, and what the class puts there.
    - How reps are made and join: the first call in a cluster makes its representative; the first call of each
      other processor of the cluster installs it there.
    - How local and global operations synchronise: as the class says; `locked_reps()` keeps others from joining.
    - How reps are organised: by cluster number.

    Section 2.2 of the paper.
    """

    size: ClassVar[int | None] = None

    def handle_miss(self) -> Any:
        """Return the representative of the calling processor's cluster; the first caller makes it."""
        return self._rep_of(self._key(processors.current()))

    def _key(self, processor: int) -> Hashable:
        if self.size is None:
            return processors.node()
        if self.size < 1:
            raise ValueError(f"{type(self).__qualname__}.size must be at least 1 processor, not {self.size}")
        return processor // self.size

    def _processor(self, key: Hashable) -> int:
        assert isinstance(key, int)
        return processors.current() if self.size is None else key * self.size


class DistributedRoot(Root):
    """A representative for each processor that calls the object.

    - What is local: the representative of each processor. Only the thread that owns the processor calls it,
      so its methods need no lock for what they alone touch.
    - What is shared: the root, and what the class puts there. Its lock, if it needs one, is the class's own.
    - How reps are made and join: the first call on a processor makes its representative, on its own thread;
      `reps()` includes it once its `__init__` has returned. A thread that takes over a processor goes on with
      the representative that it finds.
    - How local and global operations synchronise: they do not. A global operation reads the representatives
      of `reps()` while their owners go on; what must be exact at one moment needs a lock in each of them.
    - How reps are organised: by processor id, in the order of their first calls.

    Section 3.2 of the paper.
    """

    def handle_miss(self) -> Any:
        """Return the calling processor's representative, which the first caller makes."""
        return self._rep_of(processors.current())

    def _key(self, processor: int) -> Hashable:
        return processor

    def _processor(self, key: Hashable) -> int:
        assert isinstance(key, int)
        return key


def global_method(function: _F) -> _F:
    """Say that a method of a partitioned class concerns all keys: it takes no key, and is not sent to a partition.

    Its `self` has `root` and nothing else: what it does it does by `self.root.gather` and the like. See
    `PartitionedRoot`. Section 3.2 of the paper (global operations).
    """
    function.__k42_global__ = True  # type: ignore[attr-defined]
    return function


class PartitionedRoot(Root):
    """A representative for each part of the keys: it serves the calls for its keys, from every processor.

    A method's first argument is the key: the call goes to the representative of `partition_of(key)`. Methods that
    concern all keys are marked `global_method`. Set `partitions` in the class.

    - What is local: to a partition, its representative with its lock. To a processor, nothing.
    - What is shared: the root. Processors that use keys of different partitions share nothing else.
    - How reps are made and join: the first call for a key of a partition makes its representative.
    - How local and global operations synchronise: the class's lock in each representative orders its calls; a
      `gather` takes one after the other.
    - How reps are organised: by partition number.

    Section 4.4 of the paper (the partitioned FCM).

    >>> import k42, threading
    >>> class Scores(k42.Object):
    ...     class Root(k42.PartitionedRoot):
    ...         partitions = 8
    ...     def __init__(self):
    ...         self.lock, self.scores = threading.Lock(), {}
    ...     def score(self, player, points):
    ...         with self.lock:
    ...             self.scores[player] = self.scores.get(player, 0) + points
    ...     @k42.global_method
    ...     def total(self):
    ...         return sum(self.root.gather(lambda rep: sum(rep.scores.values())))
    >>> scores = Scores.create()
    >>> scores.score("ann", 3)
    >>> scores.score("bob", 4)
    >>> scores.total()
    7
    >>> k42.destroy(scores)
    True
    """

    partitions: ClassVar[int] = 16

    def partition_of(self, key: Hashable) -> int:
        """Return the number of the partition that serves `key`: by its hash, unless the class says otherwise."""
        return hash(key) % self.partitions

    def rep_of(self, key: Hashable) -> Any:
        """Return the representative that serves `key`; the first caller makes it."""
        return self._rep_of(self.partition_of(key))

    def handle_miss(self) -> Any:
        """Return a router for the calling processor: it takes each call to the representative of its key."""
        return _Router(self)

    def _import(self, form: str, exported: tuple[Any, list[tuple[int, Any]]], switch: _native.Switch) -> None:
        """Each partition is given everything, and takes what is its own."""
        state, states = exported
        self.import_state(form, state)
        if states:
            everything = [rep_state for _, rep_state in states]
            _in_parallel(lambda n: self._rep_of(n).import_state(form, everything), range(self.partitions), switch)


class _Router:
    """What the runtime installs for a partitioned object."""

    __slots__ = ("root",)

    root: PartitionedRoot

    def __init__(self, root: PartitionedRoot) -> None:
        self.root = root

    def __getattribute__(self, name: str) -> Any:
        if name in ("root", "__class__"):
            return object.__getattribute__(self, name)
        root = self.root
        member = inspect.getattr_static(root.rep_class, name)
        if hasattr(member, "__k42_global__") or not inspect.isfunction(member):
            # A property is as a global method is; a constant needs no `self`.
            return member.__get__(self, root.rep_class) if hasattr(member, "__get__") else member

        def route(*args: Any, **kwargs: Any) -> Any:
            if not args:
                raise TypeError(
                    f"{root.rep_class.__qualname__}.{name}() takes the key as its first argument, not by name: it is "
                    "sent to the partition of its key; mark a method that has none `global_method`"
                )
            rep = root.rep_of(args[0])
            result = getattr(rep, name)(*args, **kwargs)
            return root.ref if result is rep else result

        return route
