"""The I/O queue of a file representative: bounded threads, and faults that wait go before what is only read ahead.

The threads come when there is work for them and go when there is none for a while.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import logging
import os
import threading
import weakref
from collections.abc import Callable

log = logging.getLogger("k42.io")

_IDLE = 5.0  # seconds without work after which a thread ends
_PREFETCH_QUEUED = 4  # jobs a thread that may wait before the oldest is dropped


class _State(enum.Enum):
    QUEUED = 1
    TAKEN = 2  # runs, ran, or was dropped


class Job:
    """Work that was submitted: see `IoQueue.submit`."""

    __slots__ = ("_drop", "_queue", "_run", "_state", "_urgent")

    def __init__(
        self, queue: IoQueue, run: Callable[[], object], drop: Callable[[], object] | None, *, urgent: bool
    ) -> None:
        self._queue = weakref.ref(queue)
        self._run = run
        self._drop = drop
        self._urgent = urgent
        self._state = _State.QUEUED  # under the queue's lock, as is `_urgent`

    def promote(self) -> None:
        """Somebody waits for it now: it becomes urgent, if it has not begun."""
        if (queue := self._queue()) is not None:
            queue._promote(self)


class IoQueue:
    """Runs jobs in threads of its own.

    Args:
        name: for the names of the threads.
        concurrency: how many jobs run at once, at most. One of several is kept for urgent ones.
        idle: seconds without work after which a thread ends.
    """

    def __init__(self, name: str, concurrency: int, *, idle: float = _IDLE) -> None:
        if concurrency < 1:
            raise ValueError("a queue needs at least one thread")
        self._name = name
        self._concurrency = concurrency
        self._prefetching_limit = max(1, concurrency - 1)
        self._idle_limit = idle
        # Protects all that follows, and the state of jobs. The last in the order of locks: no job and no `drop` is
        # called with it.
        self._lock = threading.Lock()
        self._urgent: collections.deque[Job] = collections.deque()
        self._prefetch: collections.OrderedDict[Job, None] = collections.OrderedDict()
        self._threads: set[threading.Thread] = set()
        self._idle: list[threading.Condition] = []  # of the threads that wait for work and that nobody called yet
        self._prefetching = 0  # prefetch jobs that run
        self._running = 0
        self._closed = False
        self._submitted = self._done = self._dropped = self._failed = self._started = 0

    def submit(
        self, run: Callable[[], object], drop: Callable[[], object] | None = None, *, urgent: bool = True
    ) -> Job:
        """Has `run` called on an I/O thread. Never waits for a job.

        Args:
            run: the work; an exception is logged and counted, so it should tell whom it concerns by itself.
            drop: called instead of `run`, once, if the job is dropped, which happens to jobs that are not urgent: by
                whoever submits or closes.
            urgent: a fault waits for it.

        Raises:
            RuntimeError: the queue is closed, or Linux gives it not even one thread; neither is called then.
        """
        job = Job(self, run, drop, urgent=urgent)
        overtaken: list[Job] = []
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the I/O queue of {self._name} is closed")
            if urgent:
                self._urgent.append(job)
            else:
                self._prefetch[job] = None
            try:
                self._call_a_thread()
            except RuntimeError:
                self._urgent.remove(job) if urgent else self._prefetch.pop(job)
                raise
            self._submitted += 1
            while len(self._prefetch) > _PREFETCH_QUEUED * self._concurrency:
                overtaken.append(self._take_to_drop())
        self._drop_all(overtaken)
        return job

    def drop_prefetches(self) -> None:
        """Drops the prefetch jobs that have not begun: what they would read is not wanted any more."""
        with self._lock:
            dropped = [self._take_to_drop() for _ in range(len(self._prefetch))]
        self._drop_all(dropped)

    def close(self) -> None:
        """Takes no more jobs, drops prefetches, and returns when all other jobs have run and the threads have ended.

        Not to be called by a job. May be called again.
        """
        with self._lock:
            self._closed = True
            dropped = [self._take_to_drop() for _ in range(len(self._prefetch))]
            while self._idle:
                self._idle.pop().notify()
        self._drop_all(dropped)
        while True:
            with self._lock:
                thread = next(iter(self._threads), None)
            if thread is None:
                return
            thread.join()

    def counts(self) -> dict[str, int]:
        """What happened so far, and what goes on."""
        with self._lock:
            return {
                "submitted": self._submitted,
                "done": self._done,
                "dropped": self._dropped,
                "failed": self._failed,
                "queued_urgent": len(self._urgent),
                "queued_prefetch": len(self._prefetch),
                "running": self._running,
                "threads": len(self._threads),
                "threads_started": self._started,
            }

    def _promote(self, job: Job) -> None:
        with self._lock:
            if job._state is _State.TAKEN or job._urgent:
                return
            del self._prefetch[job]
            job._urgent = True
            self._urgent.append(job)
            # The thread that its submission called may have been too many for prefetches.
            with contextlib.suppress(RuntimeError):
                self._call_a_thread()

    def _take_to_drop(self) -> Job:
        job, _ = self._prefetch.popitem(last=False)
        job._state = _State.TAKEN
        self._dropped += 1
        return job

    def _drop_all(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job._drop is not None:
                try:
                    job._drop()
                except Exception:
                    log.exception("a job of %s that was dropped", self._name)

    def _call_a_thread(self) -> None:
        """With the lock: wakes a thread that waits, or starts one."""
        if self._idle:
            self._idle.pop().notify()  # who came last: its caches are warm, and the others may end
        elif len(self._threads) < self._concurrency:
            thread = threading.Thread(target=self._serve, name=f"k42-io-{self._name[-40:]}", daemon=True)
            self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError:
                self._threads.remove(thread)
                if not self._threads:
                    raise
            else:
                self._started += 1

    def _serve(self) -> None:
        # A thread begins with the affinity of who started it, which may be a worker that is bound to a CPU.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
        called = threading.Condition(self._lock)
        with self._lock:
            while (job := self._next(called)) is not None:
                job._state = _State.TAKEN
                prefetch = not job._urgent
                self._prefetching += prefetch
                self._running += 1
                self._lock.release()
                failed = False
                try:
                    job._run()
                except BaseException:
                    failed = True
                    log.exception("a job of %s", self._name)
                finally:
                    del job  # with what it holds, before this thread waits
                    self._lock.acquire()
                self._running -= 1
                self._prefetching -= prefetch
                self._done += 1
                self._failed += failed
            self._threads.remove(threading.current_thread())

    def _next(self, called: threading.Condition) -> Job | None:
        """With the lock: the next job to run; None: this thread ends."""
        while True:
            if self._urgent:
                return self._urgent.popleft()
            if self._prefetch and self._prefetching < self._prefetching_limit:
                return self._prefetch.popitem(last=False)[0]
            if self._closed:
                return None
            self._idle.append(called)
            called.wait(self._idle_limit)
            if called in self._idle:  # nobody called, so there is nothing to do
                self._idle.remove(called)
                return None
