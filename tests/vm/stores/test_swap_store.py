from __future__ import annotations

import errno
import os
import random
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores_support import PAGE, Frames, words

import k42
from k42 import vm
from k42.vm.fr import SwapFR
from k42.vm.fr._page_set import PageSet
from k42.vm.fr.swap import swap_folder


@pytest.fixture
def swap():
    """Makes an FR of so many pages."""
    made = []

    def make(pages: int, descriptor: int | None = None):
        made.append(SwapFR.create(pages * PAGE, descriptor))
        return made[-1]

    yield make
    for fr in made:
        fr.close()
        k42.destroy(fr)


def page(n: int, seed: int = 0) -> bytes:
    return words(PAGE, seed * 1000 + n)


def test_there_is_no_file_before_something_is_written(swap, frames):
    fr = swap(100)
    assert frames(100).filled(fr, 3, 90) == bytes(90 * PAGE)
    assert fr.descriptor() is None
    memory = frames(100)
    memory.put(page(5), 5)
    fr.write_back(memory.memfd, 5, 1)
    assert os.readlink(f"/proc/self/fd/{fr.descriptor()}").endswith("(deleted)")
    assert frames(100).filled(fr, 4, 3) == bytes(PAGE) + page(5) + bytes(PAGE)
    assert fr.swapped() == 1


def test_room_is_given_back(swap, frames):
    fr = swap(2000)
    memory = frames(2000)
    memory.put(words(2000 * PAGE))
    fr.write_back(memory.memfd, 0, 2000)
    os.fsync(fr.descriptor())
    full = os.fstat(fr.descriptor()).st_blocks
    fr.forget(100, 1800)
    assert os.fstat(fr.descriptor()).st_blocks <= full // 5
    expected = words(100 * PAGE) + bytes(1800 * PAGE) + words(2000 * PAGE)[1900 * PAGE :]
    assert frames(2000).filled(fr, 0, 2000) == expected
    fr.resize(50 * PAGE)
    fr.resize(2000 * PAGE)
    assert frames(2000).filled(fr, 0, 2000) == words(50 * PAGE) + bytes(1950 * PAGE)
    assert fr.swapped() == 50


def test_another_kernel_takes_it_over(swap, frames):
    fr = swap(100)
    memory = frames(100)
    memory.put(words(100 * PAGE))
    fr.write_back(memory.memfd, 10, 20)
    fr.write_back(memory.memfd, 50, 1)
    fr.forget(15, 3)
    heir = swap(100, os.dup(fr.descriptor()))
    assert heir.holds(0, 100) == fr.holds(0, 100)
    assert frames(100).filled(heir, 0, 100) == frames(100).filled(fr, 0, 100)


def test_no_room(swap, frames, monkeypatch):
    fr = swap(64)
    memory = frames(64)
    memory.put(words(64 * PAGE))
    monkeypatch.setenv("K42_SWAP_DIR", "/does/not/exist")
    with pytest.raises(vm.StoreError, match="No such file") as missing:
        fr.write_back(memory.memfd, 0, 1)
    monkeypatch.delenv("K42_SWAP_DIR")
    assert missing.value.errno == errno.ENOENT
    full = swap(64, os.open("/dev/full", os.O_RDWR))
    with pytest.raises(vm.StoreError, match="K42_SWAP_DIR") as no_room:
        full.write_back(memory.memfd, 3, 2)
    assert (no_room.value.errno, no_room.value.offset) == (errno.ENOSPC, 3 * PAGE)
    assert full.swapped() == 0
    fr.write_back(memory.memfd, 0, 64)
    assert frames(64).filled(fr, 0, 64) == words(64 * PAGE)


def test_the_folder(folder, monkeypatch):
    monkeypatch.setenv("K42_SWAP_DIR", str(folder))
    assert swap_folder(1) == folder
    monkeypatch.delenv("K42_SWAP_DIR")
    assert swap_folder(1) in (Path("/var/tmp"), Path(os.environ.get("TMPDIR", "/tmp")), vm.protocol.runtime_folder())


@pytest.mark.parametrize("seed", range(3))
def test_threads_swap_their_pages_in_and_out(swap, seed):
    """Each thread has every third page; neighbours are written, read and forgotten at the same time."""
    fr = swap(300)
    failures: list[str] = []

    def work(me: int) -> None:
        chance = random.Random(seed * 10 + me)
        memory = Frames(300)
        state = dict.fromkeys(range(me, 300, 3), bytes(PAGE))
        for n in range(400):
            at = chance.choice(list(state))
            match chance.randrange(3):
                case 0:
                    state[at] = page(at, n)
                    memory.put(state[at], at)
                    fr.write_back(memory.memfd, at, 1)
                case 1:
                    state[at] = bytes(PAGE)
                    fr.forget(at, 1)
                case 2:
                    if memory.filled(fr, at, 1) != state[at]:
                        failures.append(f"page {at}")
        for at, content in state.items():
            if memory.filled(fr, at, 1) != content:
                failures.append(f"page {at} at the end")
        memory.close()

    threads = [threading.Thread(target=work, args=(me,)) for me in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


ranges = st.tuples(st.integers(0, 5000), st.integers(0, 3000))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.booleans(), ranges), max_size=20), ranges)
def test_page_sets_are_sets(changes, look):
    pages, model = PageSet(), set()
    for add, (first, count) in changes:
        (pages.add if add else pages.discard)(first, count)
        (model.update if add else model.difference_update)(range(first, first + count))
    assert len(pages) == len(model)
    seen, before = look[0], None
    for first, count, inside in pages.runs(*look):
        assert first == seen
        assert count > 0
        assert inside is not before
        assert all((at in model) is inside for at in range(first, first + count))
        seen, before = first + count, inside
    assert seen == look[0] + look[1]


def test_page_sets_are_small():
    def size(pages: PageSet) -> int:
        return sys.getsizeof(pages._chunks) + sum(sys.getsizeof(bits) + 32 for bits in pages._chunks.values())

    together, apart = PageSet(), PageSet()
    together.add(0, 1_000_000)
    assert size(together) < 1_000_000
    for at in range(0, 1_000_000, 100):
        apart.add(at, 1)
    assert size(apart) / 10_000 < 50
    apart.discard(0, 1 << 40)
    assert len(apart) == 0
    assert not apart._chunks
