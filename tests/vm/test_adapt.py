"""Objects that several processors use become distributed, and shared again when one uses them."""

from __future__ import annotations

import threading

import k42
from k42.vm.adapt import Adapter, Watched
from k42.vm.pm import Backing, DistributedGlobalPM, SharedGlobalPM


def use(pm, times: int) -> None:
    for _ in range(times):
        pm.allocate(1, Backing.FILE)
        pm.release(1, Backing.FILE)


def use_by_two(pm) -> None:
    """In turns, so that it does not depend on how Linux schedules the two."""
    turns = [threading.Semaphore(1), threading.Semaphore(0)]

    def work(who: int) -> None:
        for _ in range(150):
            turns[who].acquire()
            use(pm, 1)
            turns[1 - who].release()

    threads = [threading.Thread(target=work, args=(who,)) for who in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_it_follows_the_load_and_does_not_swing():
    pm = SharedGlobalPM.create(1000)
    watched = [Watched(pm, lambda: pm.native().traffic(), SharedGlobalPM, DistributedGlobalPM)]
    adapter = Adapter()
    adapter.look(watched)

    def looks(load, count: int) -> int:
        swaps = 0
        for _ in range(count):
            load()
            swaps += adapter.look(watched)
        return swaps

    assert looks(lambda: use(pm, 300), 5) == 0  # one processor
    assert looks(lambda: use_by_two(pm), 1) == 0
    assert looks(lambda: use(pm, 300), 1) == 0  # once is nothing
    assert looks(lambda: use_by_two(pm), 1) == 0
    assert not pm.native().distributed()
    assert looks(lambda: use_by_two(pm), 1) == 1
    assert pm.native().distributed()
    assert looks(lambda: use_by_two(pm), 12) == 0
    assert looks(lambda: use(pm, 300), 9) == 0
    assert looks(lambda: use_by_two(pm), 1) == 0
    assert looks(lambda: None, 20) == 0  # nobody uses it: that says nothing
    assert looks(lambda: use(pm, 300), 9) == 0
    assert looks(lambda: use(pm, 300), 1) == 1
    assert not pm.native().distributed()
    assert pm.native().check()
    k42.destroy(pm)
    assert adapter.look(watched) == 0
