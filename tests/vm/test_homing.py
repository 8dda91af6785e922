"""Faults follow their processor: threads are placed, and the spans of a mapping move to them."""

from __future__ import annotations

import os
import textwrap

import pytest
from vm_support import words

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="spans move only where there are two CPUs")

THREADS = """
    import time
    import numpy as np
    SPAN = 2 << 20
    options = eval(sys.argv[2]) if len(sys.argv) > 2 else {}
    client = vm.connect(sys.argv[1], **options)
    cpus = sorted(os.sched_getaffinity(0))[:2]
    def counts():
        return client.stat()["engine"]
    def together(*bodies, pin=False):
        # Each in a thread of its own; what the engine counted meanwhile.
        before = counts()
        failures = []
        def run(index, body):
            try:
                if pin:
                    os.sched_setaffinity(0, {cpus[index % 2]})
                body()
            except BaseException as error:
                failures.append(error)
        threads = [threading.Thread(target=run, args=item) for item in enumerate(bodies)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not failures, failures
        after = counts()
        return {key: after[key] - before[key] for key in after}
    def unmap(memory):
        from k42 import _native
        _native.dontneed(memory)  # the frames stay: the next touches are faults
    def add_one(array):
        return lambda: np.add(array[::4096], 1, out=array[::4096])  # releases the GIL
    def ranges(memory):
        low, high = memory.base, memory.base + len(memory)
        starts = [int(line.split("-")[0], 16) for line in open("/proc/self/maps")]
        return sum(low <= start < high for start in starts)
    """


def join(*codes: str) -> str:
    return "\n".join(map(textwrap.dedent, codes))


def run(script, kernel, code: str, *arguments: object) -> str:
    return script(join(THREADS, code), kernel.socket, *arguments).good()


HALVES = """
    memory = client.anonymous(24 << 20, fault_around=64 << 10)  # so that there are faults enough to count
    whole = np.asarray(memory)
    halves = np.split(whole, 2)
    rounds = 0
    def round_(pin=False):
        global rounds
        rounds += 1
        counted = together(*map(add_one, halves), pin=pin)
        assert (whole[::4096] == rounds % 256).all()
        unmap(memory)
        return counted
    """


def test_threads_on_halves_are_served_on_their_cpus(shared_kernel, script):
    # Nothing is pinned. The faults of a thread are a burst only while the machine is not too busy: some round is good.
    code = """
        moved = round_()["rehomed"]
        for _ in range(60):
            counted = round_()
            moved += counted["rehomed"]
            if counted["local"] > 0.8 * counted["faults"] and counted["remote"] < 0.02 * counted["faults"]:
                break
        else:
            raise AssertionError(counted)
        assert moved > 0
        say("local")
        """
    assert run(script, shared_kernel, join(HALVES, code)) == "local\n"


def test_pinned_threads_have_their_spans_moved(shared_kernel, script):
    code = """
        for _ in range(8):
            counted = round_(pin=True)
        assert counted["remote"] <= 0.02 * counted["faults"], counted
        assert counted["local"] > 0.5 * counted["faults"], counted
        assert os.sched_getaffinity(0) >= set(cpus)
        say("local")
        """
    assert run(script, shared_kernel, join(HALVES, code)) == "local\n"


@pytest.mark.parametrize("options", ["{'homing': False}", "{'sticky': False, 'homing': False}"])
def test_a_client_can_do_without(shared_kernel, script, options):
    code = """
        for _ in range(4):
            counted = round_(pin=True)
            assert counted["rehomed"] == 0, counted
        if "sticky" in options:
            for _ in range(4):
                counted = round_()
                assert counted["kept"] == counted["local"] == counted["remote"] == 0
        say("alone")
        """
    assert run(script, shared_kernel, join(HALVES, code), options) == "alone\n"


@pytest.mark.parametrize("which", ["homing", "sticky"])
def test_a_kernel_can_do_without(kernels, script, which):
    kernel = kernels(**{which: False})
    code = """
        for _ in range(4):
            counted = round_(pin=sys.argv[3] == "homing")
            assert counted[{"homing": "rehomed", "sticky": "kept"}[sys.argv[3]]] == 0, counted
        say("alone")
        """
    assert run(script, kernel, join(HALVES, code), "{}", which) == "alone\n"


def test_a_shared_span_moves_seldom(shared_kernel, script):
    # Each move doubles the rest of the span, from 4 ms up to 4 s.
    code = """
        import math, time
        memory = client.anonymous(SPAN)
        whole = np.asarray(memory)
        pages = whole[::4096]
        start = time.monotonic()
        moves = 0
        for turn in range(40):
            evens, odds = (lambda at=at: np.add(pages[at::2], 1, out=pages[at::2]) for at in (0, 1))
            moves += together(evens, odds, pin=True)["rehomed"]
            unmap(memory)
        seconds = time.monotonic() - start
        # The mapping may lie across two spans.
        assert moves <= 2 * (2 + math.log2(1 + seconds / 0.004) + seconds / 4), (moves, seconds)
        assert (pages == 40).all()
        say("damped")
        """
    assert run(script, shared_kernel, code) == "damped\n"


def test_ranges_of_one_home_are_one_range(shared_kernel, script):
    # Every other span to the other CPU, and back to one.
    code = """
        memory = client.anonymous(48 * SPAN, overcommit=True)
        whole = np.asarray(memory)
        first = -memory.base % SPAN
        def some(start, step):
            def touch():
                for at in range(first + start * SPAN, len(whole) - SPAN, step * SPAN):
                    for page in range(16):
                        whole[at + page * 65536] += 1  # each a fault: neighbours within 64 KiB come along
            return touch
        most = 1
        def until(condition, *bodies):
            global most
            limit = time.monotonic() + 60  # a span that moved often rests for seconds
            while time.monotonic() < limit:
                together(*bodies, pin=True)
                unmap(memory)
                most = max(most, ranges(memory))
                if condition(): return
            raise AssertionError(ranges(memory))
        until(lambda: ranges(memory) > 16, some(0, 2), some(1, 2))
        until(lambda: ranges(memory) < 6, some(0, 1))
        assert most <= 50
        say("merged")
        """
    assert run(script, shared_kernel, code) == "merged\n"


def test_moving_spans_lose_no_byte_and_no_fault(kernels, script, folder):
    # A file much larger than the budget, read by threads of both CPUs that share its spans; signals all the while.
    kernel = kernels(64 * 4096)
    data = words(6 << 20)
    (folder / "file").write_bytes(data)
    code = """
        memory = client.open(sys.argv[3], fault_around=4096)
        shown = np.frombuffer(memory, "u8")
        right = np.fromfile(sys.argv[3], "u8")
        signals = 0
        def count(*_):
            global signals
            signals += 1
        signal.signal(signal.SIGALRM, count)
        signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
        def read(seed):
            def body():
                random = np.random.default_rng(seed)
                for _ in range(25):
                    pages = random.integers(0, len(right) // 512, 24)
                    at = pages * 512 + random.integers(0, 512, 24)
                    assert (shown[at] == right[at]).all()
                    start = int(random.integers(0, len(right) - 8192))
                    with open("/dev/null", "wb") as null:
                        null.write(memory[start * 8 : start * 8 + 4096])
                    assert (shown[start : start + 2048] == right[start : start + 2048]).all()
                    # Faults that follow each other, on pages that are there: these make spans move.
                    first = start // 512 * 512
                    for _ in range(4):
                        unmap(memory)
                        assert (shown[first : first + 4096 : 512] == right[first : first + 4096 : 512]).all()
            return body
        moves = 0
        moves = 0
        for turn in range(4):
            moves += together(*(read(turn * 8 + i) for i in range(4)), pin=True)["rehomed"]
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert moves > 0 and signals > 0, (moves, signals)
        say("right")
        """
    assert run(script, kernel, code, "{}", folder / "file") == "right\n"


def test_children_forked_while_spans_move_have_no_window(shared_kernel, script):
    code = """
        memory = client.anonymous(8 * SPAN, overcommit=True)
        whole = np.asarray(memory)
        ended = False
        def touch():
            while not ended:
                np.add(whole[::65536], 1, out=whole[::65536])
                unmap(memory)
        def fork():
            global ended
            try:
                for _ in range(40):
                    child = os.fork()
                    if not child:
                        maps = open("/proc/self/maps").read()
                        shown = [line for line in maps.splitlines() if "memfd:k42:" in line and "---" not in line]
                        os._exit(len(shown))
                    _, status = os.waitpid(child, 0)
                    assert status == 0, status
            finally:
                ended = True
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        moved = together(touch, touch, fork, pin=True)["rehomed"]
        assert moved > 0
        say("none")
        """
    assert run(script, shared_kernel, code) == "none\n"
