"""Threads that meet where a test wants them to."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_GRACE = 5.0  # seconds that threads have to end once one of them has failed
_PATIENCE = 60.0  # seconds after which a thread that should come is taken for lost


def race(*functions: Callable[[], Any]) -> list[Any]:
    """Run each function in a thread of its own; all start together, and no thread ends before all have finished.

    So each thread has a processor of its own, which no other takes over. Where one function raises while others wait
    for it, they are left behind after a few seconds, so that the cause is seen instead of a test that hangs.

    Returns:
        What the functions returned, in their order.

    Raises:
        The first exception that a function raised; notes tell of the others, and of functions left behind.

    >>> from k42.testing import race
    >>> race(lambda: 1, lambda: 2)
    [1, 2]
    """
    start = threading.Barrier(len(functions) + 1)
    leave = threading.Event()
    finished: queue.SimpleQueue[tuple[int, BaseException | None]] = queue.SimpleQueue()
    results: list[Any] = [None] * len(functions)

    def body(i: int) -> None:
        failure: BaseException | None = None
        start.wait()
        try:
            results[i] = functions[i]()
        except BaseException as error:
            failure = error
        finished.put((i, failure))
        leave.wait()

    threads = [threading.Thread(target=body, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    start.wait()
    running = set(range(len(functions)))
    failures: list[BaseException] = []
    deadline = None
    try:
        while running:
            i, failure = finished.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            running.discard(i)
            if failure is not None:
                failures.append(failure)
                deadline = deadline or time.monotonic() + _GRACE
    except queue.Empty:
        failures[0].add_note(f"left behind, still running: {', '.join(f'function {i}' for i in sorted(running))}")
    finally:
        leave.set()
    for i, thread in enumerate(threads):
        if i not in running:
            thread.join()
    if failures:
        for other in failures[1:]:
            failures[0].add_note(f"another function raised {other!r}")
        raise failures[0]
    return results


@contextmanager
def frequent_switches(interval: float = 1e-6) -> Iterator[None]:
    """Let the interpreter switch threads as often as it can, in the `with` block.

    With a GIL a thread runs 5 ms before another one has its turn, longer than most races take; without one this
    changes nothing.

    Args:
        interval: seconds, as in `sys.setswitchinterval`.

    >>> from k42.testing import frequent_switches
    >>> with frequent_switches():
    ...     print(sys.getswitchinterval())
    1e-06
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def wait_until(predicate: Callable[[], object], timeout: float = _PATIENCE) -> None:
    """Wait until `predicate()` is true, for what says nothing when it happens.

    Args:
        predicate: called again and again, on this thread; at most 20 ms apart.
        timeout: seconds.

    Raises:
        TimeoutError: it never was.

    >>> from k42.testing import wait_until
    >>> thread = threading.Thread(target=lambda: None)
    >>> thread.start()
    >>> wait_until(lambda: not thread.is_alive())
    """
    deadline = time.monotonic() + timeout
    pause = 0.0001
    while not predicate():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{getattr(predicate, '__qualname__', predicate)} was not true within {timeout:g} s")
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


class PausePoint:
    """A point in the code of one thread where it stops until another lets it go on.

    The one calls the point; the other waits until it is there, does what is to happen meanwhile, and resumes it.
    At the end of the `with` block it is resumed in any case.

    >>> from k42.testing import PausePoint
    >>> steps = []
    >>> with PausePoint() as point:
    ...     thread = threading.Thread(target=lambda: (steps.append("begun"), point(), steps.append("ended")))
    ...     thread.start()
    ...     point.reached()
    ...     steps.append("meanwhile")
    >>> thread.join()
    >>> steps
    ['begun', 'meanwhile', 'ended']
    """

    def __init__(self) -> None:
        self._there, self._go_on = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        """Say that the calling thread is here, and stop until `resume`; arguments are ignored.

        Raises:
            TimeoutError: nobody called `resume` for a minute.
        """
        self._there.set()
        if not self._go_on.wait(_PATIENCE):
            raise TimeoutError("paused, and nobody called resume()")

    def reached(self) -> None:
        """Wait until a thread is at this point.

        Raises:
            TimeoutError: none came for a minute.
        """
        if not self._there.wait(_PATIENCE):
            raise TimeoutError("no thread came to this pause point")

    def resume(self) -> None:
        """Let whoever is here, or comes later, go on."""
        self._go_on.set()

    def __enter__(self) -> PausePoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.resume()
