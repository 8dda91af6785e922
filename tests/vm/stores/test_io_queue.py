from __future__ import annotations

import collections
import os
import random
import sys
import threading

import pytest
from vm_support import until

from k42.vm.io import IoQueue


@pytest.fixture
def queue():
    """Makes queues when called, and closes them."""
    made = []

    def make(concurrency, **options):
        made.append(IoQueue("test", concurrency, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


class Held:
    """A job that runs until it is let go."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.go = threading.Event()

    def __call__(self) -> None:
        self.began.set()
        assert self.go.wait(30)


def test_there_are_no_threads_without_work(queue):
    q = queue(4, idle=0.02)
    assert q.counts()["threads"] == 0
    done = threading.Event()
    q.submit(done.set)
    assert done.wait(30)
    until(lambda: q.counts()["threads"] == 0, "the thread ends")
    assert q.counts()["threads_started"] == 1
    q.submit(done.set)
    until(lambda: q.counts()["done"] == 2, "it runs again")


def test_a_thread_serves_one_job_after_the_other(queue):
    q = queue(8)
    for n in range(1, 50):
        q.submit(lambda: None)
        until(lambda n=n: q.counts()["done"] == n and q.counts()["running"] == 0, "it ran")
    assert q.counts()["threads_started"] <= 2


def test_no_more_threads_than_the_store_likes(queue):
    q = queue(3)
    jobs = [Held() for _ in range(10)]
    for job in jobs:
        q.submit(job)
    until(lambda: sum(job.began.is_set() for job in jobs) == 3, "three run")
    assert q.counts()["running"] == q.counts()["threads"] == 3
    assert q.counts()["queued_urgent"] == 7
    for job in jobs:
        job.go.set()
    until(lambda: q.counts()["done"] == 10, "all run")
    assert q.counts()["threads_started"] == 3


def test_a_fault_does_not_wait_for_what_is_read_ahead(queue):
    q = queue(3)
    ahead = [Held() for _ in range(10)]
    for job in ahead:
        q.submit(job, urgent=False)
    until(lambda: sum(job.began.is_set() for job in ahead) == 2, "one thread is kept free")
    urgent = threading.Event()
    q.submit(urgent.set)
    assert urgent.wait(30)
    order = []
    q.submit(lambda: order.append("first"))
    for job in ahead:
        job.go.set()
    until(lambda: q.counts()["done"] == 12, "all run")


def test_one_thread_takes_urgent_jobs_first(queue):
    q = queue(1)
    gate = Held()
    order: list[str] = []
    q.submit(gate)
    q.submit(lambda: order.append("ahead 1"), urgent=False)
    job = q.submit(lambda: order.append("ahead 2"), urgent=False)
    q.submit(lambda: order.append("urgent"))
    job.promote()
    job.promote()
    gate.go.set()
    until(lambda: len(order) == 3, "all run")
    assert order == ["urgent", "ahead 2", "ahead 1"]
    job.promote()  # too late: nothing happens
    assert q.counts()["submitted"] == 4


def test_the_oldest_prefetch_goes_when_too_many_wait(queue):
    q = queue(1)
    gate = Held()
    q.submit(gate)
    assert gate.began.wait(30)
    ran, dropped = [], []
    for n in range(7):
        q.submit(lambda n=n: ran.append(n), lambda n=n: dropped.append(n), urgent=False)
    assert dropped == [0, 1, 2]
    q.submit(lambda: ran.append("urgent"))
    gate.go.set()
    until(lambda: len(ran) == 5, "the rest runs")
    assert ran == ["urgent", 3, 4, 5, 6]
    assert q.counts()["dropped"] == 3


def test_prefetches_are_dropped_on_demand(queue):
    q = queue(1)
    gate = Held()
    q.submit(gate)
    dropped = []
    q.submit(lambda: None, lambda: dropped.append(1), urgent=False)
    q.submit(lambda: None, urgent=False)
    q.drop_prefetches()
    assert dropped == [1]
    assert q.counts()["queued_prefetch"] == 0
    gate.go.set()


def test_closing_runs_what_waits_and_drops_what_does_not(queue):
    q = queue(2)
    gates = [Held(), Held()]
    for gate in gates:
        q.submit(gate)
    ran, dropped = [], []
    q.submit(lambda: ran.append("urgent"))
    q.submit(lambda: ran.append("ahead"), lambda: dropped.append("ahead"), urgent=False)
    closer = threading.Thread(target=q.close)
    closer.start()
    until(lambda: dropped, "it is dropped at once")
    with pytest.raises(RuntimeError, match="closed"):
        q.submit(lambda: ran.append("late"))
    assert closer.is_alive()
    for gate in gates:
        gate.go.set()
    closer.join(30)
    assert not closer.is_alive()
    assert (ran, dropped) == (["urgent"], ["ahead"])
    assert q.counts()["threads"] == 0
    q.close()


def test_a_job_that_raises_harms_nobody(queue, caplog):
    q = queue(1)

    def fail():
        raise ValueError("oops")

    q.submit(fail)
    q.submit(lambda: sys.exit(1))
    done = threading.Event()
    q.submit(done.set)
    assert done.wait(30)
    until(lambda: q.counts()["running"] == 0, "done")
    assert q.counts()["failed"] == 2
    assert q.counts()["threads_started"] == 1
    assert "oops" in caplog.text


def test_jobs_may_submit_jobs(queue):
    q = queue(2)
    done = threading.Event()

    def chain(n):
        if n:
            q.submit(lambda: chain(n - 1), urgent=n % 2 == 0)
        else:
            done.set()

    q.submit(lambda: chain(200))
    assert done.wait(30)


def test_io_threads_are_not_bound_to_the_cpu_of_who_submits(queue):
    q = queue(1)
    masks = []
    everywhere = os.sched_getaffinity(os.getpid())

    def submit():
        os.sched_setaffinity(0, {min(everywhere)})
        q.submit(lambda: masks.append(os.sched_getaffinity(0)))

    thread = threading.Thread(target=submit)
    thread.start()
    thread.join()
    until(lambda: masks, "it ran")
    assert masks == [everywhere]


@pytest.mark.parametrize("concurrency", [1, 2, 5])
def test_each_job_runs_or_is_dropped_exactly_once(queue, concurrency):
    """Threads come and go all the time while others submit, promote and drop; the end is a close in the middle."""
    for round_ in range(4):
        q = queue(concurrency, idle=0.0005)
        fates: collections.Counter[tuple[int, int]] = collections.Counter()
        lock = threading.Lock()
        running = peak = 0
        refused = 0

        def happen(key, urgent, fates=fates, lock=lock):
            with lock:
                fates[key] += 1
                if urgent is None:
                    assert key[1] % 2

        def work(key, lock=lock, happen=happen):
            nonlocal running, peak
            with lock:
                running += 1
                peak = max(peak, running)
            happen(key, urgent=True)
            with lock:
                running -= 1

        def submit(me, q=q, lock=lock, happen=happen, work=work, seed=round_):
            nonlocal refused
            chance = random.Random(seed * 10 + me)
            pause = threading.Event()
            for n in range(600):
                key = (me, n)
                try:
                    job = q.submit(lambda key=key: work(key), lambda key=key: happen(key, None), urgent=n % 2 == 0)
                except RuntimeError:
                    with lock:
                        refused += 1
                    happen(key, urgent=True)
                    continue
                if chance.random() < 0.2:
                    job.promote()
                if chance.random() < 0.02:
                    q.drop_prefetches()
                if chance.random() < 0.02:
                    pause.wait(0.001)

        submitters = [threading.Thread(target=submit, args=(me,)) for me in range(3)]
        for thread in submitters:
            thread.start()
        if round_ % 2:
            until(lambda q=q: q.counts()["submitted"] > 500, "some are under way")
            q.close()
        for thread in submitters:
            thread.join()
        if round_ == 0:  # all that wait are served without a close
            until(lambda q=q: q.counts()["done"] + q.counts()["dropped"] == 1800, "all are served")
        q.close()
        counts = q.counts()
        assert set(fates.values()) == {1}
        assert len(fates) == 1800
        assert counts["submitted"] == counts["done"] + counts["dropped"] == 1800 - refused
        assert counts["failed"] == counts["threads"] == counts["running"] == 0
        assert peak <= concurrency
