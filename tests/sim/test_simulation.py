"""The simulated multiprocessor: coherent caches, locks, and runs that come out the same each time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k42.errors import Error
from k42.sim import MACHINES, S85, Cache, Deadlock, QueueLock, Simulation, SpinLock, TicketLock, load
from k42.sim.coherence import Memory

SMALL = dataclasses.replace(S85, l1=Cache(4 * 128, 2, 1), l2=Cache(8 * 128, 2, 10))
MESH = dataclasses.replace(SMALL, processors=4, hop=5)
LOCKS = [SpinLock, TicketLock, QueueLock]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([SMALL, MESH]),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30), st.booleans()), max_size=300),
)
def test_one_writer_or_many_readers(machine, accesses):
    # The protocol is checked after each access; a write leaves one copy, and all accesses are hits or misses.
    memory = Memory(machine, 4, check=True)
    now = 0
    for processor, line, write in accesses:
        before = memory.copies(line)
        done, lost = memory.access(processor, line, now, write=write)
        assert done > now
        now = done
        after = memory.copies(line)
        assert after[processor] in ("M" if write else "MES")
        assert set(lost) == (set(before) - {processor} if write else set())
        assert set(after) == (set(before) | {processor}) - set(lost)
        memory_has = not any(state == "M" for state in before.values())
        if not write and processor not in before and memory_has and not before:
            assert after[processor] == "E"
    for counts in memory.counts:
        assert counts.accesses == counts.hits + counts.misses
    assert sum(counts.accesses for counts in memory.counts) == len(accesses)


def test_what_does_not_fit_goes():
    memory = Memory(SMALL, 1, check=True)
    lines = [0, 4, 8]  # of one set of the second level, which has two ways
    for line in lines:
        memory.access(0, line, 0, write=True)
    assert [bool(memory.copies(line)) for line in lines] == [False, True, True]
    assert memory.counts[0].evicted == 1
    assert memory.access(0, 8, 1000)[0] == 1000 + SMALL.l1.latency


def test_the_bus_is_one():
    # Lines of nobody, wanted at one moment: each waits for the bus.
    memory = Memory(S85, 8)
    done = sorted(memory.access(processor, processor, 0)[0] for processor in range(8))
    occupied = S85.bus_address + S85.bus_data
    assert done == [S85.memory + occupied * i for i in range(8)]


def test_in_a_mesh_it_matters_where_a_line_is():
    # Four processors in a square; line n has its home at processor n % 4.
    assert [MESH.distance(0, other) for other in range(4)] == [0, 5, 5, 10]
    memory = Memory(MESH, 4)
    took = [memory.access(0, line, 0)[0] - MESH.memory for line in range(4)]
    assert took == [0, 10, 10, 20]  # there and back; and each directory has its own queue
    later = 10_000
    assert memory.access(3, 1, later)[0] - later == MESH.intervention + 5 + 5 + 10  # 3 to 1, to 0, to 3
    assert memory.access(2, 1, 2 * later, write=True)[0] - 2 * later == MESH.memory + 10 + max(5 + 5, 5 + 5)


@pytest.mark.parametrize("kind", LOCKS)
@pytest.mark.parametrize("processors", [1, 2, 5, 24])
def test_a_lock_is_never_held_by_two(kind, processors):
    sim = Simulation(S85, processors, check=True)
    lock = kind(sim)
    word = sim.allocate(8, padded=True)
    inside: set[int] = set()
    total = 0

    def body(processor: int) -> None:
        nonlocal total
        for turn in range(20):
            with lock:
                assert not inside
                inside.add(processor)
                assert lock.owner == processor
                seen = total
                sim.load(word)
                sim.work(turn)
                sim.store(word)
                total = seen + 1
                inside.remove(processor)
            sim.work(7 * processor)

    sim.run(body)
    assert total == 20 * processors
    assert lock.owner is None


@pytest.mark.parametrize("kind", LOCKS)
def test_release_of_what_one_does_not_have(kind):
    sim = Simulation(S85, 1)
    with pytest.raises(RuntimeError, match="does not have"):
        sim.run(lambda _: kind(sim).release())


def test_updates_are_atomic():
    # Each takes part in the order of the line's moves: nobody loads between the load and the store of another's that
    # succeeds.
    sim = Simulation(S85, 24, check=True)
    word = sim.allocate(8)
    finished: list[int] = []

    def body(processor: int) -> None:
        for _ in range(10):
            sim.update(word)
            finished.append(sim.now())

    sim.run(body)
    assert len(finished) == 240
    assert len(set(finished)) == 240  # one after the other
    assert sum(counts.accesses for counts in sim.counts()) > 2 * 240  # some lost the line on the way


def traffic(seed: int) -> Any:
    sim = Simulation(S85, 6, seed=seed)
    lock, words = TicketLock(sim), [sim.allocate(8) for _ in range(40)]

    def body(processor: int) -> None:
        for i in range(50):
            sim.work(i * processor % 13)
            with lock:
                sim.update(words[i % 40])
            sim.store(words[(i + processor) % 40])

    return sim.run(body), sim.counts()


def test_the_same_seed_gives_the_same_run():
    assert traffic(1) == traffic(1)
    assert traffic(1) != traffic(2)


def test_errors_of_the_program_end_the_run():
    sim = Simulation(S85, 4)
    word = sim.allocate(8)

    def body(processor: int) -> None:
        sim.store(word)
        if processor == 2:
            raise ZeroDivisionError
        sim.spin(word, lambda: False)

    with pytest.raises(ZeroDivisionError):
        sim.run(body)
    with pytest.raises(Error, match="no processor of the simulation"):
        sim.processor()


def test_all_wait_for_each_other():
    sim = Simulation(S85, 2)
    locks = [TicketLock(sim), TicketLock(sim)]

    def body(processor: int) -> None:
        locks[processor].acquire()
        sim.work(10_000)
        locks[1 - processor].acquire()

    with pytest.raises(Deadlock, match="2 simulated processors wait"):
        sim.run(body)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: Simulation(S85, 25), "s85 has 1 to 24"),
        (lambda: Simulation(S85, 0), "s85 has 1 to 24"),
        (lambda: Simulation(S85, 1).work(1), "no processor of the simulation"),
        (lambda: load("s86"), "there are s85, manycore, or FILE.toml"),
        (lambda: load("/nowhere.toml"), "No such file"),
        (lambda: dataclasses.replace(S85, l1=Cache(100, 2, 1)), "l1 is no whole number of sets"),
        (lambda: dataclasses.replace(S85, memory=0), "memory is at least 1"),
    ],
)
def test_bad_input(use: Callable[[], object], message):
    with pytest.raises(Error, match=message):
        use()


def test_a_machine_of_one_s_own(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('like = "s85"\nprocessors = 4\n[l1]\nsize = 32768\nways = 8\nlatency = 4\n')
    mine = load(file)
    assert (mine.name, mine.processors, mine.l1) == ("mine", 4, Cache(32768, 8, 4))
    assert mine.l2 == MACHINES["s85"].l2
    for text in ("processors = 4", "like = [", 'like = "s85"\ncolour = 1', 'like = "s85"\nl1 = 3'):
        file.write_text(text)
        with pytest.raises(Error, match=r"mine\.toml does not describe a machine"):
            load(file)
