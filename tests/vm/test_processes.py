"""Forked, killed and stopped clients."""

from __future__ import annotations

import os
import signal

import pytest
from vm_support import PAGE, PAGES, descriptors_of, until, words

from k42 import vm

# Forking a process that has threads is what is tested here.
FORKING = ("-W", "ignore::DeprecationWarning")


def test_a_forked_child_cannot_plant_pages(shared_kernel, script, path):
    kernel = shared_kernel
    code = """
        import mmap
        socket, path = sys.argv[1:]
        wanted = open(path, "rb").read()
        client = vm.connect(socket)
        mapping = client.open(path)
        memory = client.anonymous(len(wanted))
        assert mapping[:4096] == wanted[:4096]
        memory[0] = 1
        views = [memoryview(mapping), memoryview(memory)]
        for view in views:
            for page in (0, 5, 63):  # present, and not
                if (child := os.fork()) == 0:
                    # What the child maps meanwhile must not come to the inherited addresses.
                    others = [mmap.mmap(-1, len(wanted)) for _ in range(32)]
                    view[page * 4096]
                    os._exit(0)
                _, status = os.waitpid(child, 0)
                say(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "survived")
        if (child := os.fork()) == 0:
            for made in (mapping, memory):
                for use in (bytes, lambda m: m[0], lambda m: m[:2]):
                    try:
                        use(made)
                    except BufferError as error:
                        say(error)
                made.close()
                made.close()
            client.close()
            try:
                client.open(path)
            except vm.KernelUnavailable as error:
                say(error)
            sys.exit(7)  # through the interpreter's own end
        _, status = os.waitpid(child, 0)
        say(os.waitstatus_to_exitcode(status))
        say(bytes(mapping) == wanted, bytes(memory) == b"\\1" + bytes(len(wanted) - 1))
        say([c["regions"] for c in client.stat()["clients"] if c["pid"] == os.getpid()])
        """
    parent = script(code, kernel.socket, path, options=FORKING)
    assert [parent.line() for _ in range(6)] == [str(int(signal.SIGSEGV))] * 6
    for _ in range(6):
        assert parent.line() == "this mapping belongs to the parent process: open it again in the forked child"
    assert parent.line() == "this client is closed"
    assert parent.line() == "7"
    assert parent.line() == "True True"
    assert parent.line() == "[2]"
    parent.good()
    assert parent.stderr().count("it belongs to the parent process: open it again in the forked child") == 6


def test_a_forked_child_opens_its_own(shared_kernel, script, path):
    kernel = shared_kernel
    code = """
        socket, path = sys.argv[1:]
        wanted = open(path, "rb").read()
        client = vm.connect(socket)
        mapping = client.open(path)
        mapping[0]
        for _ in range(5):
            if (child := os.fork()) == 0:
                with vm.connect(socket) as own, own.open(path) as mine, own.anonymous(4096) as memory:
                    memory[0] = 1
                    good = bytes(mine) == wanted and own.stat()["clients"][-1]["pid"] == os.getpid()
                sys.exit(0 if good else 1)
            _, status = os.waitpid(child, 0)
            say(status)
        say(bytes(mapping) == wanted)
        """
    parent = script(code, kernel.socket, path, options=FORKING)
    assert [parent.line() for _ in range(6)] == ["0"] * 5 + ["True"]
    parent.good()


def test_the_death_of_a_child_does_not_disturb_the_parents_watch(kernels, script, path):
    # A child has copies of the descriptors by which the parent notices the kernel's death.
    kernel = kernels()
    code = """
        client = vm.connect(sys.argv[1], grace=0.1)
        mapping = client.open(sys.argv[2])
        for _ in range(3):
            if (child := os.fork()) == 0:
                sys.exit(0)
            os.waitpid(child, 0)
        if (child := os.fork()) == 0:
            signal.pause()
        say(child)
        sys.stdin.readline()
        memoryview(mapping)[0]
        """
    parent = script(code, kernel.socket, path, options=FORKING)
    child = int(parent.line())
    try:
        kernels.kill(kernel)
        parent.tell()
        assert parent.finish() == -signal.SIGBUS
        assert "none took over" in parent.stderr()
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(shared_kernel, script, path, folder, method):
    kernel = shared_kernel
    program = folder / "program.py"
    program.write_text(
        """
import multiprocessing, sys
import k42.vm as vm

def work(job):
    socket, path, part = job
    with vm.connect(socket) as client, client.open(path) as mapping:
        return sum(mapping[part::8])

if __name__ == "__main__":
    _, socket, path, method = sys.argv
    wanted = open(path, "rb").read()
    client = vm.connect(socket)
    mapping = client.open(path)
    mapping[0]
    with multiprocessing.get_context(method).Pool(2) as pool:
        parts = pool.map(work, [(socket, path, part) for part in range(8)], chunksize=1)
        pool.close()
        pool.join()
    print(sum(parts) == sum(wanted) == sum(memoryview(mapping)))
"""
    )
    runner = (
        "import runpy\nprogram = sys.argv.pop(1)\nsys.argv[0] = program\nrunpy.run_path(program, run_name='__main__')"
    )
    parent = script(runner, program, kernel.socket, path, method, connect=False, options=FORKING)
    assert parent.good() == "True\n"


WORKING = """
    socket, path = sys.argv[1:]
    wanted = open(path, "rb").read()
    client = vm.connect(socket)
    memory = client.anonymous(100 * 4096)
    more = client.anonymous(1 << 30, overcommit=True)
    say("ready")
    count = 0
    while True:
        with client.open(path) as mapping:
            if bytes(mapping) != wanted:
                say("WRONG")
        page = count % 100
        memory[page * 4096] = more[page * 4096] = page
        count += 1
        if count % 100 == 0:
            say(count)
    """


def test_a_killed_client_leaves_nothing(kernels, connect, script, path):
    kernel = kernels(16 << 20)
    client = connect(kernel)
    with client.open(path) as mapping:
        assert len(bytes(mapping)) == PAGES * PAGE
    settled = []
    for _ in range(2):  # the first makes what stays
        other = script(WORKING, kernel.socket, path)
        assert other.line() == "ready"
        before = descriptors_of(kernel.pid), client.stat()["frames"]
        killed = [script(WORKING, kernel.socket, path) for _ in range(3)]
        for one in killed:
            assert [one.line(), one.line()] == ["ready", "100"]
        assert len(client.stat()["clients"]) == 5
        for one in killed:
            one.process.kill()
            one.process.wait()
        until(lambda: len(client.stat()["clients"]) == 2, "the kernel noticed")
        seen = int(other.line())
        while int(other.line()) < seen + 300:
            pass  # the other goes on
        frames = client.stat()["frames"]
        assert frames["promised_anonymous"] == before[1]["promised_anonymous"] == 100
        assert frames["reserved"] == 100
        assert frames["file"] == PAGES + 100  # what is overcommitted can be swapped out, as a file can be read again
        other.process.kill()
        other.process.wait()
        until(lambda: len(client.stat()["clients"]) == 1, "the kernel noticed")
        frames = client.stat()["frames"]
        assert frames["reserved"] == frames["overcommitted"] == frames["promised_anonymous"] == 0
        assert frames["file"] == PAGES
        settled.append(until_settled(kernel.pid, below=len(before[0])))
    assert settled[0] == settled[1]


def until_settled(pid: int, below: int) -> int:
    """The number of descriptors, once those of the clients that have gone are closed."""
    until(lambda: len(descriptors_of(pid)) < below, "descriptors are closed")
    counts = [-1]

    def same_for_long() -> bool:
        counts.append(len(descriptors_of(pid)))
        return len(counts) > 40 and len(set(counts[-40:])) == 1

    until(same_for_long, "the number of descriptors stays")
    return counts[-1]


def test_a_stopped_client_holds_nobody_up(kernels, connect, script, folder):
    kernel = kernels(1 << 20)
    path = folder / "file"
    content = words(4 << 20)
    path.write_bytes(content)
    code = """
        import zlib
        socket, path = sys.argv[1:]
        wanted = open(path, "rb").read()
        client = vm.connect(socket)
        mapping = client.open(path)
        view = memoryview(mapping)
        done = False
        def read():
            while not done:
                for at in range(0, len(wanted), 8192):
                    if zlib.crc32(view[at : at + 8192]) != zlib.crc32(wanted[at : at + 8192]):
                        say("WRONG")
        threads = [threading.Thread(target=read) for _ in range(3)]
        say("reading")
        for thread in threads: thread.start()
        sys.stdin.readline()
        done = True
        for thread in threads: thread.join()
        say("done")
        """
    client = connect(kernel)
    stopped = [script(code, kernel.socket, path) for _ in range(3)]
    try:
        for one in stopped:
            assert one.line() == "reading"
            one.process.send_signal(signal.SIGSTOP)  # somewhere among its faults
        for _ in range(3):
            with client.open(path) as mapping:
                assert bytes(mapping) == content
        with client.anonymous(512 << 10) as memory:
            memory[::PAGE] = b"x" * 128
        assert len(client.stat()["clients"]) == 4
    finally:
        for one in stopped:
            one.process.send_signal(signal.SIGCONT)
    for one in stopped:
        one.tell()
        assert one.good() == "done\n"


def test_a_stopped_client_can_be_killed(kernels, connect, script, path):
    kernel = kernels()
    client = connect(kernel)
    one = script(WORKING, kernel.socket, path)
    assert one.line() == "ready"
    one.process.send_signal(signal.SIGSTOP)
    assert len(client.stat()["clients"]) == 2
    one.process.kill()
    one.process.wait()
    until(lambda: len(client.stat()["clients"]) == 1, "the kernel noticed")
    assert client.stat()["frames"]["promised_anonymous"] == 0


def test_clients_come_and_go(kernels, connect, path):
    kernel = kernels()
    client = connect(kernel)
    content = path.read_bytes()
    with client.open(path) as mapping:
        for _ in range(30):
            with vm.connect(kernel.socket) as other, other.open(path) as theirs:
                assert theirs[-PAGE:] == content[-PAGE:]
            assert mapping[-PAGE:] == content[-PAGE:]
        until(lambda: len(client.stat()["clients"]) == 1, "all have gone")
        cpus = len(os.sched_getaffinity(0))
        until(
            lambda: descriptors_of(kernel.pid).count("anon_inode:[userfaultfd]") <= cpus,
            "and what they gave the kernel, too",  # without a GIL by a collection, a moment later
        )
