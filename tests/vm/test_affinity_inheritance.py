"""Threads and processes that are started while their starter is held inherit its narrow mask, and get the wide one."""

from __future__ import annotations

import os

import pytest

pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="a thread is kept only where there are two CPUs"
)

CODE = """
    import subprocess, threading, time
    client = vm.connect(sys.argv[1])
    whole = os.sched_getaffinity(0)
    memory = client.anonymous(64 << 20)
    places = iter(range(0, len(memory), 4096))
    def until(condition):
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.001)
    narrow = 0
    while narrow < 3:
        # Start a thread and a process in the middle of a burst.
        masks = []
        go = threading.Event()
        def body():
            masks.append(os.sched_getaffinity(0))
            go.wait()
            until(lambda: os.sched_getaffinity(0) == whole)
        thread = threading.Thread(target=body)
        for _ in range(20):
            memory[next(places)] = 1
        thread.start()
        child = subprocess.Popen(["sleep", "60"])
        until(lambda: masks)
        narrow += masks[0] != whole
        go.set()
        thread.join()
        until(lambda: os.sched_getaffinity(child.pid) == whole)
        child.kill()
        child.wait()
    say("as wide as before")
    """


def test_what_a_held_thread_starts_is_free_in_the_end(kernels, script):
    assert script(CODE, kernels().socket).good() == "as wide as before\n"
