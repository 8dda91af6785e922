"""The allocator: from addresses, that processors share no lines; where freed blocks go; what the statistics say."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter

import pytest

import k42
from k42 import _native
from k42._native import Block, allocator_settle, allocator_stat

LINE = 128  # the distance of what must not share a line: two lines of 64, which are fetched together


def in_threads(n, work):
    """Runs work(i) in n threads that start together, on n processors; returns what they return."""
    gate = threading.Barrier(n)
    results = [None] * n
    failures = []

    def body(i):
        gate.wait()
        try:
            results[i] = work(i)
        except BaseException as failure:
            failures.append(failure)
            gate.abort()
        else:
            gate.wait()

    threads = [threading.Thread(target=body, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


def lines(block):
    return range(block.address // LINE, (block.address + max(block.size, 1) - 1) // LINE + 1)


def total(name):
    return sum(usage[name] for usage in allocator_stat()["usage"])


def live():
    return total("allocated") - total("freed") - total("sent")


def own(size):
    """What this thread's processor did with blocks of a size."""
    here = k42.processors.current()
    none = dict.fromkeys(("allocated", "freed", "sent", "returned", "held"), 0)
    found = [u for u in allocator_stat()["usage"] if (u["processor"], u["size"]) == (here, size)]
    return found[0] if found else none


@pytest.mark.parametrize("padded", [False, True], ids=["strict", "padded"])
def test_processors_share_no_lines(padded):
    sizes = [1, 8, 16, 17, 40, 64, 65, 100, 128, 129, 200, 300, 1000, 2048, 5000, 70_000]

    def work(i):
        # Blocks come and go, so that those that stay were used before, here or elsewhere.
        blocks = [Block(sizes[k % len(sizes)], padded) for k in range(i, i + 200)]
        for k in range(0, 200, 2):
            blocks[k].free()
            blocks[k] = Block(sizes[k * 7 % len(sizes)], padded)
        return k42.processors.current(), blocks

    owner = {}
    blocks_in = Counter()
    results = in_threads(4, work)
    assert len({processor for processor, _ in results}) == 4
    for processor, blocks in results:
        for block in blocks:
            for line in lines(block):
                assert owner.setdefault(line, processor) == processor
                blocks_in[line] += 1
    if padded:
        assert all(block.address % LINE == 0 for _, blocks in results for block in blocks)
        assert set(blocks_in.values()) == {1}
    else:
        assert max(blocks_in.values()) > 1  # small ones of one processor lie together


def test_lines_are_kept_apart_when_threads_come_and_go():
    """Blocks stay where they are while the processors' owners change and others free their neighbours."""
    kept = []

    def work(i):
        for _, block in kept[i::6]:  # half of what is there, mostly of others
            block.free()
        return [(k42.processors.current(), Block(24, k % 5 == 0)) for k in range(300)]

    for _ in range(6):
        results = in_threads(3, work)
        kept = [entry for i, entry in enumerate(kept) if i % 6 >= 3] + [e for entries in results for e in entries]
        owner = {}
        assert all(owner.setdefault(line, processor) == processor for processor, b in kept for line in lines(b))


def test_statistics_count_what_was_done():
    before, live_before = own(48), live()
    blocks = [Block(40, False) for _ in range(100)]
    assert own(48)["allocated"] == before["allocated"] + 100
    assert live() == live_before + 100
    for block in blocks[:30]:
        block.free()
    assert own(48)["freed"] == before["freed"] + 30
    del blocks[30:60]  # an object gives its block back at its end
    assert own(48)["freed"] == before["freed"] + 60
    assert live() == live_before + 40
    assert own(48)["held"] >= 40 * 48
    stat = allocator_stat()
    assert stat["reserved"] >= sum(u["held"] for u in stat["usage"] if u["size"]) + stat["waiting"]


def test_remote_frees_return_home():
    allocated, freed = threading.Event(), threading.Event()
    blocks = []
    result = {}

    def home():
        blocks.extend(Block(96, False) for _ in range(2000))
        result["addresses"] = {block.address for block in blocks}
        before = own(96)
        allocated.set()
        assert freed.wait(60)
        assert own(96)["returned"] == before["returned"]  # nobody else touches our slabs
        allocator_settle()
        result["after"] = own(96)
        result["before"] = before
        again = [Block(96, False) for _ in range(2000)]
        result["again"] = len(result["addresses"] & {block.address for block in again})

    thread = threading.Thread(target=home)
    thread.start()
    assert allocated.wait(60)
    sent = own(96)["sent"]
    for block in blocks:
        block.free()
    assert own(96)["sent"] == sent + 2000
    allocator_settle()
    freed.set()
    thread.join()
    assert result["after"]["returned"] == result["before"]["returned"] + 2000
    assert result["after"]["freed"] == result["before"]["freed"]
    assert result["after"]["held"] < result["before"]["held"]
    assert result["again"] > 1000


def test_blocks_of_ended_threads_wait_for_the_next_owner():
    (blocks,) = in_threads(1, lambda i: [Block(500, False) for _ in range(300)])
    before = live()
    for block in blocks:
        block.free()
    allocator_settle()
    assert live() == before - 300
    on_their_way = total("sent") - total("returned")
    in_threads(1, lambda i: (k42.processors.current(), allocator_settle()))
    assert total("sent") - total("returned") <= on_their_way - 300


def test_memory_stays_flat():
    def work(i):
        for k in range(20_000):
            other = exchange[k % len(exchange)]
            exchange[k % len(exchange)] = Block(16 + k * 37 % 700, k % 3 == 0)
            del other

    def held():
        stat = allocator_stat()
        return stat["waiting"] + sum(u["held"] for u in stat["usage"]), stat["reserved"]

    exchange = [None] * 50
    in_threads(3, work)
    warm, reserved = held()
    for _ in range(3):
        in_threads(3, work)
    after, reserved_after = held()
    assert after <= warm + 2 * 1024 * 1024
    assert reserved_after <= reserved + 2 * 1024 * 1024


def test_a_block_is_freed_once():
    blocks = [Block(100, True)]
    before = live()
    outcomes = []

    def work(i):
        try:
            blocks[0].free()
        except ValueError:
            outcomes.append("refused")
        else:
            outcomes.append("freed")

    in_threads(4, work)
    assert Counter(outcomes) == {"freed": 1, "refused": 3}
    assert live() == before - 1
    with pytest.raises(ValueError, match="no address"):
        _ = blocks[0].address
    assert blocks[0].size == 100
    blocks.clear()
    assert live() == before - 1


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ((-1, False), OverflowError),
        ((2**64, False), OverflowError),
        ((2**64 - 1, True), MemoryError),
        ((2**62, False), MemoryError),
        (("1", False), TypeError),
        ((1,), TypeError),
        ((), TypeError),
    ],
)
def test_bad_input(args, error):
    before = total("allocated")
    with pytest.raises(error):
        Block(*args)
    assert total("allocated") == before


def test_distributed_counters_take_their_parts_from_it():
    before = live()
    counter = _native.PaddedCount(0)
    part = counter.join()
    assert live() == before + 1
    part.add(1)
    del part, counter
    assert live() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_goes_on():
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            Block(64, False)

    threads = [threading.Thread(target=churn) for _ in range(2)]
    (others,) = in_threads(1, lambda i: [Block(64, False) for _ in range(100)])
    mine = [Block(64, False) for _ in range(100)]
    for thread in threads:
        thread.start()
    try:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                before = live()
                for block in mine + others:
                    block.free()
                fresh = [Block(64, k % 2 == 0) for k in range(1000)]
                code = 0 if live() == before + 800 and len({block.address for block in fresh}) == 1000 else 2
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
