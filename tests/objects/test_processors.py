"""Processors, misses and representatives, with real threads."""

from __future__ import annotations

import gc
import os
import threading

import pytest

import k42


class Counter(k42.Object):
    class Root(k42.DistributedRoot):
        def __init__(self):
            self.misses = []

        def handle_miss(self):
            self.misses.append(k42.processors.current())
            return super().handle_miss()

    def __init__(self):
        self.n = 0

    def add(self, k=1):
        self.n += k

    def value(self):
        return sum(rep.n for rep in self.root.reps())

    def anatomy(self):
        return self.root, self.root.reps()


class Once(k42.Object):
    """Shared: the barrier makes creation overlap with the other first calls."""

    class Root(k42.SharedRoot):
        def __init__(self, n):
            self.racing = threading.Semaphore(0)
            self.n, self.created, self.misses = n, [], []

        def handle_miss(self):
            self.misses.append(k42.processors.current())
            self.racing.release()
            return super().handle_miss()

        def create_rep(self):
            for _ in range(self.n):
                self.racing.acquire()
            self.created.append(threading.get_ident())
            return super().create_rep()

    def root_and_rep(self):
        return self.root, id(self)


def test_a_distributed_counter_is_exact(in_threads):
    n, k = 8, 2000
    counter = Counter.create()

    def work(_):
        for _ in range(k):
            counter.add()
        return k42.processors.current()

    used = in_threads(n, work)
    root, reps = k42.local(counter).root, k42.local(counter).root.reps()
    assert len(set(used)) == n
    assert sorted(root.misses)[: n + 1] == sorted({*used, k42.processors.current()})[: n + 1]
    assert len(root.misses) == len(set(root.misses)) == len(reps)
    assert {rep.n for rep in reps} <= {0, k}
    assert counter.value() == n * k
    k42.destroy(counter)


def test_each_processor_misses_once(in_threads):
    n = 8
    counter = Counter.create()
    in_threads(n, lambda _: [counter.add() for _ in range(100)])
    root = in_threads(1, lambda _: k42.local(counter).root)[0]  # on a processor that has a representative
    assert len(root.misses) == n
    assert len(root.reps()) == n
    assert sum(rep.n for rep in root.reps()) == n * 100
    k42.destroy(counter)


def test_racing_first_calls_on_a_shared_object(in_threads):
    n = 8
    once = Once.create(n)
    results = in_threads(n, lambda _: once.root_and_rep())
    assert len(set(results)) == 1
    root = results[0][0]
    assert len(root.created) == 1
    assert len(root.misses) == n
    assert len(root.reps()) == 1
    k42.destroy(once)


def test_racing_first_calls_on_a_distributed_object(in_threads):
    n = 8
    counter = Counter.create()
    roots = in_threads(n, lambda _: counter.anatomy()[0])
    assert len(set(roots)) == 1
    assert len(roots[0].reps()) == n
    assert len({id(rep) for rep in roots[0].reps()}) == n
    assert len(set(roots[0].misses)) == n
    k42.destroy(counter)


def test_more_processors_than_bits_in_a_word(in_threads):
    n = 100
    counter = Counter.create()
    in_threads(n, lambda _: counter.add())
    assert k42.processors.count() >= n
    assert counter.value() == n
    k42.destroy(counter)


def test_threads_come_and_go():
    width, waves = 8, 400
    counter = Counter.create()
    seen = set()

    def work():
        counter.add()
        seen.add(k42.processors.current())

    before = k42.processors.count()
    for _ in range(waves):
        threads = [threading.Thread(target=work) for _ in range(width)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    root = k42.local(counter).root
    assert counter.value() == width * waves
    assert len(seen) <= width
    assert len(root.reps()) <= width + 1  # and the one of this thread
    assert len(root.misses) == len(root.reps())
    assert k42.processors.count() <= max(before, width + 1)
    k42.destroy(counter)


def test_a_thread_keeps_its_processor(in_threads):
    ids = in_threads(6, lambda _: {k42.processors.current() for _ in range(100)})
    assert all(len(i) == 1 for i in ids)
    assert len(set.union(*ids)) == 6
    assert all(0 <= i < k42.processors.count() for i in set.union(*ids))


def test_a_failing_creation_is_tried_again(in_threads):
    class Fails(k42.Object):
        class Root(k42.SharedRoot):
            def __init__(self):
                self.left = 3

            def create_rep(self):
                if self.left:
                    self.left -= 1
                    raise OSError(self.left)
                return super().create_rep()

        def ok(self):
            return True

    fails = Fails.create()
    for left in (2, 1, 0):
        with pytest.raises(OSError, match=str(left)):
            fails.ok()
    assert fails.ok()
    k42.destroy(fails)

    def attempt(_):
        try:
            return again.ok()
        except OSError:
            return False

    again = Fails.create()
    assert sorted(in_threads(8, attempt)) == [False] * 3 + [True] * 5
    k42.destroy(again)


@pytest.mark.parametrize("root", [k42.SharedRoot, k42.DistributedRoot])
def test_creating_a_representative_that_calls_its_own_object(root):
    class Selfish(k42.Object):
        Root = root

        def __init__(self):
            self.root.ref.ok()

        def ok(self):
            return True

    selfish = Selfish.create()
    for _ in range(2):
        with pytest.raises(k42.Error, match="Selfish itself"):
            selfish.ok()
    k42.destroy(selfish)


def test_creations_that_call_each_other_on_two_threads(in_threads):
    both_inside = threading.Barrier(2)

    class Crossed(k42.Object):
        class Root(k42.SharedRoot):
            def __init__(self):
                self.other, self.first = None, True

        def __init__(self):
            if self.root.first:
                self.root.first = False
                both_inside.wait()
            self.root.other.ok()

        def ok(self):
            return True

    a, b = Crossed.create(), Crossed.create()
    roots = []
    for ref, other in ((a, b), (b, a)):
        # The root is reached without a call: that would create.
        root = next(r for r in gc.get_referents(ref) if isinstance(r, k42.Root))
        root.other = other
        roots.append(root)

    def call(i):
        try:
            return (a, b)[i].ok()
        except k42.Error:
            return "circle"

    assert "circle" in in_threads(2, call)
    for ref in (a, b):
        k42.destroy(ref)


def test_handle_miss_must_return_a_representative():
    class Nothing(k42.Object):
        class Root(k42.Root):
            def handle_miss(self):
                return None

        def ok(self):
            return True

    class Unfinished(k42.Object):
        Root = k42.Root

        def ok(self):
            return True

    nothing, unfinished = Nothing.create(), Unfinished.create()
    with pytest.raises(TypeError, match="representative"):
        nothing.ok()
    with pytest.raises(NotImplementedError):
        unfinished.ok()
    for ref in (nothing, unfinished):
        k42.destroy(ref)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_the_child_of_a_fork_has_one_thread(in_threads):
    counter, inside, leave = Counter.create(), threading.Event(), threading.Event()

    class Holder(k42.Object):
        def hold(self):
            inside.set()
            leave.wait()

    holder = Holder.create()
    thread = threading.Thread(target=holder.hold)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        ok = False
        try:
            counter.add()
            ok = k42.destroy(counter) and k42.destroy(holder)  # nobody is inside any more
        finally:
            os._exit(0 if ok else 1)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert k42.destroy(holder)
    assert k42.destroy(counter)


def test_finalisers_may_call_while_representatives_are_made():
    """The collector runs them between any two steps, on the thread that makes."""

    class Log(k42.Object):
        class Root(k42.DistributedRoot):
            pass

        def __init__(self):
            self.n = 0

        def add(self):
            self.n += 1

    class Noisy:
        def __init__(self):
            self.me = self

        def __del__(self):
            logs[0].add()
            Log.create().add()

    logs = [Log.create()]
    logs[0].add()
    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(300):
            Noisy()
            ref = Log.create()
            ref.add()
            k42.destroy(ref)
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    k42.destroy(logs[0])
