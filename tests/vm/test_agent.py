"""The agent: the client's thread that does to its address space what the kernel asks for."""

from __future__ import annotations

import os
import signal
import textwrap

import pytest
from vm_support import has_ended, until

MOVES = """
    import numpy as np
    SPAN = 2 << 20
    client = vm.connect(sys.argv[1], grace=0.5)
    cpus = sorted(os.sched_getaffinity(0))[:2]
    ended = threading.Event()
    from k42 import _native
    def moving(memory):
        # Threads of two CPUs share its spans, and so move them.
        pages = np.asarray(memory)[::4096]
        def touch(cpu):
            os.sched_setaffinity(0, {cpu})
            while not ended.is_set():
                np.add(pages, 1, out=pages)
                _native.dontneed(memory)
        threads = [threading.Thread(target=touch, args=(cpu,), daemon=True) for cpu in cpus]
        for thread in threads: thread.start()
        return threads
    def rehomed():
        return client.stat()["engine"]["rehomed"]
    """
two_cpus = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="spans move only where there are two CPUs")


def join(*codes: str) -> str:
    return "\n".join(map(textwrap.dedent, codes))


@two_cpus
def test_the_end_of_the_kernel_ends_who_waits_in_a_move(kernels, script):
    # Wherever in a move the kernel dies, accesses end loudly and the process is not left hanging.
    for pause in (0.0, 0.003, 0.01):
        kernel = kernels()
        code = """
            before = rehomed()
            moving(client.anonymous(8 * SPAN, overcommit=True))
            while rehomed() == before: pass
            say("moving")
            sys.stdin.readline()
            """
        process = script(join(MOVES, code), kernel.socket)
        assert process.line() == "moving"
        signal.sigtimedwait([], pause)  # never comes
        kernels.kill(kernel)
        until(lambda process=process: has_ended(process.pid), "it is ended")
        assert process.finish() == -signal.SIGBUS
        assert "k42: bus error in the mapping of anonymous memory" in process.stderr()


@two_cpus
def test_a_stopped_kernel_holds_nobody_up_who_needs_nothing(kernels, script):
    kernel = kernels()
    code = """
        before = rehomed()
        threads = moving(client.anonymous(8 * SPAN, overcommit=True))
        while rehomed() == before: pass
        say("moving")
        sys.stdin.readline()
        # The interpreter goes on; and the process ends, whatever its agent waits for.
        say(sum(range(100)))
        os._exit(0)
        """
    process = script(join(MOVES, code), kernel.socket)
    assert process.line() == "moving"
    os.kill(kernel.pid, signal.SIGSTOP)
    process.tell()
    assert process.line() == "4950"
    assert process.finish() == 0
    os.kill(kernel.pid, signal.SIGCONT)


@two_cpus
def test_windows_that_close_while_spans_move(shared_kernel, script):
    # What the program puts at the addresses afterwards is not touched.
    code = """
        before = rehomed()
        for turn in range(40):
            memory = client.anonymous(4 * SPAN, overcommit=True)
            base, size = memory.base, len(memory)
            ended.clear()
            threads = moving(memory)
            ended.wait(0.01)
            ended.set()
            for thread in threads: thread.join()
            memory.close()
            fresh = np.full(size, 7, "u1")
            assert (fresh == 7).all()
        assert rehomed() > before
        say("untouched")
        """
    assert script(join(MOVES, code), shared_kernel.socket).good() == "untouched\n"


def test_page_tables_of_idle_spans_are_freed(kernels, script):
    # The kernel lets a client have page tables for 1024 spans and twice its budget: here 1088.
    kernel = kernels(64 << 20)
    code = """
        import time
        memory = client.anonymous(9000 * SPAN, overcommit=True)
        shown = memoryview(memory)
        first = -memory.base % SPAN
        def table_bytes():
            for line in open("/proc/self/status"):
                if line.startswith("VmPTE:"):
                    return int(line.split()[1]) * 1024
        def touch(spans):
            for span in spans:
                shown[first + span * SPAN] = span % 251 + 1
        small = table_bytes()
        touch(range(3000))
        assert table_bytes() - small > 2900 * 4096
        time.sleep(5)  # what has no fault for 4 s is idle
        touch(range(3000, 6000))
        end = time.monotonic() + 30
        while table_bytes() - small > 4600 * 4096:  # the agent is still at it
            assert time.monotonic() < end, table_bytes() - small
        for span in range(6000):
            assert shown[first + span * SPAN] == span % 251 + 1  # the frames stayed
        say("freed")
        """
    assert script(join(MOVES, code), kernel.socket).good() == "freed\n"
