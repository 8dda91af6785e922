"""The counts of the experiment `objects`: that they add up, and that what is known shows."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import k42
from k42.experiments import objects
from k42.experiments._census import Census
from k42.experiments._runner import cpus
from k42.experiments.objects import Counted


class Thing(k42.Object):
    def use(self) -> None:
        pass


class Other(k42.Object):
    pass


@pytest.fixture
def census() -> Iterator[Census]:
    made = Census(Other)
    made.begin()
    yield made
    made.close()


def on(cpu: int, call: Callable[[], object]) -> None:
    """Call it on a CPU, in a thread of its own."""

    def body() -> None:
        os.sched_setaffinity(0, {cpu})
        call()

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()


def test_who_creates_uses_and_destroys_an_object_is_counted(census: Census) -> None:
    first, last = cpus()[0], cpus()[-1]
    things: list[Thing] = []
    on(last, lambda: things.extend(Thing.create() for _ in range(3)))
    Other.create()
    local, shared, lasting = things
    for cpu, thing, times in ((last, local, 3), (first, shared, 2), (last, shared, 5), (first, lasting, 1)):
        on(cpu, lambda thing=thing, times=times: [thing.use() for _ in range(times)])
    for thing in (local, shared):
        on(last, lambda thing=thing: k42.destroy(thing))
    census.end()
    k42.destroy(lasting)
    with pytest.raises(k42.Destroyed):
        local.use()
    known = census.close()
    assert [counted.kind for counted in known] == [Thing] * 3
    assert [counted.created for counted in known] == [last] * 3
    assert [counted.destroyed for counted in known] == [last, last, None]
    assert known[0].uses(faults=False) == {last: 3}
    assert known[1].uses(faults=False) == ({first: 2, last: 5} if first != last else {first: 7})
    assert known[2].uses(faults=False) == {first: 1}
    assert not any(counted.uses(faults=True) for counted in known)
    thing = Thing.create()  # nobody counts any more
    thing.use()
    assert len(census.close()) == 3


def counted(
    created: int, destroyed: int | None, faults: dict[int, int], requests: dict[int, int], name: str = "Region"
) -> Counted:
    return Counted(name, (1,), created, destroyed, faults, requests)


KNOWN = [
    counted(0, 0, {0: 4}, {0: 1}),
    counted(1, 1, {}, {}, "PM"),
    counted(1, 0, {0: 3}, {}),
    counted(0, 1, {}, {1: 1}),
    counted(0, 0, {0: 1, 1: 1}, {0: 1}),
    counted(0, 0, {0: 1}, {1: 1}),
    counted(0, None, {0: 90, 1: 10}, {}, "GlobalPM"),
]


def test_where_objects_live_adds_up() -> None:
    found = objects.localities(KNOWN)
    assert list(found.values()) == [2, 2, 2]
    assert sum(found.values()) == sum(each.destroyed is not None for each in KNOWN)
    assert objects.fault_localities(KNOWN) == {"served on one": 3, "served on several": 1}


def test_accesses_add_up_and_the_most_used_are_shown() -> None:
    found = objects.accesses(KNOWN)
    assert sum(found.values()) == sum(each.accesses for each in KNOWN) == 114
    assert list(found) == [
        "Region (P1)",
        "PM (P1)",
        *(f"Region (P1) {number}" for number in range(2, 6)),
        "GlobalPM (P1)",
    ]
    assert objects.main_objects([found, found]) == ["GlobalPM (P1)"]
    counts = {("multi-user", 2): [found] * 5, ("benchmark", 2): [objects.localities(KNOWN)] * 5}
    assert objects.findings(counts) == [
        "multi-user, 2 proc.: 1 objects for 80% of 114 accesses",
        "benchmark, 2 proc.: of 6 objects 33.3% created, used and destroyed on one",
    ]
    records = {record.implementation: record for record in objects.records(counts)}
    assert records["multi-user/GlobalPM (P1)"].value == pytest.approx(100 * 100 / 114)
    assert records["multi-user/GlobalPM (P1)"].parameters == {"count": 100}
    shares = [record.value for name, record in records.items() if name.startswith("benchmark/")]
    assert len(shares) == 3
    assert sum(shares) == pytest.approx(100)


PAGES = 64


@pytest.mark.usefixtures("userfaultfd")
def test_table_one(tmp_path: Path) -> None:
    processors = min(2, len(cpus()))
    here, there = (cpus()[:processors] * 2)[:2]
    programs = objects.scenarios(tmp_path, PAGES * 4096, processors)
    found = {name: {each.label: each for each in objects.scan(processors, programs[name])} for name in programs}
    for known in found.values():
        # Each page of a file was a fault, and each fault went through all objects on its way.
        for each in known.values():
            if each.name in ("Region of the file", "FCM of the file"):
                assert sum(each.faults.values()) >= PAGES
            if each.name == "Region of the file":
                assert sum(known[f"Process (P{each.owners[0]})"].faults.values()) > sum(each.faults.values())
    users = found["multi-user"]
    assert set(users["FCM of the file (P1)"].faults) == set(users["Process (P1)"].faults) == {here}
    assert set(users["FCM of the file (P2)"].faults) == set(users["HAT (P2)"].faults) == {there}
    same = found["single-user"]
    shared = same["FCM of the file (P1,P2)"]
    assert set(shared.faults) == {here, there}
    assert shared.destroyed is None  # the kernel keeps what it has of a file
    regions = [same[f"Region of the file (P{number})"] for number in (1, 2)]
    assert sum(shared.faults.values()) == sum(sum(region.faults.values()) for region in regions)
    threads = found["multi-threaded"]
    for name in ("Process (P1)", "HAT (P1)", "Region of the file (P1)", "FCM of the file (P1)"):
        assert set(threads[name].faults) == {here, there}
        if here != there:
            assert threads[name].locality == "used on several"
    assert not any("P2" in label for label in threads)


@pytest.mark.usefixtures("userfaultfd")
def test_on_one_processor_all_is_local(tmp_path: Path) -> None:
    found = objects.benchmark(tmp_path, 1, 1)
    localities = objects.localities(found)
    ended = [each for each in found if each.destroyed is not None]
    assert list(localities.values()) == [len(ended), 0, 0]
    # A Process, a HAT and a PM for each program, and Regions for each file that it opens, and for its memory.
    kinds = [each.name for each in ended]
    assert kinds.count("Process") == kinds.count("HAT") == kinds.count("PM") == len(objects.PROGRAMS)
    files = (objects.FILES + 1) * len(objects.PROGRAMS)
    assert kinds.count("Region of the file") == files + objects.FILES + 1  # the copies, too
    assert objects.fault_localities(found)["served on several"] == 0


def test_too_many_processors() -> None:
    with pytest.raises(k42.Error, match="were asked for"), objects.counted_kernel(len(cpus()) + 1):
        pass
