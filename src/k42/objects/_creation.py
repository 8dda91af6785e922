"""Representatives that are made exactly once: one thread makes, those that race with it wait.

Making a representative runs the user's code, and a finaliser that the garbage collector runs may call any
object between any two steps of this file. So nothing here holds a lock of its own: each step is one operation
on a dictionary, which Python makes atomic. What could deadlock is found before anyone waits: a representative
whose creation calls its own object, and objects whose creations call each other in a circle, on one thread or
on several.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

from k42.errors import Error


class _Making:
    """A representative that a thread makes now; `done` is locked until it has."""

    __slots__ = ("done", "thread")

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.done = threading.Lock()
        self.done.acquire()


# Which thread waits for what.
_waits: dict[int, tuple[Reps, Hashable]] = {}


class Reps:
    """The representatives of one object by key: a processor, a cluster, or the one key of all."""

    __slots__ = ("_made", "_making")

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}
        self._making: dict[Hashable, _Making] = {}

    def all(self) -> tuple[Any, ...]:
        """Return the representatives, those made so far."""
        return tuple(self._made.copy().values())  # copy() is atomic, an iteration is not

    def clear(self) -> None:
        """Forget all representatives."""
        self._made.clear()

    def once(self, key: Hashable, make: Callable[[], Any], what: str) -> Any:
        """Return the representative of `key`; the first caller makes it, callers that race wait for it.

        If `make` raises, so does this, for the caller that made; one of those that wait tries next.
        Raises `Error` where waiting would never end; `what` names the object in its message.
        """
        me = threading.get_ident()
        mine = _Making(me)
        while True:
            making = self._making.setdefault(key, mine)
            if making is not mine:
                self._wait(me, key, making, what)
                continue
            try:
                if key not in self._made:
                    self._made[key] = make()
                return self._made[key]
            finally:
                del self._making[key]
                mine.done.release()

    def _wait(self, me: int, key: Hashable, making: _Making, what: str) -> None:
        """Wait until `key` is made or has failed; raise if whoever makes it waits for this thread."""
        outer = _waits.get(me)  # this call came from a finaliser that ran within another one
        # First say it, then look: of the threads that close a circle, the last to say so sees all of it.
        _waits[me] = (self, key)
        try:
            if self._leads_to(me, key):
                raise Error(
                    f"creating a representative of {what} calls {what} itself, which has none yet: "
                    "use self and self.root there, not the reference"
                )
            with making.done:
                pass
        finally:
            if outer is None:
                del _waits[me]
            else:
                _waits[me] = outer

    def _leads_to(self, me: int, key: Hashable) -> bool:
        """Whether the thread that makes `key`, or one that it waits for, waits for thread `me` in the end."""
        reps: Reps = self
        wanted = key
        for _ in range(len(_waits) + 1):  # a circle without this thread is not ours to report
            making = reps._making.get(wanted)
            if making is None:
                return False
            if making.thread == me:
                return True
            waits = _waits.get(making.thread)
            if waits is None:
                return False
            reps, wanted = waits
        return False
