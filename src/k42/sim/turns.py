"""Programs that run by turns, in one process: one at a time, each until it says whose turn is next.

With a GIL they are greenlets: a switch takes a fraction of a microsecond, where between threads it takes ten and more.
On free-threaded Python they are threads, since greenlet makes it use a GIL from its import on. Both give the same runs.
"""

from __future__ import annotations

import contextlib
import sysconfig
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

MAIN = -1
"""The number of who started the programs; its turn comes when a program ends, or fails, or says so."""

_Program = Callable[[], object]


class Ended(BaseException):
    """Unwinds a program that is not to go on."""


class Turns(Protocol):
    """Whose turn it is."""

    def switch(self, me: int, to: int) -> None:
        """Let another go on; returns when it is the caller's turn again.

        Args:
            me: the caller's number, or `MAIN`.
            to: whose turn it is.

        Raises:
            BaseException: to `MAIN`, what a program raised.
        """

    def waiting(self) -> int:
        """Return how many programs have not ended."""

    def end(self) -> None:
        """End those that are left, by `Ended`. By `MAIN`."""


class _Greenlets:
    def __init__(self, programs: Sequence[_Program]) -> None:
        import greenlet

        self._main: Any = greenlet.getcurrent()
        self._all: list[Any] = [greenlet.greenlet(self._live) for _ in programs]
        # Each begins here: it counts the depth of its calls from where it was begun.
        for each, program in zip(self._all, programs, strict=True):
            each.switch(program)

    def switch(self, _me: int, to: int) -> None:
        (self._main if to == MAIN else self._all[to]).switch()

    def waiting(self) -> int:
        return sum(not each.dead for each in self._all)

    def _live(self, program: _Program) -> None:
        self._main.switch()
        program()

    def end(self) -> None:
        for each in self._all:
            if not each.dead:
                with contextlib.suppress(BaseException):  # what comes of unwinding a program in the middle
                    each.throw(Ended)


class _Threads:
    def __init__(self, programs: Sequence[_Program]) -> None:
        # Whose turn it is has the baton; all else here is changed only with it. The last is the main program's.
        self._batons = [threading.Semaphore(0) for _ in range(len(programs) + 1)]
        self._failure: BaseException | None = None
        self._ending = False
        self._threads = {
            number: threading.Thread(target=self._live, args=(number, program), name=f"k42-sim-{number}", daemon=True)
            for number, program in enumerate(programs)
        }
        for thread in self._threads.values():
            thread.start()

    def switch(self, me: int, to: int) -> None:
        self._batons[to].release()
        self._await(me)

    def waiting(self) -> int:
        return len(self._threads)

    def end(self) -> None:
        self._ending = True
        for number, thread in list(self._threads.items()):
            self._batons[number].release()
            thread.join()

    def _await(self, me: int) -> None:
        self._batons[me].acquire()
        if me == MAIN:
            if self._failure is not None:
                raise self._failure
        elif self._ending:
            raise Ended

    def _live(self, number: int, program: _Program) -> None:
        try:
            self._await(number)
            program()
        except BaseException as failure:
            if not self._ending:
                self._failure = failure
        del self._threads[number]
        self._batons[MAIN].release()


def turns(programs: Sequence[_Program]) -> Turns:
    """Return the turns of programs, none of which has begun."""
    return _Threads(programs) if sysconfig.get_config_var("Py_GIL_DISABLED") else _Greenlets(programs)
