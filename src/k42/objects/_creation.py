"""Representatives that are made exactly once: one thread makes, those that race with it wait.

Making a representative runs the user's code, and a finaliser that the garbage collector runs may call any
object between any two steps of this file. So the lock of an object's representatives is an entry in a dictionary,
taken by one operation that Python makes atomic, with the name of its holder in it. What could deadlock is found before
anyone waits: a representative whose creation calls its own object, and objects whose creations call each other in a
circle, on one thread or on several.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from k42.errors import Error


class _Holder:
    """The thread that holds the lock of an object's representatives; `done` is locked until it lets go."""

    __slots__ = ("done", "making", "thread")

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.making: list[Hashable] = []
        self.done = threading.Lock()
        self.done.acquire()


# Which thread waits for which object's representatives.
_waits: dict[int, Reps] = {}
# The thread that lived through a fork, in the child: all other holders and waiters are gone.
_forked: set[int] = set()


def _after_fork_in_child() -> None:
    _waits.clear()
    _forked.clear()
    _forked.add(threading.get_ident())


os.register_at_fork(after_in_child=_after_fork_in_child)


class Reps:
    """The representatives of one object by key: a processor, a cluster, a partition, or the one key of all."""

    __slots__ = ("_held", "_made")

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}
        self._held: dict[None, _Holder] = {}  # the lock; order: before every lock of the objects themselves

    def all(self) -> tuple[Any, ...]:
        """Return the representatives, those made so far."""
        return tuple(self._made.copy().values())  # copy() is atomic, an iteration is not

    def items(self) -> tuple[tuple[Hashable, Any], ...]:
        """Return the keys and representatives."""
        return tuple(self._made.copy().items())

    def clear(self) -> None:
        """Forget all representatives."""
        self._made.clear()

    def once(self, key: Hashable, make: Callable[[], Any], what: str) -> Any:
        """Return the representative of `key`; the first caller makes it, callers that race wait for it.

        If `make` raises, so does this, for the caller that made; one of those that wait tries next.
        Raises `Error` where waiting would never end; `what` names the object in its message.
        """
        made = self._made.get(key)
        if made is not None:
            return made
        holder, mine = self._lock(what)
        try:
            if key in holder.making:
                raise _circle(what)
            if key not in self._made:
                holder.making.append(key)
                try:
                    self._made[key] = make()
                finally:
                    holder.making.pop()
            return self._made[key]
        finally:
            if mine:
                self._unlock(holder)

    @contextlib.contextmanager
    def locked(self, what: str) -> Iterator[None]:
        """Hold the lock: no representative is made but by the calling thread, which may take it again.

        Raises `Error` where waiting for it would never end; `what` names the object in its message.
        """
        holder, mine = self._lock(what)
        try:
            yield
        finally:
            if mine:
                self._unlock(holder)

    def _lock(self, what: str) -> tuple[_Holder, bool]:
        """Take the lock; False with it where this thread has it already."""
        me = threading.get_ident()
        mine = _Holder(me)
        while (holder := self._held.setdefault(None, mine)) is not mine:
            if holder.thread == me:
                return holder, False
            if _forked and holder.thread not in _forked and holder.thread not in _threads():
                if self._held.get(None) is holder:
                    del self._held[None]
                continue
            self._wait(me, holder, what)
        return mine, True

    def _unlock(self, holder: _Holder) -> None:
        del self._held[None]
        holder.done.release()

    def _wait(self, me: int, holder: _Holder, what: str) -> None:
        """Wait until the holder lets go; raise if it waits for this thread."""
        outer = _waits.get(me)  # this call came from a finaliser that ran within another one
        # First say it, then look: of the threads that close a circle, the last to say so sees all of it.
        _waits[me] = self
        try:
            if self._leads_to(me):
                raise _circle(what)
            with holder.done:
                pass
        finally:
            if outer is None:
                del _waits[me]
            else:
                _waits[me] = outer

    def _leads_to(self, me: int) -> bool:
        """Whether the thread that holds this lock, or one that it waits for, waits for thread `me` in the end."""
        reps: Reps = self
        for _ in range(len(_waits) + 1):  # a circle without this thread is not ours to report
            holder = reps._held.get(None)
            if holder is None:
                return False
            if holder.thread == me:
                return True
            waits = _waits.get(holder.thread)
            if waits is None:
                return False
            reps = waits
        return False


def _threads() -> set[int | None]:
    return {thread.ident for thread in threading.enumerate()}


def _circle(what: str) -> Error:
    return Error(
        f"creating a representative of {what} calls {what} itself, which has none yet: "
        "use self and self.root there, not the reference"
    )
