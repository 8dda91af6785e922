from __future__ import annotations

import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k42.vm.readahead import Advice, ReadAhead


class Cache:
    """Pages that are brought in by faults and read-ahead; counts who had to wait."""

    def __init__(self, pages: int, limit: int, cluster: int = 1) -> None:
        self.policy = ReadAhead(pages, limit)
        self.pages = pages
        self.cluster = cluster
        self.resident: set[int] = set()
        self.markers: set[int] = set()
        self.misses = self.ahead = 0

    def touch(self, page: int) -> None:
        ask = None
        if page not in self.resident:
            self.misses += 1
            first = page - page % self.cluster
            count = min(self.cluster, self.pages - first)
            self.resident.update(range(first, first + count))
            ask = self.policy.missed(first, count)
        elif page in self.markers:
            self.markers.remove(page)
            ask = self.policy.touched(page)
        if ask is not None:
            assert 0 <= ask.first < ask.first + ask.pages <= self.pages
            assert ask.first <= ask.marker < ask.first + ask.pages
            self.ahead += ask.pages
            self.resident.update(range(ask.first, ask.first + ask.pages))
            self.markers.add(ask.marker)


@pytest.mark.parametrize("cluster", [1, 16])
@pytest.mark.parametrize("start", [0, 7, 5000])
def test_one_who_reads_on_waits_twice(cluster, start):
    cache = Cache(100_000, 256, cluster)
    for page in range(start, 100_000):
        cache.touch(page)
    assert cache.misses == 2
    assert cache.ahead <= 100_000


def test_windows_double_up_to_the_limit():
    policy = ReadAhead(10**6, 64)
    assert policy.missed(0) is None
    ask = policy.missed(1)
    sizes = []
    while len(sizes) < 8:
        assert ask is not None
        assert ask.marker == ask.first
        sizes.append(ask.pages)
        end = ask.first + ask.pages
        ask = policy.touched(ask.marker)
        assert ask is not None
        assert ask.first == end  # no gap, and nothing twice
    assert sizes == [4, 8, 16, 32, 64, 64, 64, 64]


def test_large_windows_are_reached_sooner():
    policy = ReadAhead(10**6, 4096, 64)
    ask = policy.missed(0, 16)
    sizes = []
    while len(sizes) < 6:
        assert ask is not None
        sizes.append(ask.pages)
        ask = policy.touched(ask.marker)
    assert sizes == [64, 256, 512, 1024, 2048, 4096]


@pytest.mark.parametrize("stride", [2, 3, 5, 13, 31])
def test_small_strides(stride):
    cache = Cache(100_000, 256)
    for page in range(0, 100_000, stride):
        cache.touch(page)
    assert cache.misses <= 6


def test_large_strides_read_nothing_ahead():
    cache = Cache(100_000, 256)
    for page in range(0, 100_000, 100):
        cache.touch(page)
    assert cache.ahead == 0


@pytest.mark.parametrize("streams", [2, 5, 8])
@pytest.mark.parametrize("seed", range(3))
def test_several_places_at_a_time(streams, seed):
    cache = Cache(1_000_000, 256)
    chance = random.Random(seed)
    at = [n * 100_000 for n in range(streams)]
    for _ in range(5000 * streams):
        stream = chance.randrange(streams)
        cache.touch(at[stream])
        at[stream] += 1
    assert cache.misses == 2 * streams


def test_threads_that_share_one_stream_and_do_not_keep_in_step():
    cache = Cache(100_000, 256)
    chance = random.Random(1)
    order = sorted(range(50_000), key=lambda page: page + chance.uniform(0, 6))
    for page in order:
        cache.touch(page)
    assert cache.misses < 100


@pytest.mark.parametrize("seed", range(5))
def test_who_jumps_about_gets_nothing(seed):
    cache = Cache(1_000_000, 256)
    chance = random.Random(seed)
    for _ in range(20_000):
        cache.touch(chance.randrange(1_000_000))
    assert cache.ahead <= 20  # two neighbours one after the other, by chance


def test_random_and_then_sequential_and_random_again():
    cache = Cache(1_000_000, 256)
    chance = random.Random(3)
    for _ in range(3):
        for _ in range(500):
            cache.touch(chance.randrange(500_000))
        before, start = cache.misses, max(cache.resident) + 1
        if start < 600_000:
            start = 600_000
        for page in range(start, start + 20_000):
            cache.touch(page)
        assert cache.misses == before + 2


def test_what_is_evicted_before_it_is_used_makes_windows_smaller():
    policy = ReadAhead(10**6, 256)
    policy.missed(0)
    asked, page = 0, 1
    for _ in range(1000):  # nothing that is read ahead stays
        ask = policy.missed(page)
        asked += ask.pages if ask else 0
        page += 1
    assert asked <= 2 * 1000
    cache = Cache(10**6, 256)  # it recovers
    cache.policy = policy
    for page in range(1001, 11_001):
        cache.touch(page)
    assert cache.misses <= 3


def test_advice():
    cache = Cache(100_000, 128)
    cache.policy.advise(Advice.RANDOM)
    for page in range(1000):
        cache.touch(page)
    assert (cache.misses, cache.ahead) == (1000, 0)
    assert cache.policy.advice is Advice.RANDOM
    cache.policy.advise(Advice("sequential"))
    for page in range(1000, 20_000):
        cache.touch(page)
    assert cache.misses == 1001
    cache.policy.advise(Advice.NORMAL)
    for page in range(50_000, 60_000):
        cache.touch(page)
    assert cache.misses == 1003


def test_no_limit_no_read_ahead():
    cache = Cache(1000, 0)
    for page in range(1000):
        cache.touch(page)
    assert cache.ahead == 0


@settings(deadline=None, max_examples=300)
@given(
    st.integers(1, 300),
    st.sampled_from([1, 3, 32, 1000]),
    st.lists(
        st.tuples(st.sampled_from(["missed", "touched", "advise", "resize"]), st.integers(0, 299), st.integers(1, 16)),
        max_size=200,
    ),
)
def test_never_outside_the_file(pages, limit, calls):
    policy = ReadAhead(pages, limit)
    for call, page, count in calls:
        ask = None
        if call == "advise":
            policy.advise(list(Advice)[page % 3])
        elif call == "resize":
            pages = page + 1
            policy.resize(pages)
        elif page < pages:
            ask = policy.missed(page, min(count, pages - page)) if call == "missed" else policy.touched(page)
        if ask is not None:
            assert 0 <= ask.first <= ask.marker < ask.first + ask.pages <= pages
            assert 0 < ask.pages <= limit


def test_many_threads():
    cache = ReadAhead(10**6, 64)
    asked: list[int] = []

    def read(start: int) -> None:
        total = 0
        for page in range(start, start + 3000):
            ask = cache.missed(page) or cache.touched(page)
            total += ask.pages if ask else 0
        asked.append(total)

    threads = [threading.Thread(target=read, args=(n * 100_000,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 4
