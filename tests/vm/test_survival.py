"""The kernel is killed at any instant: under a supervisor another goes on, and clients notice nothing but the time."""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import time
from pathlib import Path

import pytest
from vm_support import PAGE, Raw, frame_bytes, until, words

from k42 import vm
from k42.experiments import survival
from k42.experiments.survival import has_ended, kernel_of, kill

ROUNDS = int(os.environ.get("K42_KILL_ROUNDS", "24"))
"""How often the kernel is killed in the tests that kill at random; more by this variable."""


@pytest.fixture
def supervised(kernels):
    """Starts a kernel under a supervisor when called."""
    return lambda budget=64 << 20, **options: kernels(budget, supervise=True, **options)


@pytest.mark.timeout(120 + 5 * ROUNDS)
@pytest.mark.parametrize("budget", [256, 48], ids=lambda pages: f"{pages} pages")
def test_killed_at_random_while_clients_read_and_write(folder, budget):
    if ROUNDS > 100:
        faulthandler.cancel_dump_traceback_later()  # whoever asks for so many has the time
    with survival.Survivors(folder, budget * PAGE, random.randrange(1 << 32)) as survivors:
        for _ in range(ROUNDS // 2):
            survivors.kill()
        assert survivors.deaths() == ROUNDS // 2
        assert min(survivors.finish().values()) > 0


def test_a_fault_that_waits_is_served_by_the_next(supervised, script, folder):
    kernel = supervised(1 << 20)
    path = folder / "file"
    path.write_bytes(words(1 << 20))
    code = """
        mapping = vm.connect(sys.argv[1]).open(sys.argv[2])
        say(mapping[0])
        sys.stdin.readline()
        say(bytes(mapping[4096 * 200 : 4096 * 201]) == open(sys.argv[2], "rb").read()[4096 * 200 : 4096 * 201])
        """
    reader = script(code, kernel.socket, path)
    assert reader.line() == "1"
    os.kill(kernel_of(kernel.pid), signal.SIGSTOP)
    reader.tell()
    time.sleep(0.2)  # by now it waits; and if not, the test says as much of less
    kill(kernel.pid)
    assert reader.line() == "True"
    assert reader.finish() == 0


def test_an_end_that_comes_with_a_death_loses_nothing(supervised, script, folder):
    # The supervisor hears of both at once.
    kernel = supervised(1 << 20)
    path = folder / "file"
    path.write_bytes(bytes(64 * PAGE))
    code = """
        mapping = vm.connect(sys.argv[1]).open(sys.argv[2], "r+")
        mapping[: 64 * 4096 : 4096] = b"x" * 64
        say("written")
        sys.stdin.readline()
        """
    writer = script(code, kernel.socket, path)
    assert writer.line() == "written"
    served = kernel_of(kernel.pid)
    os.kill(kernel.pid, signal.SIGSTOP)
    os.kill(served, signal.SIGKILL)
    until(lambda: has_ended(served), "it is dead")
    os.kill(kernel.pid, signal.SIGTERM)
    os.kill(kernel.pid, signal.SIGCONT)
    assert kernel.stop() == 0
    assert path.read_bytes()[::PAGE] == b"x" * 64
    writer.process.kill()


def test_what_is_dirty_and_not_flushed_survives(supervised, script, folder):
    kernel = supervised(1 << 20)
    path = folder / "file"
    path.write_bytes(bytes(64 * PAGE))
    with vm.connect(kernel.socket) as client:
        mapping = client.open(path, "r+")
        memory = client.anonymous(64 * PAGE)
        for page in range(64):
            mapping[page * PAGE : page * PAGE + 4] = page.to_bytes(4, "little")
            memory[page * PAGE : page * PAGE + 4] = page.to_bytes(4, "little")
        before = client.stat()
        kill(kernel.pid)
        after = client.stat()
        assert after["deaths"] == 1
        assert after["pid"] == client.kernel_pid != before["pid"]
        assert after["frames"] == before["frames"]
        for page in range(64):
            assert mapping[page * PAGE : page * PAGE + 4] == page.to_bytes(4, "little")
            assert memory[page * PAGE : page * PAGE + 4] == page.to_bytes(4, "little")
        mapping.flush()
        assert path.read_bytes() == bytes(mapping)
        mapping.close()
        memory.close()
        until(lambda: client.stat()["frames"]["reserved"] == 0, "anonymous memory is given back")


def test_requests_that_are_cut_off_are_made_again(supervised, script, folder):
    # A stopped kernel has read nothing of what is asked for; the next finds it in the socket.
    kernel = supervised(8 << 20)
    path = folder / "file"
    path.write_bytes(words(64 * PAGE))
    code = """
        client = vm.connect(sys.argv[1])
        mapping = client.open(sys.argv[2], "r+")
        mapping[:5] = b"first"
        for what in sys.stdin:
            match what.strip():
                case "map":
                    with client.anonymous(4096) as memory:
                        memory[0] = 7
                        say(memory[0])
                case "open":
                    with client.open(sys.argv[2]) as other:
                        say(other[:5].decode())
                case "flush":
                    mapping[:5] = b"other"
                    mapping.flush()
                    say(open(sys.argv[2], "rb").read(5).decode())
                case "resize":
                    mapping.resize(100 * 4096)
                    say(os.path.getsize(sys.argv[2]) // 4096, mapping[99 * 4096])
                case "prefetch":
                    mapping.prefetch()
                    say("there")
                case "connect":
                    with vm.connect(sys.argv[1]) as other, other.anonymous(4096) as memory:
                        say(memory[0])
        """
    client = script(code, kernel.socket, path)
    for what, answer in {
        "map": "7", "open": "first", "flush": "other", "resize": "100 0", "prefetch": "there", "connect": "0",
    }.items():  # fmt: skip
        os.kill(kernel_of(kernel.pid), signal.SIGSTOP)
        client.tell(what)
        time.sleep(0.1)
        kill(kernel.pid)
        assert client.line() == answer
        client.tell(what)  # and it goes on
        assert client.line() == answer


def test_stopped_and_continued(supervised, kernels, script, folder):
    kernel = kernels(1 << 20)
    path = folder / "file"
    path.write_bytes(words(4 << 20))
    code = """
        wanted = open(sys.argv[2], "rb").read()
        mapping = vm.connect(sys.argv[1], grace=0.2).open(sys.argv[2])
        for _ in range(40):
            assert bytes(mapping) == wanted
        """
    reader = script(code, kernel.socket, path)
    while reader.process.poll() is None:
        os.kill(kernel.pid, signal.SIGSTOP)
        time.sleep(0.05)
        os.kill(kernel.pid, signal.SIGCONT)
        time.sleep(0.05)
    reader.good()


def test_the_end_of_the_supervisor_ends_the_kernel(supervised, kernels, folder):
    kernel = supervised(1 << 20)
    path = folder / "file"
    path.write_bytes(bytes(4 * PAGE))
    pid = kernel_of(kernel.pid)
    with vm.connect(kernel.socket, grace=0.1) as client:
        mapping = client.open(path, "r+")
        mapping[:4] = b"last"
        kernels.kill(kernel)
        until(lambda: has_ended(pid), "the kernel ends")
        assert path.read_bytes()[:4] == b"last"  # cleanly
        with pytest.raises(vm.KernelUnavailable):
            client.stat()
        with pytest.raises(vm.KernelUnavailable):
            mapping.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_the_supervisor_end_the_kernel_cleanly(supervised, number):
    kernel = supervised(1 << 20)
    pid = kernel_of(kernel.pid)
    os.kill(kernel.pid, number)
    assert kernel._process.wait(60) == 0
    assert has_ended(pid)
    assert not kernel.socket.exists()


def test_who_refuses_to_start_is_not_started_again(folder):
    with pytest.raises(vm.KernelUnavailable, match="at least one page") as caught:
        vm.launch(folder / "kernel.sock", 1, supervise=True)
    assert "status 2" in str(caught.value)
    assert "starting another" not in (folder / "kernel.log").read_text()


def test_a_kernel_that_dies_again_and_again_is_given_up(supervised, kernels, script):
    kernel = supervised(1 << 20)
    code = """
        client = vm.connect(sys.argv[1], grace=0.1)
        memory = client.anonymous(40960)
        memory[0] = 1
        say("there")
        sys.stdin.readline()
        memory[4096]
        """
    client = script(code, kernel.socket)
    client.line()
    dead: set[int] = set()
    while kernel._process.poll() is None:
        children = Path(f"/proc/{kernel.pid}/task/{kernel.pid}/children")
        for pid in children.read_text().split() if children.exists() else ():
            if int(pid) not in dead:
                dead.add(int(pid))
                os.kill(int(pid), signal.SIGABRT)  # before it can have served
        time.sleep(0.002)
    assert kernel._process.returncode == 1
    assert "giving up after 5 deaths" in kernel.log.read_text()
    kernels._started.remove(kernel)
    client.tell()
    assert client.finish() == 1
    assert "the kernel that served the mapping of anonymous memory is gone and none took over" in client.stderr()


def test_clients_that_die_meanwhile_are_cleaned_up(supervised, script, folder):
    kernel = supervised(4 << 20)
    path = folder / "file"
    path.write_bytes(words(64 * PAGE))
    code = """
        client = vm.connect(sys.argv[1])
        memory = client.anonymous(1 << 20)
        memory[:: 4096] = b"x" * 256
        mapping = client.open(sys.argv[2], "r+")
        mapping[:4] = b"mine"
        say("there")
        sys.stdin.readline()
        """
    with vm.connect(kernel.socket) as watcher:
        nothing = watcher.stat()["frames"]["promised_anonymous"]
        for _ in range(4):
            client = script(code, kernel.socket, path)
            client.line()
            os.kill(kernel_of(kernel.pid), signal.SIGSTOP)
            client.process.kill()
            client.finish()
            kill(kernel.pid)
            stat = until(lambda: len((found := watcher.stat())["clients"]) == 1 and found, "it is gone")
            assert stat["frames"]["reserved"] == 0
            assert stat["frames"]["promised_anonymous"] == nothing
            until(lambda: path.read_bytes()[:4] == b"mine", "what it wrote is written")
            path.write_bytes(words(64 * PAGE))
        assert frame_bytes(kernel_of(kernel.pid)) <= 4 << 20


def test_clients_killed_at_any_instant_cost_nothing(shared_kernel, script, folder):
    path = folder / "file"
    path.write_bytes(bytes(200 * PAGE))
    code = """
        import random
        client = vm.connect(sys.argv[1])
        say("there")
        while True:
            with client.anonymous(1 << 20, overcommit=True) as memory, client.open(sys.argv[2], "r+") as mapping:
                for page in range(200):
                    memory[page * 4096] = mapping[page * 4096] = 1
                mapping.flush()
        """
    with vm.connect(shared_kernel.socket) as watcher:
        for n in range(12):
            client = script(code, shared_kernel.socket, path)
            client.line()
            time.sleep(random.random() * 0.05 * (n % 4))
            client.process.kill()
            client.finish()
        stat = until(lambda: len((found := watcher.stat())["clients"]) == 1 and found, "all are gone")
        assert stat["frames"]["overcommitted"] == stat["frames"]["reserved"] == 0
        assert stat["frames"]["promised_anonymous"] == 0
        with watcher.open(path) as mapping:
            assert bytes(mapping) == path.read_bytes()


def test_a_stopped_client_holds_nobody_up(kernels, script, folder):
    # It has dirty pages, to be protected before they are written back, and clean ones to be unmapped softly.
    kernel = kernels(64 * PAGE)
    path = folder / "file"
    path.write_bytes(bytes(256 * PAGE))
    code = """
        client = vm.connect(sys.argv[1])
        mapping = client.open(sys.argv[2], "r+")
        for page in range(40):
            mapping[page * 4096] = 1
        say("dirty")
        sys.stdin.readline()
        say(bytes(mapping[: 40 * 4096 : 4096]) == b"\\1" * 40)
        """
    stopped = script(code, kernel.socket, path)
    stopped.line()
    os.kill(stopped.pid, signal.SIGSTOP)
    with vm.connect(kernel.socket) as client, client.open(path, "r+") as mapping:
        for page in range(256):
            mapping[page * PAGE + 1] = 2
        mapping.flush()
        stored = path.read_bytes()
        assert stored[: 40 * PAGE : PAGE] == b"\1" * 40
        assert stored[1::PAGE] == b"\2" * 256
        memory = client.anonymous(32 * PAGE)
        memory[:] = b"z" * (32 * PAGE)
    os.kill(stopped.pid, signal.SIGCONT)
    stopped.tell()
    assert stopped.line() == "True"


def test_a_take_over_with_a_client_that_reads_nothing(supervised, folder):
    kernel = supervised(1 << 20)
    with Raw(kernel.socket) as raw, vm.connect(kernel.socket) as client:
        assert raw.ask({"op": "hello", "version": 2})["supervised"]
        for _ in range(3):
            kill(kernel.pid)
            with client.anonymous(PAGE) as memory:
                assert memory[0] == 0


@pytest.mark.parametrize("overcommit", [False, True])
def test_a_snapshot_has_what_it_had_or_an_error_but_no_wrong_byte(supervised, connect, overcommit):
    supervisor = supervised()
    client = connect(supervisor)
    pages = 12
    mine = client.anonymous(pages * PAGE, overcommit=overcommit)
    before = words(pages * PAGE, 1)
    mine[:] = before
    snapshot = mine.snapshot()
    mine[:PAGE] = words(PAGE, 2)  # the snapshot is given the page
    snapshot[PAGE : 2 * PAGE] = words(PAGE, 3)
    assert bytes(snapshot[2 * PAGE : 3 * PAGE]) == before[2 * PAGE : 3 * PAGE]
    kill(supervisor.pid)
    mine[: 4 * PAGE] = words(4 * PAGE, 4)
    assert bytes(mine) == words(4 * PAGE, 4) + before[4 * PAGE :]
    assert bytes(snapshot[:PAGE]) == before[:PAGE]
    assert bytes(snapshot[PAGE : 2 * PAGE]) == words(PAGE, 3)
    assert bytes(snapshot[2 * PAGE : 3 * PAGE]) == before[2 * PAGE : 3 * PAGE]
    with pytest.raises(vm.StoreError, match="its kernel died"):
        bytes(snapshot[8 * PAGE : 9 * PAGE])
    with pytest.raises(vm.StoreError, match="its kernel died"):
        snapshot[9 * PAGE : 9 * PAGE + 1] = b"x"
    with pytest.raises(vm.Unsupported, match="has no snapshots"):
        snapshot.snapshot()
    with mine.snapshot() as other:
        mine[:PAGE] = words(PAGE, 5)
        assert bytes(other[: 4 * PAGE]) == words(4 * PAGE, 4)
    snapshot.close()
    mine.close()
