"""Roots: which processors share a representative, who makes it, and what happens to it at the end."""

from __future__ import annotations

import gc
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest

import k42
from k42.testing import PausePoint, race, wait_until

N = 8


class Seen(k42.Object):
    """Tells which representative serves the caller."""

    def who(self):
        return k42.processors.current(), self

    def root_of(self):
        return self.root


def roots(base, **attributes):
    made = []

    def init(self):
        made.append(self)

    root = type("Root", (base,), {"__init__": init, "__slots__": (), **attributes})
    return type("Made", (Seen,), {"Root": root}), made


@pytest.mark.parametrize("size", [1, 2, 3, 4, 1000])
def test_clusters_by_size(size):
    cls, made = roots(k42.ClusteredRoot, size=size)
    ref = cls.create()

    def work():
        return *ref.who(), k42.local(ref)

    seen = race(*[work] * N)
    clusters = {}
    for processor, rep, local in seen:
        assert rep is ref or rep is local  # `return self` in a tuple is the representative itself
        clusters.setdefault(processor // size, set()).add(local)
    assert all(len(reps) == 1 for reps in clusters.values())
    assert len(set.union(*clusters.values())) == len(clusters) == len(made[0].reps())
    # Threads of a test take the lowest free processors: with this thread's they are 0 to N.
    assert math.ceil(N / size) <= len(clusters) <= math.ceil((N + 1) / size)
    k42.destroy(ref)


@pytest.mark.parametrize("size", [0, -1])
def test_clusters_of_no_size(size):
    cls, _ = roots(k42.ClusteredRoot, size=size)
    ref = cls.create()
    with pytest.raises(ValueError, match=r"Root\.size must be at least 1"):
        ref.who()
    k42.destroy(ref)


def test_clusters_by_node():
    cls, made = roots(k42.ClusteredRoot)
    ref = cls.create()
    cpus = k42.processors.topology().cpus
    pinned = [cpus[i % len(cpus)] for i in range(N)]

    def work(cpu):
        k42.processors.pin(cpu)
        return k42.processors.node(), ref.who()[1]

    seen = race(*[lambda cpu=cpu: work(cpu) for cpu in pinned])
    nodes = {}
    for node, rep in seen:
        nodes.setdefault(node, set()).add(rep)
    assert all(len(reps) == 1 for reps in nodes.values())
    assert len(made[0].reps()) == len(nodes)
    k42.destroy(ref)


# Partitions


class Scores(k42.Object):
    LIMIT = 3

    class Root(k42.PartitionedRoot):
        partitions = 8

    def __init__(self):
        self.lock, self.scores = threading.Lock(), {}

    def score(self, player, points=1):
        with self.lock:
            self.scores[player] = self.scores.get(player, 0) + points
        return self

    def __getitem__(self, player):
        return self.scores[player]

    @k42.global_method
    def __len__(self):
        return sum(self.root.gather(lambda rep: len(rep.scores)))

    @k42.global_method
    def total(self):
        return sum(self.root.gather(lambda rep: sum(rep.scores.values())))

    @k42.global_method
    def double_all(self):
        self.root.scatter(lambda rep: rep.scores.update({p: 2 * n for p, n in rep.scores.items()}))

    @k42.global_method
    def score_two(self, a, b):
        self.score(a)
        self.score(b)

    @property
    def parts(self):
        return len(self.root.reps())

    @staticmethod
    def twice(x):
        return 2 * x

    @classmethod
    def name(cls):
        return cls.__name__


def test_partitions():
    scores = Scores.create()
    assert scores.parts == 0
    scores.score(3)
    scores.score(11)  # the same partition
    assert scores.parts == 1
    race(*[lambda: [scores.score(k) for k in range(32)]] * 4)
    assert scores.parts == 8
    assert scores[3] == 5
    assert scores.total() == 2 + 4 * 32
    assert len(scores) == 32
    scores.double_all()
    assert scores.total() == 2 * (2 + 4 * 32)
    scores.score_two(100, 101)
    assert scores[100] == scores[101] == 1
    assert scores.score(7) is scores
    assert scores.score("x", points=5) is scores
    assert (scores.LIMIT, scores.twice(2), scores.name()) == (3, 4, "Scores")
    with pytest.raises(TypeError, match=r"Scores\.score\(\) takes the key as its first argument"):
        scores.score(player=3)
    with pytest.raises(TypeError, match="unhashable"):
        scores.score([])
    with pytest.raises(AttributeError):
        scores.parts = 3
    k42.destroy(scores)


def test_racing_first_calls_for_one_partition():
    made = []

    class Counted(Scores):
        def __init__(self):
            super().__init__()
            made.append(self)

    scores = Counted.create()
    race(*[lambda: scores.score(1)] * N)
    assert len(made) == 1
    assert scores.total() == N
    k42.destroy(scores)


def test_hooks_of_partitions():
    ended = []

    class Ending(Scores):
        def on_release(self):
            ended.append(sum(self.scores.values()))

    scores = Ending.create()
    for key in range(5):
        scores.score(key, key + 1)
    k42.destroy(scores)
    assert sorted(ended) == [1, 2, 3, 4, 5]


# User-defined


def test_uninstalled_representatives():
    class Drifting(Seen):
        class Root(k42.Root):
            def __init__(self):
                self.misses, self.alive = 0, 0

            def handle_miss(self):
                self.misses += 1
                return k42.uninstalled(self.create_rep())

        def __init__(self):
            self.root.alive += 1

        def __del__(self):
            self.root.alive -= 1

        def down(self, n):
            return self.root.ref.down(n - 1) + 1 if n else self.root.alive

    ref = Drifting.create()
    root = ref.root_of()
    for i in range(1, 100):
        ref.who()
        gc.collect(0)
        assert root.misses == i + 1
        assert root.alive <= 1 + (sys.version_info >= (3, 13)) * 2
    assert ref.down(5) == 11  # six representatives, each in use until the request ends, and five calls
    with k42.request():
        ref.who()
        ref.who()
    gc.collect()
    assert root.alive <= 1 + (sys.version_info >= (3, 13)) * 2
    before = len(gc.get_objects())
    for _ in range(1000):
        ref.root_of()
    gc.collect()
    assert len(gc.get_objects()) - before < 50
    k42.destroy(ref)


def test_what_handle_miss_may_return():
    class Chosen(Seen):
        class Root(k42.Root):
            def handle_miss(self):
                return answer[0]

    ref = Chosen.create()
    rep = Chosen.__new__(Chosen)
    for bad in (None, ref, k42.uninstalled(None), k42.uninstalled(ref)):
        answer = [bad]
        with pytest.raises(TypeError, match="must return a representative"):
            ref.who()
    answer = [k42.uninstalled(rep)]
    assert ref.who()[1] is rep
    answer = [rep]
    assert ref.who()[1] is rep
    answer = [None]
    assert ref.who()[1] is rep  # installed now
    k42.destroy(ref)


def test_gather_and_scatter_while_processors_join():
    class Joined(Seen):
        class Root(k42.DistributedRoot):
            pass

        def __init__(self):
            self.n, self.marks = 0, 0

        def add(self):
            self.n += 1

        def mark(self):
            def mark(rep):
                rep.marks += 1
                time.sleep(0.001)

            with self.root.locked_reps() as reps:
                self.root.scatter(mark)  # the lock may be taken again
                assert self.root.gather(lambda rep: rep) == list(reps) == list(self.root.reps())

    ref = Joined.create()
    n, rounds = 6, 10

    def come_and_go():
        for _ in range(rounds):
            thread = threading.Thread(target=ref.add)
            thread.start()
            thread.join()

    race(*[come_and_go] * n, *[lambda: [ref.mark() for _ in range(rounds)]] * 2)
    root = ref.root_of()
    assert sum(root.gather(lambda rep: rep.n)) == n * rounds
    assert max(root.gather(lambda rep: rep.marks)) <= 2 * rounds
    with pytest.raises(ZeroDivisionError):
        root.gather(lambda rep: 1 / 0)
    ref.mark()  # the lock is free
    k42.destroy(ref)


def test_no_representative_joins_while_one_has_the_lock():
    cls, made = roots(k42.DistributedRoot)
    ref = cls.create()
    ref.who()
    with made[0].locked_reps() as reps:
        assert len(reps) == 1
        thread = threading.Thread(target=ref.who)
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        assert made[0].reps() == reps
    thread.join()
    assert len(made[0].reps()) == 2
    k42.destroy(ref)


# Hooks


def hooked(log, base=k42.DistributedRoot):
    class Hooked(Seen):
        class Root(base):
            pass

        def __init__(self):
            self.made_by = threading.get_ident()

        def on_release(self):
            log.append((self.made_by, threading.get_ident(), k42.processors.current()))

        def run(self, function):
            return function()

    return Hooked


def test_hooks_run_on_the_threads_that_own_the_processors():
    log = []
    ref, other = hooked(log).create(), Seen.create()
    met, destroyed = threading.Barrier(4), threading.Event()

    def work():
        ref.who()
        met.wait()
        destroyed.wait()
        other.who()  # between two of its calls
        return threading.get_ident()

    def destroy():
        met.wait()
        assert k42.destroy(ref) is True
        assert log == []
        destroyed.set()

    *owners, _ = race(*[work] * 3, destroy)
    assert sorted(log) == sorted((owner, owner, p) for owner, _, p in log)
    assert sorted(owner for owner, _, _ in log) == sorted(owners)
    k42.destroy(other)


def test_a_hook_runs_at_the_end_of_a_thread():
    log = []
    ref = hooked(log).create()
    with PausePoint() as used:
        thread = threading.Thread(target=lambda: (ref.who(), used()))
        thread.start()
        used.reached()
        k42.destroy(ref)
        assert log == []
        used.resume()
        thread.join()
    assert [(made, ran) for made, ran, _ in log] == [(thread.ident, thread.ident)]


def test_a_hook_of_a_processor_that_nobody_owns_runs_on_the_next_owner():
    log = []
    ref = hooked(log).create()
    race(ref.who, ref.who)
    k42.destroy(ref)
    assert log == []
    others = k42.processors.count() - 1
    adopters = race(*[lambda: (k42.processors.current(), threading.get_ident())] * others)
    assert len(log) == 2
    assert {(p, thread) for _, thread, p in log} <= set(adopters)


def test_a_hook_runs_once_whatever_happens():
    log = []
    for _ in range(30):
        ref = hooked(log, k42.SharedRoot).create()

        def work(ref=ref):
            try:
                while True:
                    ref.who()
            except k42.Destroyed:
                pass

        race(work, work, lambda ref=ref: (ref.who(), k42.destroy(ref)))
    other = Seen.create()
    other.who()
    race(*[other.who] * (k42.processors.count() - 1))
    assert len(log) == 30
    k42.destroy(other)


def test_a_hook_that_raises_is_reported_and_the_others_run(monkeypatch):
    reported, ended = [], []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable.exc_value))

    class Failing(Seen):
        class Root(k42.PartitionedRoot):
            pass

        def touch(self, key):
            pass

        def on_release(self):
            ended.append(1)
            raise KeyError("in a hook")

    ref = Failing.create()
    for key in range(3):
        ref.touch(key)
    k42.destroy(ref)
    assert len(ended) == len(reported) == 3
    assert all(isinstance(error, KeyError) for error in reported)


def test_a_hook_may_use_the_root_and_other_objects():
    seen, other = [], Seen.create()

    class Talking(Seen):
        def on_release(self):
            seen.append((isinstance(self.root, k42.SharedRoot), other.who()[0]))
            with pytest.raises(k42.Destroyed):
                self.root.ref.who()

    ref = Talking.create()
    ref.who()
    with k42.request():
        k42.destroy(ref)
        assert seen == []
    assert seen == [(True, k42.processors.current())]
    k42.destroy(other)


def test_a_hook_of_an_object_that_nobody_refers_to():
    log = []

    def drop():
        ref = hooked(log, k42.SharedRoot).create()
        ref.who()

    drop()
    gc.collect()
    gc.collect()
    assert len(log) == 1


AT_EXIT = """
import threading
import k42
class Last(k42.Object):
    class Root(k42.DistributedRoot):
        pass
    def touch(self): pass
    def on_release(self): print("hook", flush=True)
used = threading.Event()
def work():
    for ref in refs: ref.touch()
    used.set()
    if stays: threading.Event().wait()
for stays in (False, True):
    refs = [Last.create() for _ in range(2)]
    used.clear()
    thread = threading.Thread(target=work, daemon=stays)
    thread.start()
    used.wait()
    if not stays: thread.join()
    for ref in refs: k42.destroy(ref)
print("leaving", flush=True)
"""


def test_the_rest_of_the_hooks_runs_at_the_end_of_the_program():
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines.count("hook") == 4
    assert lines.index("leaving") <= 2  # those of the thread that is gone may have run on the next one


# Creation


def test_a_creation_that_raises_leaves_nothing():
    class Failing(Seen):
        class Root(k42.DistributedRoot):
            fails = True

        def __init__(self):
            if self.root.fails:
                raise OSError("no more")

    ref = Failing.create()
    for _ in range(3):
        with pytest.raises(OSError, match="no more"):
            ref.who()

    def fail():
        with pytest.raises(OSError, match="no more"):
            ref.who()

    race(*[fail] * 4)
    Failing.Root.fails = False
    reps = {rep for _, rep in race(*[ref.who] * 4)}
    assert len(reps) == 4
    assert k42.destroy(ref)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("root", [k42.SharedRoot, k42.DistributedRoot])
def test_fork_in_the_middle_of_a_creation(root):
    with PausePoint() as creating:

        class Slow(Seen):
            class Root(root):
                def __init__(self):
                    self.slow = True

            def __init__(self):
                if self.root.slow:
                    creating()

        ref = Slow.create()
        thread = threading.Thread(target=ref.who)
        thread.start()
        creating.reached()
        waiting = [threading.Thread(target=ref.who) for _ in range(2)]
        for one in waiting:
            one.start()
        time.sleep(0.05)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            ok = False
            try:
                signal.alarm(20)
                creating.resume()
                reps = {id(rep) for _, rep in (ref.who(), *race(ref.who, ref.who))}
                ok = len(reps) in (1, 3) and k42.destroy(ref)
            finally:
                os._exit(0 if ok else 1)
        creating.resume()
        for one in (thread, *waiting):
            one.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    wait_until(lambda: k42.destroy(ref))
