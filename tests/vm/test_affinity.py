"""Sticky affinity: a thread is kept on its CPU while it faults, and is then as free as before."""

from __future__ import annotations

import os
import textwrap

import pytest

pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="a thread is kept only where there are two CPUs"
)

# Faults until `kept` is true: a burst is not certain where the CPUs are busy with others.
BURSTS = """
    import time
    client = vm.connect(sys.argv[1])
    whole = os.sched_getaffinity(0)
    def fresh():
        while True:
            with client.anonymous(32 << 20) as memory:
                for at in range(0, len(memory), 4096):
                    memory[at] = 1
                    yield
    faults = fresh()
    def burst():
        for _ in range(50):
            next(faults)
    def until(condition, what):
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, what
    def get_held():
        def held():
            burst()
            return len(os.sched_getaffinity(0)) == 1
        until(held, "a thread in a burst of faults is held")
        return os.sched_getaffinity(0)
    def kept():
        return client.stat()["engine"]["kept"]
    """


def test_a_thread_that_faults_is_held_and_freed(shared_kernel, script):
    code = """
        before = kept()
        for _ in range(5):
            [cpu] = get_held()
            assert cpu in whole
            until(lambda: os.sched_getaffinity(0) == whole, "its own mask comes back")
        assert kept() >= before + 5
        burst()
        say("held and freed")
        """
    assert script(join(BURSTS, code), shared_kernel.socket).good() == "held and freed\n"


def join(*codes: str) -> str:
    return "\n".join(map(textwrap.dedent, codes))


def test_its_own_mask_need_not_be_every_cpu(shared_kernel, script):
    # Of three or more CPUs the program may have chosen two.
    code = """
        some = set(sorted(whole)[:2])
        os.sched_setaffinity(0, some)
        for _ in range(3):
            get_held()
            until(lambda: os.sched_getaffinity(0) == some, "its own mask comes back")
        say("done")
        """
    assert script(join(BURSTS, code), shared_kernel.socket).good() == "done\n"


def test_a_mask_that_the_program_sets_meanwhile_is_left_alone(shared_kernel, script):
    code = """
        for _ in range(5):
            held = get_held()
            chosen = {(whole - held).pop()}
            os.sched_setaffinity(0, chosen)
            # Another thread is held and freed by the same server, which looks at all that it holds each time.
            def other():
                os.sched_setaffinity(0, whole)
                get_held()
                until(lambda: os.sched_getaffinity(0) == whole, "freed")
            thread = threading.Thread(target=other)
            thread.start(); thread.join()
            assert os.sched_getaffinity(0) == chosen
            burst()
            assert os.sched_getaffinity(0) == chosen
            os.sched_setaffinity(0, whole)
        say("done")
        """
    assert script(join(BURSTS, code), shared_kernel.socket).good() == "done\n"


def test_a_pinned_thread_stays_pinned(shared_kernel, script):
    code = """
        before = kept()
        for cpu in sorted(whole):
            os.sched_setaffinity(0, {cpu})
            for _ in range(10):
                burst()
                assert os.sched_getaffinity(0) == {cpu}
        assert kept() == before
        say("done")
        """
    assert script(join(BURSTS, code), shared_kernel.socket).good() == "done\n"


def test_the_end_of_the_kernel_frees_who_is_held(kernels, script):
    kernel = kernels()
    code = """
        get_held()
        say("held")
        sys.stdin.readline()
        until(lambda: os.sched_getaffinity(0) == whole, "freed by the end of the kernel")
        say("done")
        os._exit(0)
        """
    one = script(join(BURSTS, code), kernel.socket)
    assert one.line() == "held"
    assert kernel.stop() == 0
    one.tell()
    assert one.line() == "done"
