"""Scenarios that every implementation of Clustered Objects must pass, each with real threads that meet at the races.

One test or a few a scenario, named as such; what single operations promise is in the other files.
"""

from __future__ import annotations

import gc
import re
import threading
from functools import partial

import pytest

import k42
from k42.structures import DistributedCounter
from k42.testing import PausePoint, memory_flat, race, wait_until


class Counting(k42.Object):
    """A distributed counter in Python, that remembers its misses; its root shows itself, without a call that misses."""

    class Root(k42.DistributedRoot):
        def __init__(self, shown):
            shown.append(self)
            self.misses = []

        def handle_miss(self):
            self.misses.append(k42.processors.current())
            return super().handle_miss()

    def __init__(self):
        self.n = 0

    def add(self, k=1):
        self.n += k


class Visited(k42.Object):
    """Runs what it is given, and tells which of its representatives were freed, and on the way out of what."""

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
        function()
        return id(self)


def index_of(reference):
    """Return the index of the object's entry in the global table, which `repr` tells."""
    return int(re.search(r", (\d+)>$", repr(reference))[1])


def drain():
    """Without a GIL, counts of references that other threads hold are merged by them or by a collection."""
    for _ in range(3):
        gc.collect()


def start(function):
    thread = threading.Thread(target=function)
    thread.start()
    return thread


# 1: processors that add to a distributed counter


@pytest.mark.parametrize("n", [1, 2, 8, 48])
def test_1_every_processor_adds(n):
    k = 4000 // n
    roots = []
    counter = Counting.create(roots)

    def work():
        for _ in range(k):
            counter.add()
        return k42.processors.current()

    used = race(*[work] * n)
    assert len(set(used)) == n
    assert sorted(roots[0].misses) == sorted(used)
    assert [rep.n for rep in roots[0].reps()] == [k] * n
    k42.destroy(counter)


def test_1_the_ready_made_counter():
    n, k = 8, 1000
    counter = DistributedCounter.create()

    def work():
        counter.add(0)
        rep = k42.local(counter)
        for _ in range(k):
            counter.add()
        return rep, k42.local(counter)

    found = race(*[work] * n)
    assert counter.value() == n * k
    assert all(first is last for first, last in found)
    assert len({id(rep) for rep, _ in found}) == n
    k42.destroy(counter)


# 2: first calls that race, with clusters of any size


@pytest.mark.parametrize("size", [1, 2, 3, 4, None], ids=lambda size: f"clusters of {size or 'all'}")
def test_2_first_calls_race(size):
    n, made = 8, []

    class Fresh(k42.Object):
        class Root({1: k42.DistributedRoot, None: k42.SharedRoot}.get(size, k42.ClusteredRoot)):
            def __init__(self):
                self.size = size
                self.all_miss = threading.Barrier(n)

            def handle_miss(self):
                self.all_miss.wait()
                return super().handle_miss()

            def create_rep(self):
                made.append(k42.processors.current())
                return super().create_rep()

        def touch(self):
            pass

    for _ in range(20):
        fresh = Fresh.create()

        def work(fresh=fresh):
            fresh.touch()
            return k42.processors.current(), k42.local(fresh)

        found = race(*[work] * n)
        members = {}
        for processor, rep in found:
            members.setdefault(rep, []).append(processor)
        clusters = {}
        for processor, _ in found:
            clusters.setdefault(0 if size is None else processor // size, []).append(processor)
        assert sorted(map(sorted, members.values())) == sorted(map(sorted, clusters.values()))
        # Each was made once, by one of its members; and all that were made are in use.
        assert len(made) == len(members)
        assert all(sum(processor in made for processor in each) == 1 for each in members.values())
        assert set(found[0][1].root.reps()) == set(members)
        made.clear()
        k42.destroy(fresh)


# 3: references are used again, not before quiescence, where they came from

MORE_THAN_A_RANGE = 1100  # entries of the global table come to processors 512 at a time


def test_3_an_index_is_used_again_after_quiescence_and_at_home():
    freed = []
    reference = Visited.create(freed)
    index = index_of(reference)

    def indices(n):
        made = [Visited.create([]) for _ in range(n)]
        found = [index_of(ref) for ref in made]
        assert len(set(found)) == n
        for ref in made:
            assert k42.destroy(ref)
        return found

    with PausePoint() as inside:
        thread = start(lambda: reference.run(inside))
        inside.reached()
        assert k42.destroy(reference) is False
        # A request may still use it: nobody gets it, here or elsewhere.
        assert index not in indices(MORE_THAN_A_RANGE)
        assert index not in race(partial(indices, MORE_THAN_A_RANGE))[0]
        assert freed == []
        inside.resume()
        thread.join()
    drain()
    assert len(freed) == 1
    # Now its home processor has it, which is this one, and no other.
    while k42.processors.count() < 3:
        race(*[k42.processors.current] * 3)
    for elsewhere in race(*[partial(indices, MORE_THAN_A_RANGE)] * 2):
        assert index not in elsewhere
    # What others returned comes after what this processor freed itself, and before a new range.
    made = [Visited.create([])]
    while index_of(made[-1]) != index and len(made) < 100_000:
        made.append(Visited.create([]))
    assert index_of(made[-1]) == index
    for ref in made:
        k42.destroy(ref)


def test_3_the_last_one_freed_is_the_first_one_used():
    references = [Visited.create([]) for _ in range(3)]
    freed = [index_of(ref) for ref in references]
    for ref in references:
        k42.destroy(ref)
    again = [Visited.create([]) for _ in range(3)]
    assert [index_of(ref) for ref in again] == freed[::-1]
    for ref in again:
        k42.destroy(ref)


def test_3_a_double_free_is_rejected_and_changes_nothing():
    n = 4
    freed = []
    for _ in range(30):
        reference = Visited.create(freed)
        reference.touch()

        def free(reference=reference):
            try:
                k42.destroy(reference)
            except k42.Destroyed:
                return 0
            return 1

        assert sum(race(*[free] * n)) == 1
        assert free() == 0
    drain()
    assert len(freed) == 30
    # Had an index come to a free list twice, two of these would share it.
    made = race(*[lambda: [Visited.create([]) for _ in range(MORE_THAN_A_RANGE)]] * n)
    live = [ref for refs in made for ref in refs]
    assert len({index_of(ref) for ref in live}) == len(live)
    for ref in live:
        k42.destroy(ref)


@pytest.mark.parametrize("invalid", [None, 0, 7, "reference", Visited, object()])
def test_3_an_invalid_free_is_rejected(invalid):
    with pytest.raises(TypeError, match="needs a reference"):
        k42.destroy(invalid)


def test_3_a_representative_cannot_be_freed():
    reference = Visited.create([])
    with pytest.raises(TypeError, match="needs a reference"):
        k42.destroy(k42.local(reference))
    assert reference.touch()
    k42.destroy(reference)


# 4: quiescence waits for the requests from before, and for no others


def test_4_a_mark_waits_for_earlier_requests_alone():
    freed = []
    doomed, other = Visited.create(freed), Visited.create([])
    race(*[doomed.touch] * 6)  # representatives of processors that nobody uses now
    earlier, later = [PausePoint() for _ in range(3)], [PausePoint() for _ in range(3)]
    threads = [start(partial(doomed.run, point)) for point in earlier]
    try:
        for point in earlier:
            point.reached()
        reps = len(k42.local(doomed).root.reps())
        assert k42.destroy(doomed) is False
        for point in later:
            threads.append(start(partial(other.run, point)))
            point.reached()
        for point in earlier:
            drain()
            assert freed == []
            point.resume()
        wait_until(lambda: (gc.collect(), len(freed) >= reps)[1])
        # The later ones are all still inside.
        assert all(thread.is_alive() for thread in threads[3:])
    finally:
        for point in (*earlier, *later):
            point.resume()
        for thread in threads:
            thread.join()
    drain()
    assert len(freed) == reps >= 6
    k42.destroy(other)


def test_4_requests_that_follow_each_other_without_end_do_not_delay_it():
    """A processor that is inside of a request whenever one looks, though never of the same one."""
    freed, stop = [], threading.Event()
    doomed, other = Visited.create(freed), Visited.create([])
    baton: list[PausePoint] = [PausePoint()]

    def busy():
        doomed.touch()
        while not stop.is_set():
            other.run(baton[-1])

    thread = start(busy)
    try:
        baton[-1].reached()
        doomed.touch()
        assert k42.destroy(doomed) is False  # its processor is inside: of what, nobody can tell
        assert freed == []
        old = baton[-1]
        baton.append(PausePoint())
        old.resume()
        baton[-1].reached()
        drain()
        assert len(freed) == 2
    finally:
        stop.set()
        for point in baton:
            point.resume()
        thread.join()
    k42.destroy(other)


# 5: destroyed while calls are inside


@pytest.mark.parametrize("n", [1, 5])
def test_5_destroy_while_calls_are_inside(n):
    freed = []
    reference = Visited.create(freed)
    points = [PausePoint() for _ in range(n)]

    def destroy():
        for point in points:
            point.reached()
        try:
            assert k42.destroy(reference) is False
            # New callers: on a processor that has a representative, on one that has none, and those that race.
            for _ in range(2):
                for call in (reference.touch, partial(reference.run, int), partial(k42.local, reference)):
                    with pytest.raises(k42.Destroyed):
                        call()
                race(*[partial(pytest.raises, k42.Destroyed, reference.touch)] * 3)
            drain()
            assert freed == []
        finally:
            for point in points:
                point.resume()

    *reps, _ = race(*(partial(reference.run, point) for point in points), destroy)
    drain()
    assert len(set(reps)) == n
    assert sorted(freed) == sorted(reps)


def test_5_destroyed_from_inside_of_a_call_that_others_are_inside_of():
    freed = []
    reference = Visited.create(freed)
    with PausePoint() as outer:

        def inner():
            outer.reached()
            assert k42.destroy(reference) is False
            with pytest.raises(k42.Destroyed):
                reference.touch()
            outer.resume()

        reps = race(partial(reference.run, outer), partial(reference.run, inner))
    drain()
    assert sorted(freed) == sorted(reps)


def test_5_destruction_races_calls_that_go_in_and_out():
    n, rounds = 3, 60
    outcomes = []
    for _ in range(rounds):
        freed = []
        reference = Visited.create(freed)

        def call(reference=reference):
            seen = set()
            try:
                while True:
                    seen.add(reference.run(reference.touch))
            except k42.Destroyed:
                return seen

        def destroy(reference=reference):
            reference.touch()
            return k42.destroy(reference)

        *seen, _ = race(*[call] * n, destroy)
        assert all(len(reps) <= 1 for reps in seen)
        outcomes.append((seen, freed))
    drain()
    for seen, freed in outcomes:
        # One a processor that got in, and one of the destroyer; one that was made too late is freed like the others.
        assert 1 + sum(map(len, seen)) <= len(freed) <= n + 1


# Many


@pytest.mark.timeout(600)  # without a GIL, 3.13 takes up to a millisecond to start a thread
def test_threads_that_come_and_go_leave_nothing():
    """10^5 of them: no processor, no representative, no memory more than the eight at a time need."""
    width, waves, roots = 8, 12_500, []
    counter, counting = DistributedCounter.create(), Counting.create(roots)

    def work():
        counter.add()
        counting.add()

    def wave():
        threads = [threading.Thread(target=work) for _ in range(width)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    before = k42.processors.count()  # this thread's is one of them
    memory_flat(wave, waves)
    assert counter.value() == width * waves
    root, reps = roots[0], roots[0].reps()
    assert sum(rep.n for rep in reps) == width * waves
    assert len(reps) == len(root.misses) == len(set(root.misses)) <= width
    assert k42.processors.count() <= max(before, width + 1)
    for ref in (counter, counting):
        k42.destroy(ref)


@pytest.mark.timeout(600)
def test_a_million_objects_that_come_and_go():
    """Made, called and destroyed: what 3.13 without a GIL keeps of them for ever is there when it is warm."""

    class Brief(k42.Object):
        def touch(self):
            pass

    def cycle():
        for _ in range(1000):
            ref = Brief.create()
            ref.touch()
            k42.destroy(ref)

    memory_flat(cycle, 1000)
