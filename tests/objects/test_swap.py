"""Hot-swapping: another implementation for an object that is in use. No call is lost, repeated, or waits for ever."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
import time
import warnings
from collections import Counter as Tally

import pytest

import k42
from k42.structures.counter import IMPLEMENTATIONS, AtomicCounter, DistributedCounter, PackedCounter, SharedCounter
from k42.testing import PausePoint, frequent_switches, memory_flat, race, wait_until


class Hits(k42.Object):
    """The interface: counts in one number, or in parts whose sum is the count."""

    transfers = ("count",)

    def __init__(self):
        self.lock, self.n = threading.Lock(), 0

    def add(self, k=1):
        with self.lock:
            self.n += k

    def add_below(self, depth):
        """Adds one for each level, through the reference."""
        self.add()
        return 1 + self.root.ref.add_below(depth - 1) if depth else 1

    def run(self, function):
        return function(self)

    def export_state(self, form):
        assert form == "count"
        return self.n

    def import_state(self, form, states):
        assert form == "count"
        self.n = sum(states)

    def value(self):
        with self.root.locked_reps() as reps:
            return sum(rep.n for rep in reps)

    def each(self):
        yield from range(self.n)


class SharedHits(Hits):
    class Root(k42.SharedRoot):
        pass


class ClusteredHits(Hits):
    class Root(k42.ClusteredRoot):
        size = 2


class DistributedHits(Hits):
    class Root(k42.DistributedRoot):
        pass


KINDS = (SharedHits, DistributedHits, ClusteredHits)


def start(function):
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def hooks_run():
    """Every processor's owner has run the hooks that waited for it: this thread, and one for each other processor."""
    SharedHits.create().add()
    others = k42.processors.count() - 1
    if others:
        race(*[k42.processors.current] * others)


class Callers:
    """Threads that call until they are told to stop; what they raised is raised at the end."""

    def __init__(self, *functions):
        self.stop, self.errors = threading.Event(), []
        self.done = [0] * len(functions)
        self.threads = [threading.Thread(target=self._body, args=(i, f)) for i, f in enumerate(functions)]

    def _body(self, i, function):
        try:
            while not self.stop.is_set():
                self.done[i] += function()
        except BaseException as error:
            self.errors.append(error)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        for thread in self.threads:
            thread.join()
        if self.errors and error[0] is None:
            raise self.errors[0]

    def __call__(self):
        return sum(self.done)


# Under load


def add(ref):
    return lambda: (ref.add(), 1)[1]


def newcomer(ref):
    """A first touch each time: by a thread that ends."""

    def body():
        thread = start(ref.add)
        thread.join()
        return 1

    return body


def test_6_swapped_under_continuous_calls_recursion_and_first_touches():
    ref = SharedHits.create()
    functions = (add(ref), add(ref), lambda: ref.add_below(5), newcomer(ref))
    with frequent_switches(1e-4), Callers(*functions) as callers:
        for kind in itertools.islice(itertools.cycle(KINDS[1:] + KINDS[:1]), 90):
            assert k42.swap(ref, kind) is None
            assert isinstance(ref, kind)
        before = callers()
        wait_until(lambda: callers() > before)  # they go on
    assert ref.value() == callers() > 0
    assert k42.destroy(ref)


def test_ten_thousand_swaps_under_load():
    """Totals exact, memory flat."""
    ref = SharedHits.create()
    kinds = itertools.cycle((DistributedHits, SharedHits))
    with frequent_switches(1e-4), Callers(add(ref)) as callers:
        memory_flat(lambda: k42.swap(ref, next(kinds)), 10_000)
    assert ref.value() == callers()
    assert k42.destroy(ref)


@pytest.mark.parametrize("source", IMPLEMENTATIONS)
def test_native_counters_under_native_calls(source):
    counter = source.create(7)

    def many():
        for _ in range(100):
            counter.add()
        return 100

    with frequent_switches(1e-4), Callers(many, many, newcomer(counter)) as callers:
        for target in itertools.islice(itertools.cycle(IMPLEMENTATIONS), 40):
            k42.swap(counter, target)
            assert isinstance(counter, target)
            assert counter.value() >= 7
    assert counter.value() == counter.approximate() == 7 + callers()
    k42.destroy(counter)


def test_native_and_python_implementations_of_one_interface():
    class PythonCounter(k42.structures.Counter):
        class Root(k42.SharedRoot):
            def __init__(self, start=0):
                self.lock, self.n = threading.Lock(), start

            def export_state(self, form):
                return self.n

            def import_state(self, form, state):
                self.n = state

        def add(self, k=1):
            with self.root.lock:
                self.root.n += k

        def value(self):
            return self.root.n

        approximate = value

        def time_adds(self, calls, start):
            raise NotImplementedError

    counter = AtomicCounter.create(1)
    with Callers(add(counter)) as callers:
        for target in (
            PythonCounter,
            DistributedCounter,
            PythonCounter,
            PackedCounter,
            PythonCounter,
            SharedCounter,
        ) * 5:
            k42.swap(counter, target)
    assert counter.value() == 1 + callers()
    k42.destroy(counter)


# Waits that could be circles


class Chained(k42.Object):
    """Calls others, which call back: A, B, A."""

    transfers = ("counts",)

    class Root(k42.DistributedRoot):
        def __init__(self, other=None):
            self.other = other

        def export_state(self, form):
            return self.other

        def import_state(self, form, state):
            self.other = state

    def __init__(self):
        self.lock, self.n = threading.Lock(), 0

    def visit(self, depth):
        with self.lock:
            self.n += 1
        if depth:
            self.root.other.visit(depth - 1)

    def connect(self, other):
        self.root.other = other

    def total(self):
        return sum(rep.n for rep in self.root.reps())

    def export_state(self, form):
        return self.n

    def import_state(self, form, states):
        self.n = sum(states)


class SharedChained(Chained):
    class Root(k42.SharedRoot, Chained.Root):
        handle_miss = k42.SharedRoot.handle_miss
        _key = k42.SharedRoot._key
        _processor = k42.SharedRoot._processor


def test_objects_that_call_each_other_while_both_are_swapped_all_the_time():
    a, b = Chained.create(), SharedChained.create()
    a.connect(b)
    b.connect(a)

    def swapping(ref):
        kinds = itertools.cycle((SharedChained, Chained))

        def swap():
            try:
                k42.swap(ref, next(kinds), timeout=0.2)
            except k42.SwapRefused:
                pass  # that is a possible end; waiting for ever is none
            return 0

        return swap

    def visiting(ref):
        return lambda: (ref.visit(4), 5)[1]

    with frequent_switches(1e-4), Callers(visiting(a), visiting(b), swapping(a), swapping(b)) as callers:
        wait_until(lambda: min(callers.done[:2]) >= 1000)
    assert a.total() + b.total() == callers()
    for ref in (a, b):
        k42.destroy(ref)


def test_an_older_request_behind_a_lock_that_a_younger_one_holds():
    ref = SharedHits.create()
    lock, inside = threading.Lock(), threading.Event()

    def older(rep):
        inside.set()
        held.wait()
        with lock:
            rep.add()

    held = threading.Event()

    def younger():
        with lock:
            held.set()
            for _ in range(20):
                ref.add()

    def swap():
        inside.wait()
        second = start(younger)
        k42.swap(ref, DistributedHits)
        second.join()

    race(lambda: ref.run(older), swap)
    assert ref.value() == 21
    k42.destroy(ref)


def test_threads_that_swap_one_object():
    ref = SharedHits.create()

    def swapping(kinds):
        def body():
            for kind in kinds * 8:
                k42.swap(ref, kind, timeout=60)

        return body

    with Callers(add(ref)) as callers:
        race(swapping(KINDS), swapping(KINDS[::-1]), swapping(KINDS[1:]))
    assert ref.value() == callers()
    k42.destroy(ref)


def test_swaps_whose_transfers_call_each_others_objects():
    """Neither can end before the other: one is refused, and then the other is not."""
    meeting = threading.Barrier(2)
    refs = []

    class Crossed(SharedHits):
        class Root(k42.SharedRoot):
            def __init__(self, other):
                self.other = other

            def export_state(self, form):
                with_other = self.other
                meeting.wait()
                refs[with_other].add()
                return with_other

            def import_state(self, form, state):
                self.other = state

    refs.extend([Crossed.create(1), Crossed.create(0)])
    for ref in refs:
        ref.add()

    def swap(i):
        try:
            k42.swap(refs[i], SharedHits)
        except k42.SwapRefused as refused:
            assert isinstance(refused.__cause__, k42.Error)  # noqa: PT017
            return 0
        return 1

    swapped = race(lambda: swap(0), lambda: swap(1))
    assert sum(swapped) == 1
    assert [type(k42.local(ref)) for ref in refs] == [SharedHits if s else Crossed for s in swapped]
    assert sum(ref.value() for ref in refs) == 3
    for ref in refs:
        k42.destroy(ref)


@pytest.mark.parametrize("reps", [1, 3])
def test_a_transfer_that_calls_its_own_object(reps):
    class Selfish(DistributedHits):
        def export_state(self, form):
            self.root.ref.add()

        def import_state(self, form, states):
            self.root.ref.add()

    ref = Selfish.create()
    race(*[ref.add] * reps)
    for kind in (SharedHits, Selfish):
        with pytest.raises(k42.SwapRefused, match=r"use self and self\.root") as refused:
            k42.swap(ref, kind)
        assert isinstance(refused.value.__cause__, k42.Error)
        assert isinstance(ref, Selfish) or kind is Selfish
        assert ref.value() == reps
    k42.destroy(ref)
    ref = DistributedHits.create()
    race(*[ref.add] * reps)
    with pytest.raises(k42.SwapRefused):
        k42.swap(ref, Selfish)
    assert ref.value() == reps
    k42.destroy(ref)


def test_a_transfer_may_look_at_the_reference():
    """repr() and isinstance() do not wait for the swap."""
    seen = []

    class Looking(SharedHits):
        def export_state(self, form):
            ref = self.root.ref
            seen.append((repr(ref), isinstance(ref, Looking), race(lambda: repr(ref))[0]))
            return self.n

    ref = Looking.create()
    ref.add()
    k42.swap(ref, SharedHits)
    ((mine, is_one, of_another),) = seen
    assert mine == of_another
    assert "Looking" in mine
    assert is_one
    assert "SharedHits" in repr(ref)
    k42.destroy(ref)


# Refused at once


def test_swap_within_a_request():
    ref, other = SharedHits.create(), SharedHits.create()

    def inside(_):
        with pytest.raises(k42.SwapRefused, match="within a request"):
            k42.swap(ref, DistributedHits)

    ref.run(inside)
    other.run(inside)
    with k42.request():
        inside(None)

    class Eager(SharedHits):
        def export_state(self, form):
            inside(None)
            return self.n

    k42.swap(ref, Eager)
    ref.add()
    k42.swap(ref, SharedHits)
    assert ref.value() == 1
    for one in (ref, other):
        k42.destroy(one)


class Foreign(k42.Object):
    transfers = ("something else",)


def test_what_cannot_be_swapped():
    ref = SharedHits.create()
    ref.add(5)

    class Formless(SharedHits):
        transfers = ("other",)

    with pytest.raises(k42.SwapRefused, match=r"'count'.*'other'"):
        k42.swap(ref, Formless)
    with pytest.raises(TypeError, match="Foreign cannot replace SharedHits: it has no add, add_below, each"):
        k42.swap(ref, Foreign)
    for target in (None, 3, int, ref, k42.SharedRoot, SharedHits()):
        with pytest.raises(TypeError, match="derives"):
            k42.swap(ref, target)
    for nothing in (None, 3, SharedHits()):
        with pytest.raises(TypeError, match="needs a reference"):
            k42.swap(nothing, SharedHits)
    with pytest.raises(ValueError, match="NaN"):
        k42.swap(ref, SharedHits, timeout=float("nan"))
    with pytest.raises(TypeError):
        k42.swap(ref, SharedHits, timeout="soon")
    assert ref.value() == 5
    k42.destroy(ref)
    with pytest.raises(k42.Destroyed):
        k42.swap(ref, SharedHits)


class Broken(Exception):
    pass


def fails(*_):
    raise Broken("of itself")


def test_an_export_or_import_that_raises():
    class NoExport(DistributedHits):
        export_state = fails

    class NoImport(DistributedHits):
        import_state = fails

    class NoRootExport(DistributedHits):
        class Root(k42.DistributedRoot):
            export_state = fails

    class NoRootImport(DistributedHits):
        class Root(k42.DistributedRoot):
            import_state = fails

    class NoRep(DistributedHits):
        __init__ = fails

    for source, target in (
        (NoExport, SharedHits),
        (NoRootExport, SharedHits),
        (SharedHits, NoImport),
        (DistributedHits, NoImport),
        (SharedHits, NoRootImport),
        (SharedHits, NoRep),
    ):
        ref = source.create()
        race(*[ref.add] * 3)
        with Callers(add(ref)) as callers:
            for _ in range(3):
                with pytest.raises(k42.SwapRefused, match="of itself") as refused:
                    k42.swap(ref, target)
                assert isinstance(refused.value.__cause__, Broken)
                assert isinstance(ref, source)
        assert ref.value() == 3 + callers()
        k42.destroy(ref)


def test_a_new_root_that_raises():
    class NoRoot(SharedHits):
        class Root(k42.SharedRoot):
            def __init__(self):
                fails()

    class Sized(SharedHits):
        class Root(k42.SharedRoot):
            def __init__(self, size, *, name):
                self.size, self.name = size, name

        def what(self):
            return self.root.size, self.root.name

    ref = SharedHits.create()
    ref.add()
    with pytest.raises(Broken):
        k42.swap(ref, NoRoot)
    with pytest.raises(TypeError):
        k42.swap(ref, Sized)
    ref.add()
    assert isinstance(ref, SharedHits)
    k42.swap(ref, Sized, 3, name="x")
    assert k42.local(ref).what() == (3, "x")
    assert ref.value() == 2
    k42.destroy(ref)


# Negotiation and transfer


def formed(*forms):
    """A class that gives and takes these forms, and remembers which."""

    class Formed(k42.Object):
        transfers = forms

        class Root(k42.DistributedRoot):
            def __init__(self):
                self.log = []

            def export_state(self, form):
                return form

            def import_state(self, form, state):
                assert form == state
                self.log.append(form)

        def __init__(self):
            self.mine = [k42.processors.current()]

        def touch(self):
            return self.mine

        def log(self):
            return self.root.log

        def export_state(self, form):
            return self.mine

        def import_state(self, form, states):
            self.mine = states

    return Formed


@pytest.mark.parametrize(
    ("gives", "takes", "best"),
    [("abc", "abc", "a"), ("abc", "cb", "b"), ("ab", "ba", "a"), ("abcd", "dcx", "c"), ("xc", "abc", "c")],
)
def test_the_best_common_form(gives, takes, best):
    ref = formed(*gives).create()
    k42.swap(ref, formed(*takes))
    assert ref.log() == [best]
    k42.destroy(ref)


def test_each_representative_hands_over_to_that_of_its_processor():
    ref = formed("a").create()
    found = {}
    first, swapped, n = threading.Barrier(4), threading.Event(), 3

    def body():
        me = k42.processors.current()
        assert ref.touch() == [me]
        first.wait()
        swapped.wait()
        found[me] = ref.touch()

    threads = [start(body) for _ in range(n)]
    first.wait()
    k42.swap(ref, formed("a"))
    swapped.set()
    for thread in threads:
        thread.join()
    assert len(found) == n
    assert all(states == [[me]] for me, states in found.items())
    k42.destroy(ref)


def test_representatives_of_one_cluster_hand_over_together():
    ref = DistributedHits.create()
    race(*[lambda: ref.add(10)] * 6)
    k42.swap(ref, ClusteredHits)
    with_two = k42.local(ref).root.reps()
    assert sum(rep.n for rep in with_two) == ref.value() == 60
    assert len(with_two) <= 4
    k42.swap(ref, SharedHits)
    assert len(k42.local(ref).root.reps()) == 1
    assert ref.value() == 60
    k42.destroy(ref)


def test_to_and_from_partitions():
    class Scores(k42.Object):
        transfers = ("scores",)

        def __init__(self):
            self.lock, self.scores = threading.Lock(), {}

        def score(self, player):
            with self.lock:
                self.scores[player] = self.scores.get(player, 0) + 1

        def export_state(self, form):
            return self.scores

        @k42.global_method
        def all(self):
            return Tally({p: n for rep in self.root.reps() for p, n in rep.scores.items()})

    class Partitioned(Scores):
        class Root(k42.PartitionedRoot):
            partitions = 4

        def import_state(self, form, states):
            # Every partition is given everything.
            for state in states:
                self.scores |= {player: n for player, n in state.items() if self.root.rep_of(player) is self}

    class Shared(Scores):
        def import_state(self, form, states):
            for state in states:
                self.scores |= state

    ref = Shared.create()
    players = [f"p{i}" for i in range(50)]
    for _ in range(2):
        race(*[lambda: [ref.score(p) for p in players]] * 2)
        k42.swap(ref, Partitioned)
        race(*[lambda: [ref.score(p) for p in players]] * 2)
        k42.swap(ref, Shared)
    assert ref.all() == dict.fromkeys(players, 8)
    k42.destroy(ref)


def test_a_processor_that_touches_the_object_first_in_the_middle_of_a_swap():
    with PausePoint() as exporting:

        class Slow(SharedHits):
            def export_state(self, form):
                exporting()
                return self.n

        ref = Slow.create()
        ref.add(5)
        swapping = start(lambda: k42.swap(ref, DistributedHits))
        exporting.reached()
        kinds = []
        joining = start(lambda: (ref.add(), kinds.append(type(k42.local(ref)))))
        joining.join(0.2)
        assert joining.is_alive()
        exporting.resume()
        swapping.join()
        joining.join()
    assert kinds == [DistributedHits]
    assert ref.value() == 6
    k42.destroy(ref)


def test_an_object_that_nobody_has_called():
    ref = SharedHits.create()
    k42.swap(ref, DistributedHits, timeout=0)
    assert isinstance(ref, DistributedHits)
    assert "DistributedHits" in repr(ref)
    assert ref.value() == 0
    k42.destroy(ref)


# Kept


def test_the_old_object_lives_on():
    ended = []

    class Kept(DistributedHits):
        def on_release(self):
            ended.append(self.n)

    ref = Kept.create()
    race(*[lambda: ref.add(10)] * 2)
    old = k42.swap(ref, SharedHits, keep=True)
    assert old is not ref
    assert isinstance(old, Kept)
    assert isinstance(ref, SharedHits)
    assert ended == []  # their hooks run when that object ends
    assert old.value() == ref.value() == 20
    ref.add(1)
    old.add_below(3)  # through its own reference: that of the old object now
    assert (old.value(), ref.value()) == (24, 21)
    assert k42.destroy(ref)
    assert old.value() == 24
    assert k42.destroy(old)
    hooks_run()
    assert sorted(ended) == [4, 10, 10]


def test_a_kept_object_that_nobody_keeps_goes():
    ended = []

    class Kept(SharedHits):
        def on_release(self):
            ended.append(self.n)

    ref = Kept.create()
    ref.add()
    k42.destroy(k42.swap(ref, SharedHits, keep=True))
    assert ended == [1]
    ref.add()
    k42.destroy(ref)


# Destruction


def released(log):
    class Released(DistributedHits):
        class Root(k42.DistributedRoot):
            pass

        def on_release(self):
            log.append(self.n)

    return Released


@pytest.mark.parametrize("keep", [False, True])
def test_destroyed_during_a_swap(keep):
    log = []
    with PausePoint() as exporting:

        class Slow(released(log)):
            def export_state(self, form):
                exporting()
                return self.n

        ref, result = Slow.create(), []
        ref.add(3)
        swapping = start(lambda: result.append(k42.swap(ref, released(log), keep=keep)))
        exporting.reached()
        assert k42.destroy(ref) is False
        for _ in range(2):
            with pytest.raises(k42.Destroyed):
                ref.add()
            with pytest.raises(k42.Destroyed):
                k42.destroy(ref)
        with pytest.raises(k42.Destroyed):
            k42.swap(ref, SharedHits)
        assert log == []
        exporting.resume()
        swapping.join()
    if keep:
        assert result[0].value() == 3
        k42.destroy(result[0])
    hooks_run()
    assert log == [3, 3]  # the old one's, and that of the new one, which had the same state
    assert "destroyed" in repr(ref)


def test_destroyed_while_a_swap_waits_for_a_call():
    log = []
    ref = released(log).create()
    with PausePoint() as inside:
        calling = start(lambda: ref.run(inside))
        inside.reached()
        outcome = []

        def swap():
            try:
                k42.swap(ref, SharedHits)
            except k42.Destroyed:
                outcome.append("destroyed")

        swapping = start(swap)
        wait_until(lambda: k42._native.suspended(ref) == [])
        assert k42.destroy(ref) is False
        swapping.join()
        assert outcome == ["destroyed"]
        assert log == []
        inside.resume()
        calling.join()
    hooks_run()
    assert log == [0]


def test_destructions_race_swaps():
    log, made = [], []
    for _ in range(60):
        ref = released(log).create()
        ref.add()

        def swap(ref=ref):
            try:
                k42.swap(ref, released(log))
            except k42.Destroyed:
                return 1
            return 2

        swapped, _ = race(swap, lambda ref=ref: k42.destroy(ref))
        made.append(swapped)
        with pytest.raises(k42.Destroyed):
            ref.add()
    hooks_run()
    assert len(log) == sum(made)


# Hooks


def test_representatives_that_were_made_by_the_transfer_have_their_hooks_run():
    """Also those that nobody called afterwards, and those of a transfer that failed."""
    log = []
    kind = released(log)
    ref = DistributedHits.create()
    race(*[ref.add] * 3)
    k42.swap(ref, kind)
    assert log == []

    class Refusing(kind):
        def import_state(self, form, states):
            self.n = -1
            if next(count) == 1:
                fails()

    count = itertools.count()
    with pytest.raises(k42.SwapRefused):
        k42.swap(ref, Refusing)
    k42.destroy(ref)
    hooks_run()
    assert log.count(1) == 3
    assert set(log) <= {1, -1, 0}


def test_a_hook_may_call_the_object_and_swap_it():
    seen = []

    class Talking(SharedHits):
        def on_release(self):
            if not seen:
                seen.append(ref.value())
                k42.swap(ref, SharedHits)

    ref = Talking.create()
    ref.add(4)
    k42.swap(ref, DistributedHits)
    assert seen == [4]
    assert isinstance(ref, SharedHits)
    assert ref.value() == 4
    k42.destroy(ref)


# Time


def test_a_swap_that_waits_too_long_for_a_call():
    ref = SharedHits.create()
    with PausePoint() as inside:
        calling = start(lambda: ref.run(inside))
        inside.reached()
        for timeout in (0, -1, 0.05):
            with pytest.raises(k42.SwapRefused, match="calls that run"):
                k42.swap(ref, DistributedHits, timeout=timeout)
            ref.add()
        inside.resume()
        calling.join()
    assert isinstance(ref, SharedHits)
    assert ref.value() == 3
    k42.swap(ref, DistributedHits)
    assert ref.value() == 3
    k42.destroy(ref)


def test_a_suspended_generator_is_named():
    ref = SharedHits.create()
    ref.add(3)
    each = ref.each()
    next(each)
    with pytest.raises(k42.SwapRefused, match="generators or coroutines that nobody has finished or closed: each"):
        k42.swap(ref, DistributedHits, timeout=0.05)
    assert list(each) == [1, 2]
    k42.swap(ref, DistributedHits)
    each = ref.each()
    next(each)
    each.close()
    k42.swap(ref, SharedHits)
    each = ref.each()
    del each
    gc.collect()
    k42.swap(ref, DistributedHits, timeout=5)
    assert ref.value() == 3
    k42.destroy(ref)


def test_another_swap_that_does_not_end():
    with PausePoint() as exporting:

        class Slow(SharedHits):
            def export_state(self, form):
                exporting()
                return self.n

        ref = Slow.create()
        ref.add()
        swapping = start(lambda: k42.swap(ref, DistributedHits))
        exporting.reached()
        with pytest.raises(k42.SwapRefused, match="another swap"):
            k42.swap(ref, SharedHits, timeout=0.05)
        exporting.resume()
        swapping.join()
    assert isinstance(ref, DistributedHits)
    k42.destroy(ref)


# Interrupted


def interrupt_soon(ready):
    """From another thread: once it is ready."""

    def body():
        ready()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    return start(body)


def test_interrupted_while_it_waits():
    ref = SharedHits.create()
    with PausePoint() as inside:
        calling = start(lambda: ref.run(inside))
        inside.reached()
        interrupting = interrupt_soon(lambda: time.sleep(0.2))
        with pytest.raises(KeyboardInterrupt):
            k42.swap(ref, DistributedHits, timeout=60)
        interrupting.join()
        assert isinstance(ref, SharedHits)
        ref.add()
        inside.resume()
        calling.join()
    k42.swap(ref, DistributedHits)
    assert ref.value() == 1
    k42.destroy(ref)


def test_interrupted_in_the_transfer():
    exporting = threading.Event()

    class Slow(SharedHits):
        def export_state(self, form):
            exporting.set()
            for _ in range(6000):  # a signal just before a sleep does not end it
                time.sleep(0.01)

    ref = Slow.create()
    ref.add()
    interrupting = interrupt_soon(exporting.wait)
    with pytest.raises(KeyboardInterrupt):
        k42.swap(ref, DistributedHits)
    interrupting.join()
    ref.add()
    assert isinstance(ref, Slow)
    assert ref.value() == 2
    k42.destroy(ref)


def test_a_call_that_waits_for_a_swap_is_interrupted():
    with PausePoint() as exporting:

        class Slow(SharedHits):
            def export_state(self, form):
                exporting()
                return self.n

        ref = Slow.create()
        ref.add()
        swapping = start(lambda: k42.swap(ref, DistributedHits))
        exporting.reached()
        interrupting = interrupt_soon(lambda: time.sleep(0.2))
        with pytest.raises(KeyboardInterrupt):
            ref.add()
        interrupting.join()
        exporting.resume()
        swapping.join()
    assert ref.value() == 1
    k42.destroy(ref)


# With others


def test_interposed_while_it_is_swapped():
    ref = SharedHits.create()
    tally, lock = Tally(), threading.Lock()

    def arbiter(call):
        with lock:
            tally[call.name] += 1
        return call.proceed()

    with Callers(add(ref), newcomer(ref)) as callers:
        with k42.interpose(ref, lambda call: call.proceed()):
            for kind in KINDS * 5:
                k42.swap(ref, kind)
        assert type(k42.local(ref)) is KINDS[-1]
    before = callers()
    with k42.interpose(ref, arbiter), Callers(add(ref), lambda: ref.add_below(2)) as callers:
        for kind in KINDS * 5:
            k42.swap(ref, kind)
    adds, recursions = callers.done[0], callers.done[1] // 3
    assert tally == {"add": adds, "add_below": 3 * recursions}  # add_below() adds by the representative itself
    assert ref.value() == before + callers()
    assert type(k42.local(ref)) is KINDS[-1]
    k42.destroy(ref)


def test_methods_that_become_generators():
    class List(k42.Object):
        transfers = ("nothing",)

        def items(self):
            return iter([1, 2])

    class Generator(List):
        def items(self):
            yield 1
            yield 2

    class Foreign(List):
        def items(self):
            return made

    made = (i for i in (1, 2))
    ref = List.create()
    assert list(ref.items()) == [1, 2]
    k42.swap(ref, Generator)
    items = ref.items()
    assert next(items) == 1
    with pytest.raises(k42.SwapRefused, match="items"):
        k42.swap(ref, List, timeout=0)
    assert list(items) == [2]
    k42.swap(ref, Foreign)
    assert ref.items() is made  # a value like others
    k42.swap(ref, List)
    k42.destroy(ref)

    ref = Generator.create()
    k42.swap(ref, List)
    assert list(ref.items()) == [1, 2]
    k42.destroy(ref)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_in_the_middle_of_a_swap():
    with PausePoint() as exporting:

        class Slow(SharedHits):
            def export_state(self, form):
                exporting()
                return self.n

        ref, other = Slow.create(), SharedHits.create()
        ref.add(2)
        waiting = []
        swapping = start(lambda: k42.swap(ref, DistributedHits))
        exporting.reached()
        waiting = [start(ref.add) for _ in range(3)]
        time.sleep(0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            ok = False
            try:
                signal.alarm(20)
                ref.add()
                k42.destroy(exporting.resume() or other)
                for kind in (DistributedHits, SharedHits) * 3:
                    k42.swap(ref, kind)
                    race(ref.add, ref.add)
                ok = ref.value() == 15 and k42.destroy(ref)
            finally:
                os._exit(0 if ok else 1)
        exporting.resume()
        for thread in (swapping, *waiting):
            thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ref.value() == 5
    for one in (ref, other):
        k42.destroy(one)
