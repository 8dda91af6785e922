"""Gates: requests pass, until someone stops them; one interface, and two implementations (section 4.3, figure 9).

A gate is what a Region of the paper counts its requests with. Work enters and leaves it; whoever must be alone for a
moment (to change what all that work uses, or to take it away) stops the gate: newcomers wait, those inside finish.
So it is a lock for readers and writers of the kind where reading costs a few nanoseconds on any number of processors,
and writing, the rare side, pays for both.

`Gate.create()` makes a `DistributedGate`. The five questions of section 3.2, of this one:

- What is local: how many requests are inside on each processor, a number that its owner alone writes.
- What is shared: the state (normal, stopped or shut down), on a cache line that requests only read; and the list of
  the processors' numbers.
- How representatives are made and join: the first call on a processor makes its representative, with nobody inside.
  One that joins a stopped gate finds it stopped: it looks at the state as every request does.
- How local and global operations synchronise: a request counts itself in, then looks at the state; `stop` sets the
  state, then looks at the counts. So at least one sees the other: then the request steps back, and `stop` waits. The
  memory barrier between the two steps is paid by `stop` for all (membarrier), so requests have none.
- How representatives are organised: in a list, each on cache lines of its own.

`SharedGate` has state and count in one word. Each processor remembers its own requests, for the sake of the contract,
and that is all that is local: every request writes the word.

The representatives are native, and a call on the reference goes straight to them. `k42.sim.models.gate` says in plain
Python what they do.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from typing import ClassVar, Self, cast, final

from k42 import _native
from k42.errors import GateClosed
from k42.objects import DistributedRoot, Object
from k42.objects.swap import NotNow
from k42.structures._native_rep import represented_by


class Gate(Object):
    """Counts the requests inside, and can stop them.

    Who enters leaves, on the same thread; `with gate:` does both. A thread that is inside may enter again, and then
    does so even while someone stops the gate or shuts it down: the stop waits for it anyway. That goes by threads: of
    several coroutines that one thread runs, the first that is inside lets the others in.

    Whoever stops the gate restarts it; another thread may do it for them. Who has waited at a stopped gate comes in
    before the next stop, so stops that follow one another starve nobody.

    A gate can be swapped for another implementation while nobody is inside: `stop`, swap, `restart`. Shut a gate down
    before you destroy it: requests that are inside when it is destroyed cannot leave it any more, and a `stop` that
    waits for them has only its timeout. Newcomers that wait find out and raise `Destroyed`.

    For an implementation of your own, derive from this class. Sections 4.3 and 4.4 of the paper.

    >>> import k42
    >>> from k42.structures import Gate
    >>> gate = Gate.create()
    >>> with gate:
    ...     gate.inside()
    1
    >>> with gate.stopped():  # nobody is inside here
    ...     gate.try_enter()
    False
    >>> gate.shutdown()
    >>> gate.enter()
    Traceback (most recent call last):
    k42.errors.GateClosed: this gate has been shut down: it admits nobody any more
    >>> k42.destroy(gate)
    True
    """

    __slots__ = ()

    @classmethod
    def create(cls) -> Self:
        """Create a gate that is open and return the reference to it; `Gate` itself creates a `DistributedGate`."""
        if cls is Gate:
            return cast(Self, DistributedGate.create())
        return super().create()

    def enter(self) -> None:
        """Enter; while the gate is stopped, wait.

        Raises:
            GateClosed: the gate has been shut down, before or while this waits.
            OverflowError: the thread has entered a million times and not left.
            Destroyed: the gate has been destroyed, before or while this waits.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define enter()")

    def try_enter(self) -> bool:
        """Enter, and return True; or return False when the gate is stopped, or someone is about to stop it.

        Raises:
            GateClosed: the gate has been shut down.
            OverflowError: the thread has entered a million times and not left.
            Destroyed: the gate has been destroyed.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define try_enter()")

    def leave(self) -> None:
        """Leave.

        Raises:
            RuntimeError: this thread is not inside; nothing was changed.
            Destroyed: the gate has been destroyed.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define leave()")

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *exc: object) -> None:
        self.leave()

    def stop(self, timeout: float | None = None) -> None:
        """Let newcomers wait, and return when those inside have left: until `restart` nobody is inside.

        What the requests did before they left happens before this returns, and what the caller does until `restart`
        before they enter. One thread at a time: others wait for the restart. Its own `enter` would wait, too.

        Args:
            timeout: how long to wait, in seconds; None is for ever.

        Raises:
            TimeoutError: the gate was not stopped in time. Newcomers are let in again.
            GateClosed: the gate has been shut down, before or while this waits.
            RuntimeError: the caller is inside, and would wait for itself; nothing was changed.
            TypeError, ValueError: `timeout` is no number, or less than 0.
            Destroyed: the gate has been destroyed.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define stop()")

    def stopped(self, timeout: float | None = None) -> AbstractContextManager[None]:
        """Return a context manager that stops the gate, and restarts it at the end of the block.

        Unless the gate has been shut down by then. It raises what `stop` raises.

        Args:
            timeout: how long to wait, in seconds; None is for ever.
        """
        return _Stopped(self, timeout)

    def restart(self) -> None:
        """Let newcomers in again, those that wait first.

        Raises:
            RuntimeError: the gate is not stopped, or a `stop` still waits; nothing was changed.
            GateClosed: the gate has been shut down.
            Destroyed: the gate has been destroyed.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define restart()")

    def shutdown(self, timeout: float | None = None) -> None:
        """Reject newcomers for ever, and those who wait; return when those inside have left.

        A gate that someone has stopped is shut at once, and the stop has ended: end that work first. To call it again
        is to wait again.

        Args:
            timeout: how long to wait, in seconds; None is for ever.

        Raises:
            TimeoutError: some are still inside; the message says how many. The gate stays shut.
            RuntimeError: the caller is inside, and would wait for itself; nothing was changed.
            TypeError, ValueError: `timeout` is no number, or less than 0.
            Destroyed: the gate has been destroyed.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define shutdown()")

    def inside(self) -> int:
        """Return how many requests are inside, on all processors.

        Exact while the gate is stopped, and then 0; else the sum of what each processor had at some moment of the
        call, as in `Counter.value`.

        Raises:
            Destroyed: the gate has been destroyed.
        """
        raise NotImplementedError(f"{type(self).__qualname__} must define inside()")


class _Stopped(AbstractContextManager[None]):
    """What `Gate.stopped` returns. It keeps the reference, which leads to the gate that there is by then."""

    __slots__ = ("_gate", "_timeout")

    def __init__(self, gate: Gate, timeout: float | None) -> None:
        self._gate = gate
        self._timeout = timeout

    def __enter__(self) -> None:
        self._gate.stop(self._timeout)

    def __exit__(self, *exc: object) -> None:
        with suppress(GateClosed):
            self._gate.restart()


class _Root(DistributedRoot):
    """The state of the gate. Each processor has a representative, which knows of its own requests."""

    native: ClassVar[type[_native.SharedGate] | type[_native.DistributedGate]]

    def __init__(self) -> None:
        self.gate = self.native()

    def create_rep(self) -> _native.GateRep:
        """Return the calling processor's representative, made by the thread that uses it."""
        return self.gate.join()

    def export_state(self, form: str) -> str:
        """Return the state: "normal", "stopped" or "shutdown".

        Raises:
            NotNow: requests are inside, which only this implementation can let out.
        """
        assert form == "gate"
        if inside := self.gate.inside():
            raise NotNow(f"requests are inside the gate ({inside}): stop() it before it is swapped")
        return self.gate.state()

    def import_state(self, form: str, state: str) -> None:
        """Go on from this state; of a gate that is new."""
        assert form == "gate"
        self.gate.set_state(state)


@final
@represented_by(_native.GateRep)
class SharedGate(Gate):
    """State and count in one word, which every request writes: the non-distributed one of figure 9."""

    __slots__ = ()

    transfers: ClassVar[tuple[str, ...]] = ("gate",)

    class Root(_Root):
        """The word."""

        native = _native.SharedGate


@final
@represented_by(_native.GateRep)
class DistributedGate(Gate):
    """A count for each processor, and a state that requests only read: the distributed one of figure 9."""

    __slots__ = ()

    transfers: ClassVar[tuple[str, ...]] = ("gate",)

    class Root(_Root):
        """The state, and the list of the counts."""

        native = _native.DistributedGate


Gate._default = DistributedGate
IMPLEMENTATIONS: tuple[type[Gate], ...] = (SharedGate, DistributedGate)
