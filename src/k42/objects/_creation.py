"""Representatives that are made exactly once: one thread makes, those that race with it wait.

Making a representative runs the user's code, so no lock is held meanwhile. What could deadlock is found
before anyone waits: a representative whose creation calls its own object, and objects whose creations call
each other in a circle, on one thread or on several.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

from k42.errors import Error


class _Making:
    """A representative that a thread makes now."""

    __slots__ = ("done", "thread")

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.done: threading.Event | None = None  # made by the first that waits; most never have one


# Which thread waits for what; consulted only by threads that are about to wait.
_waits: dict[int, tuple[Reps, Hashable]] = {}
_waits_lock = threading.Lock()  # protects _waits; taken inside of a Reps' lock, nothing is taken under it


class Reps:
    """The representatives of one object by key: a processor, a cluster, or the one key of all."""

    __slots__ = ("_lock", "_made", "_making")

    def __init__(self) -> None:
        self._lock = threading.Lock()  # protects the two below; held for a few dictionary operations
        self._made: dict[Hashable, Any] = {}
        self._making: dict[Hashable, _Making] = {}

    def all(self) -> tuple[Any, ...]:
        """Return the representatives, those made so far."""
        with self._lock:
            return tuple(self._made.values())

    def clear(self) -> None:
        """Forget all representatives."""
        with self._lock:
            self._made.clear()

    def once(self, key: Hashable, make: Callable[[], Any], what: str) -> Any:
        """Return the representative of `key`; the first caller makes it, callers that race wait for it.

        If `make` raises, so does this, for the caller that made; one of those that wait tries next.
        Raises `Error` where waiting would never end; `what` names the object in its message.
        """
        me = threading.get_ident()
        while True:
            with self._lock:
                if key in self._made:
                    return self._made[key]
                making = self._making.get(key)
                if making is None:
                    making = self._making[key] = _Making(me)
                    break
                self._check_circle(me, key, what)
                if making.done is None:
                    making.done = threading.Event()
                done = making.done
            try:
                done.wait()
            finally:
                with _waits_lock:
                    del _waits[me]
        try:
            rep = make()
            with self._lock:
                self._made[key] = rep
            return rep
        finally:
            with self._lock:
                del self._making[key]
                if making.done is not None:
                    making.done.set()

    def _check_circle(self, me: int, key: Hashable, what: str) -> None:
        """Note that this thread waits for `key`; raise if the one that makes it waits for this thread."""
        reps: Reps = self
        wanted = key
        with _waits_lock:
            while (making := reps._making.get(wanted)) is not None:
                if making.thread == me:
                    raise Error(
                        f"creating a representative of {what} calls {what} itself, which has none yet: "
                        "use self and self.root there, not the reference"
                    )
                waits = _waits.get(making.thread)
                if waits is None:
                    break
                reps, wanted = waits
            _waits[me] = (self, key)
