"""Destruction: new calls fail, running calls finish, everything is released once."""

from __future__ import annotations

import gc
import sys
import threading
import weakref

import pytest

import k42

GIL = getattr(sys, "_is_gil_enabled", lambda: True)()


class Tracked(k42.Object):
    class Root(k42.DistributedRoot):
        def __init__(self, freed):
            self.freed = freed

    def __init__(self):
        self.freed = self.root.freed

    def __del__(self):
        self.freed.append(id(self))

    def touch(self):
        return id(self)

    def run(self, function):
        return function(self)

    @property
    def prop(self):
        return 1

    def __len__(self):
        return 1


def drain():
    """Reference counts that other threads hold are merged by them or by a collection."""
    for _ in range(3):
        gc.collect()


def test_calls_after_destroy_raise():
    ref = Tracked.create([])
    ref.touch()
    assert k42.destroy(ref) is True
    for call in (
        ref.touch,
        lambda: ref.prop,
        lambda: len(ref),
        lambda: k42.local(ref),
        lambda: k42.destroy(ref),
    ):
        with pytest.raises(k42.Destroyed, match="Tracked has been destroyed"):
            call()
    assert issubclass(k42.Destroyed, k42.Error)


def test_destroy_before_the_first_call():
    ref = Tracked.create([])
    assert k42.destroy(ref) is True
    with pytest.raises(k42.Destroyed):
        ref.touch()


def test_each_representative_is_freed_once(in_threads):
    freed = []
    ref = Tracked.create(freed)
    reps = in_threads(6, lambda _: ref.touch())
    assert freed == []
    assert k42.destroy(ref)
    drain()
    assert sorted(freed) == sorted(reps)


def test_destroy_inside_a_call_on_the_object():
    freed = []
    ref = Tracked.create(freed)

    def inside(rep):
        assert k42.destroy(ref) is False
        with pytest.raises(k42.Destroyed):
            ref.touch()
        assert freed == []
        return rep.touch()

    mine = ref.run(inside)
    drain()
    assert freed == [mine]


def test_destroy_while_another_thread_is_inside(in_threads):
    freed = []
    ref = Tracked.create(freed)
    inside, destroyed, results = threading.Event(), threading.Event(), []

    def hold(rep):
        inside.set()
        destroyed.wait()
        assert not freed
        return rep.touch()

    thread = threading.Thread(target=lambda: results.append(ref.run(hold)))
    thread.start()
    inside.wait()
    mine = ref.touch()
    assert k42.destroy(ref) is False
    with pytest.raises(k42.Destroyed):
        ref.touch()
    drain()
    assert freed == []
    destroyed.set()
    thread.join()
    drain()
    assert sorted(freed) == sorted([mine, *results])


def test_later_requests_do_not_delay():
    freed = []
    ref, other = Tracked.create(freed), Tracked.create([])
    inside, go, inside2, go2 = (threading.Event() for _ in range(4))

    def hold(entered, leave):
        return lambda _: (entered.set(), leave.wait())

    def body():
        ref.run(hold(inside, go))
        other.run(hold(inside2, go2))

    thread = threading.Thread(target=body)
    thread.start()
    inside.wait()
    assert k42.destroy(ref) is False
    go.set()
    inside2.wait()
    drain()
    assert len(freed) == 1
    go2.set()
    thread.join()
    k42.destroy(other)


def test_an_exception_survives_the_release():
    ref = Tracked.create([])

    def inside(rep):
        k42.destroy(ref)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ref.run(inside)


def test_a_release_may_use_other_objects():
    other = Tracked.create([])

    class Talks(k42.Object):
        def __init__(self):
            pass

        def ok(self):
            return True

        def __del__(self):
            k42.destroy(other)

    ref = Talks.create()
    ref.ok()
    k42.destroy(ref)
    drain()
    with pytest.raises(k42.Destroyed):
        other.touch()


def test_destroy_races_calls(in_threads):
    rounds, n = 50, 4
    freed, made = [], []
    for _ in range(rounds):
        ref = Tracked.create(freed)

        def work(i, ref=ref):
            if i == 0:
                for _ in range(20):
                    ref.touch()
                return k42.destroy(ref)
            seen = set()
            try:
                while True:
                    seen.add(ref.touch())
            except k42.Destroyed:
                return seen

        in_threads(n, work)
        made.append(ref)
    drain()
    for ref in made:
        with pytest.raises(k42.Destroyed):
            ref.touch()
    assert rounds <= len(freed) <= rounds * n


def test_two_threads_destroy_one_object(in_threads):
    for _ in range(50):
        ref = Tracked.create([])

        def work(_, ref=ref):
            try:
                k42.destroy(ref)
            except k42.Destroyed:
                return 0
            return 1

        assert sum(in_threads(4, work)) == 1


def test_stale_references_never_reach_a_successor():
    stale = []
    for _ in range(300):
        ref = Tracked.create([])
        ref.touch()
        k42.destroy(ref)
        stale.append(ref)
    live = Tracked.create([])
    live.touch()
    for ref in stale:
        with pytest.raises(k42.Destroyed):
            ref.touch()
    k42.destroy(live)


def test_the_class_is_not_kept_by_its_objects():
    if not GIL:
        pytest.skip("functions behind descriptors are immortal without a GIL")

    class Short(k42.Object):
        def ok(self):
            return True

    alive = weakref.ref(Short)
    ref = Short.create()
    ref.ok()
    k42.destroy(ref)
    del ref, Short
    gc.collect()
    assert alive() is None


def test_memory_is_flat():
    class Plain(k42.Object):
        def ok(self):
            pass

    def cycle(n):
        for _ in range(n):
            ref = Plain.create()
            ref.ok()
            k42.destroy(ref)

    cycle(1000)
    gc.collect()
    counts = [sys.getrefcount(o) for o in (Plain, k42.SharedRoot, None, Plain.ok)]
    blocks, objects = sys.getallocatedblocks(), len(gc.get_objects())
    cycle(100_000)
    gc.collect()
    after = [sys.getrefcount(o) for o in (Plain, k42.SharedRoot, None, Plain.ok)]
    assert all(abs(x - y) < 50 for x, y in zip(counts, after, strict=True))
    assert abs(sys.getallocatedblocks() - blocks) < 500
    assert abs(len(gc.get_objects()) - objects) < 100
