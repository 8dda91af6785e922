"""Roots: what the representatives of an object share, and who decides which processor uses which one.

Sections 2.2.1 and 3.2 of the paper.
"""

from __future__ import annotations

from typing import Any, Self

from k42.objects import processors
from k42.objects._creation import Reps


class Root:
    """The root of a Clustered Object: its shared portion, and the handler of its misses.

    A class names its root as an inner class `Root`; `create` makes one instance of it for each object and
    passes its own arguments on. Derive from `SharedRoot` or `DistributedRoot`, or from this class with a
    `handle_miss` of your own. `__init__` is yours: it need not call `super().__init__()`.

    A root has `rep_class`, the class of its representatives, and `ref`, the reference to its object. The
    reference is there before `__init__` runs, so that a root can make its object known to others.

    Section 2.2.1 of the paper.
    """

    rep_class: type[Any]
    ref: Any
    _reps: Reps

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make the root's own state here, so that `__init__` is left to the class."""
        root = super().__new__(cls)
        root._reps = Reps()
        return root

    def __init__(self) -> None:
        pass

    def handle_miss(self) -> Any:
        """Return the representative that the calling processor shall use; the runtime installs it there.

        Called at the first call on a processor, within that call's request, on its thread. What it raises
        passes to the caller, and the next call misses again.
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

    def _released(self) -> None:
        """Break the cycles, once nobody uses the object (the runtime calls it)."""
        self._reps.clear()

    def _rep_of(self, key: object) -> Any:
        return self._reps.once(key, self.create_rep, self.rep_class.__qualname__)


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
