"""A signal that comes while a thread waits for a page is handled at once, and the fault happens again."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path

import pytest
from vm_support import PAGE, until, words


def stop(pid: int) -> None:
    """Returns when every thread has stopped: until then some fault may still be served."""

    def stopped() -> bool:
        tasks = Path(f"/proc/{pid}/task").glob("*/stat")
        return all(task.read_text().rsplit(") ", 1)[1][0] == "T" for task in tasks)

    os.kill(pid, signal.SIGSTOP)
    until(stopped, "the process has stopped")


def waits_for_a_page(pid: int) -> bool:
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            if (task / "wchan").read_text() == "handle_userfault":
                return True
    return False


@pytest.mark.parametrize("kind", ["file", "anonymous"])
def test_a_handler_runs_while_a_fault_waits(shared_kernel, script, folder, kind):
    kernel = shared_kernel
    path = folder / "file"
    path.write_bytes(words(100 * PAGE))
    handled, handled_write = os.pipe()
    os.set_blocking(handled_write, False)
    code = """
        socket, path, kind, wakeup = sys.argv[1:]
        client = vm.connect(socket)
        mapping = client.open(path) if kind == "file" else client.anonymous(100 * 4096)
        count = 0
        def handler(*_):
            global count
            count += 1
        signal.signal(signal.SIGUSR1, handler)
        signal.set_wakeup_fd(int(wakeup))  # Python's handler waits for the access to end; this is written at once
        say("ready")
        for page in range(0, 100, 20):
            sys.stdin.readline()
            say(mapping[page * 4096 + 1], mapping[page * 4096])
        say(count)
        """
    faulting = script(code, kernel.socket, path, kind, handled_write, pass_fds=(handled_write,))
    assert faulting.line() == "ready"
    for page in range(0, 100, 20):
        stop(kernel.pid)
        faulting.tell()
        until(lambda: waits_for_a_page(faulting.pid), "the fault waits")
        for _ in range(3):
            os.kill(faulting.pid, signal.SIGUSR1)
            ready, _, _ = select.select([handled], [], [], 30)
            assert ready, "the handler did not run"
            assert os.read(handled, 100).strip(bytes([signal.SIGUSR1])) == b""
        os.kill(kernel.pid, signal.SIGCONT)
        at = page * PAGE // 8 + 1
        assert faulting.line() == (f"{at // 256 % 256} {at % 256}" if kind == "file" else "0 0")
    assert int(faulting.line()) >= 5
    faulting.good()
    os.close(handled)
    os.close(handled_write)


def test_a_storm_of_signals(kernels, script, folder):
    kernel = kernels(1 << 20)
    path = folder / "file"
    path.write_bytes(words(4 << 20))
    code = """
        wanted = open(sys.argv[2], "rb").read()
        client = vm.connect(sys.argv[1])
        signals = 0
        def handler(*_):
            global signals
            signals += 1
        signal.signal(signal.SIGPROF, handler)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
        rounds = 0
        while signals < 300 or rounds < 2:
            with client.open(sys.argv[2]) as mapping, client.anonymous(100 * 4096) as memory:
                for at in range(0, len(wanted), 4096):
                    if mapping[at : at + 4096] != wanted[at : at + 4096]:
                        say("WRONG", at)
                memory[::4096] = bytes(range(100))
                if memory[::4096] != bytes(range(100)):
                    say("WRONG")
            rounds += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        say("done")
        """
    assert script(code, kernel.socket, path).good() == "done\n"


def test_a_process_that_is_ended_while_its_fault_waits(kernels, connect, script):
    kernel = kernels()
    client = connect(kernel)
    code = """
        memory = vm.connect(sys.argv[1]).anonymous(4096)
        say("ready")
        sys.stdin.readline()
        memory[0] = 1
        """
    for number in (signal.SIGTERM, signal.SIGKILL):
        faulting = script(code, kernel.socket)
        assert faulting.line() == "ready"
        stop(kernel.pid)
        faulting.tell()
        until(lambda faulting=faulting: waits_for_a_page(faulting.pid), "the fault waits")
        faulting.process.send_signal(number)
        assert faulting.finish() == -number
        os.kill(kernel.pid, signal.SIGCONT)
        until(lambda: len(client.stat()["clients"]) == 1, "the kernel noticed")
        assert client.stat()["frames"]["promised_anonymous"] == 0
