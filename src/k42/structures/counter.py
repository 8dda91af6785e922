"""Counters: one interface, and the four implementations of the paper's motivating example (section 1.1, figure 1).

`Counter.create()` makes a `DistributedCounter`, which threads on any number of processors add to without waiting
for each other. The others are there to be compared with it, and for what it is worse at: it takes a cache line or
two a processor, and reading it takes time for each processor that ever used it.

The five questions of section 3.2, of `DistributedCounter` (`PackedCounter` differs in the last answer):

- What is local: a part of the count for each processor, 64 bits that its owner alone writes.
- What is shared: the start, and the list of parts. `add` touches neither.
- How representatives are made and join: the first call on a processor makes its part, which counts 0 and is read by
  every `value()` from then on. A thread that takes over a processor goes on with its part: nothing is lost or
  counted twice when threads come and go.
- How local and global operations synchronise: they do not. `value()` reads the parts, one after the other, while
  their owners go on; what that guarantees stands there.
- How representatives are organised: in a list, each part on cache lines of its own. Packed: in an array.

`SharedCounter` and `AtomicCounter` have one representative: nothing is local, and every `add` is global.

The representatives are native, and a call on the reference goes straight to them. `k42.sim.models.counter` says in
plain Python what they do.
"""

from __future__ import annotations

from typing import Self, cast, final

from k42 import _native
from k42.objects import DistributedRoot, Object, SharedRoot
from k42.structures._native_rep import represented_by


class Counter(Object):
    """A count that many threads add to: a signed number of 64 bits.

    Every implementation keeps this contract. For one of your own, derive from this class, with a `Root` that
    takes the start; the four here have native representatives, to which no class can add methods. Section 1.1 of
    the paper.

    >>> import k42
    >>> from k42.structures import Counter
    >>> hits = Counter.create(start=10)
    >>> hits.add()
    >>> hits.add(-3)
    >>> hits.value()
    8
    >>> k42.destroy(hits)
    True
    """

    __slots__ = ()

    transfers = ("count",)  # the count, an int

    @classmethod
    def create(cls, start: int = 0) -> Self:
        """Create a counter and return the reference to it; `Counter` itself creates a `DistributedCounter`.

        Args:
            start: what it counts from.

        Raises:
            TypeError: `start` is not an int (a bool is not one here).
            OverflowError: `start` does not fit 64 bits with a sign.
        """
        if cls is Counter:
            return cast(Self, DistributedCounter.create(start))
        return super().create(start)

    def add(self, k: int = 1) -> None:
        """Count `k` more; less, if it is negative.

        Raises:
            TypeError: `k` is not an int (a bool is not one here).
            OverflowError: `k` does not fit 64 bits with a sign, or the count would not; nothing was added. Where
                each processor counts its part, the parts must fit, each for itself: such a counter may refuse an
                add that the sum had room for, and leave it to `value()` to find that the sum has none.
            Destroyed: the counter has been destroyed.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define add()")

    def value(self) -> int:
        """Return the count, exact: of all `add` that happened before this call, none is missing.

        Before means what it means to threads: the caller's own, those of a thread that it has joined, and those
        that it knows of by a lock, a queue, a barrier. Adds that run at the same time may be counted or not, each for
        itself; so this is no snapshot, and with several processors it may count the later one of two and not the
        earlier. Without negative adds, though, the result is between the count at the beginning and at the end
        of the call, and never less than that of a `value()` that happened before.

        Raises:
            OverflowError: the count does not fit 64 bits with a sign.
            Destroyed: the counter has been destroyed.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define value()")

    def approximate(self) -> int:
        """Return about the count: never waits, and orders nothing.

        The caller's own adds are counted, and sooner or later all others are. What may be missing is what other
        processors have added, as long as nothing but the numbers themselves told the caller of it: whoever sees
        a count here must not conclude that anything else which happened before that add can be seen, too.

        Raises:
            OverflowError: what was read does not fit 64 bits with a sign.
            Destroyed: the counter has been destroyed.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define approximate()")


@final
@represented_by(_native.CounterRep)
class SharedCounter(Counter):
    """One count under a lock: the topmost curve of figure 1. `value()` is a snapshot."""

    __slots__ = ()

    class Root(SharedRoot):
        """Makes the one count."""

        def __init__(self, start: int = 0) -> None:
            self.count = _native.SharedCount(start)

        def export_state(self, form: str) -> int:
            """Return the count."""
            return self.count.value()

        def import_state(self, form: str, state: int) -> None:
            """Count from there."""
            self.count = _native.SharedCount(state)

        def create_rep(self) -> _native.SharedCount:
            """Return the count, which is the representative of all processors."""
            return self.count


@final
@represented_by(_native.CounterRep)
class AtomicCounter(Counter):
    """One count that is changed atomically: the second curve of figure 1. `value()` is a snapshot."""

    __slots__ = ()

    class Root(SharedRoot):
        """Makes the one count."""

        def __init__(self, start: int = 0) -> None:
            self.count = _native.AtomicCount(start)

        def export_state(self, form: str) -> int:
            """Return the count."""
            return self.count.value()

        def import_state(self, form: str, state: int) -> None:
            """Count from there."""
            self.count = _native.AtomicCount(state)

        def create_rep(self) -> _native.AtomicCount:
            """Return the count, which is the representative of all processors."""
            return self.count


@final
@represented_by(_native.CounterRep)
class PackedCounter(Counter):
    """A part of the count for each processor, side by side in an array: the third curve of figure 1.

    For the experiment. Nothing is shared but cache lines, by accident, and that is enough to not scale.
    """

    __slots__ = ()

    class Root(DistributedRoot):
        """The start, and the array."""

        def __init__(self, start: int = 0) -> None:
            self.count = _native.PackedCount(start)

        def export_state(self, form: str) -> int:
            """Return the count: the start and all parts."""
            return self.count.value()

        def import_state(self, form: str, state: int) -> None:
            """Count from there, each processor's part from 0."""
            self.count = _native.PackedCount(state)

        def create_rep(self) -> _native.PackedPart:
            """Return the calling processor's part, the next one of the array."""
            return self.count.join()


@final
@represented_by(_native.CounterRep)
class DistributedCounter(Counter):
    """A part of the count for each processor, on cache lines of its own: the flat curve of figure 1."""

    __slots__ = ()

    class Root(DistributedRoot):
        """The start, and the list of parts."""

        def __init__(self, start: int = 0) -> None:
            self.count = _native.PaddedCount(start)

        def export_state(self, form: str) -> int:
            """Return the count: the start and all parts."""
            return self.count.value()

        def import_state(self, form: str, state: int) -> None:
            """Count from there, each processor's part from 0."""
            self.count = _native.PaddedCount(state)

        def create_rep(self) -> _native.PaddedPart:
            """Return the calling processor's part, made by the thread that uses it, in memory near to it."""
            return self.count.join()


Counter._default = DistributedCounter
IMPLEMENTATIONS: tuple[type[Counter], ...] = (SharedCounter, AtomicCounter, PackedCounter, DistributedCounter)
