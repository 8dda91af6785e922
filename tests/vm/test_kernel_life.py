"""How kernels start and end."""

from __future__ import annotations

import os
import re
import signal
import stat as stat_module
import subprocess
import sys
from pathlib import Path

import pytest
from vm_support import has_ended, until, words

from k42 import vm


def serve(path: Path) -> list[str]:
    return [sys.executable, "-m", "k42", "serve", "--socket", str(path), "--budget", "1M"]


@pytest.mark.parametrize(("number", "busy"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_signals_end_it_cleanly(folder, script, number, busy):
    path = folder / "kernel.sock"
    file = folder / "file"
    file.write_bytes(words(4 << 20))
    with vm.launch(path, 1 << 20) as kernel:
        if busy:
            code = """
                mapping = memoryview(vm.connect(sys.argv[1], grace=0.1).open(sys.argv[2]))
                say("ready")
                while True:
                    bytes(mapping[::4096])
                """
            client = script(code, path, file)
            client.line()
        os.kill(kernel.pid, number)
        assert kernel._process.wait(60) == 0
        assert not path.exists()
        log = kernel.log.read_text()
        assert f"{signal.Signals(number).name}: ending" in log
        assert "Traceback" not in log
        if busy:
            assert client.finish() == -signal.SIGBUS
            assert "k42: bus error in the mapping of" in client.stderr()


def test_a_signal_while_it_starts(folder):
    # Whenever it comes, the kernel ends and leaves no socket behind that leads nowhere.
    for delay in range(3):
        path = folder / f"s{delay}"
        with subprocess.Popen(serve(path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            if delay:
                until(lambda process=process, path=path: path.exists() or process.poll() is not None, "it starts")
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) in (0, -signal.SIGTERM)
        assert not path.exists() or delay == 0


def test_the_socket_is_the_users_alone(kernels):
    kernel = kernels()
    assert stat_module.S_IMODE(kernel.socket.stat().st_mode) == 0o600
    assert stat_module.S_IMODE(kernel.log.stat().st_mode) == 0o600


def test_a_second_kernel_on_a_socket_is_refused(kernels, connect):
    kernel = kernels()
    second = subprocess.run(serve(kernel.socket), capture_output=True, text=True, timeout=60)
    assert second.returncode != 0
    assert f"another kernel listens on {kernel.socket} already" in second.stderr.replace("\n", " ")
    assert "Traceback" not in second.stderr
    with pytest.raises(vm.KernelUnavailable, match="another kernel listens"):
        vm.launch(kernel.socket)
    assert connect(kernel).kernel_pid == kernel.pid  # the first is as it was


def test_the_socket_of_a_killed_kernel_is_taken_over(kernels, folder):
    path = folder / "kernel.sock"
    with vm.launch(path, 1 << 20) as first:
        first.kill()
        assert path.exists()
        with pytest.raises(vm.KernelUnavailable, match="no kernel listens"):
            vm.connect(path)
        with vm.launch(path, 1 << 20) as second:
            with vm.connect(path) as client:
                assert client.kernel_pid == second.pid != first.pid
            assert second.stop() == 0


def test_linger(folder):
    path = folder / "kernel.sock"
    for linger in (0.2, 2, 20):  # where all is slow, the kernel may have ended before we come
        with vm.launch(path, 1 << 20, linger=linger) as kernel:
            try:
                with vm.connect(path) as client, client.anonymous(4096) as memory:
                    memory[0] = 1
            except vm.KernelUnavailable:
                continue
            assert kernel._process.wait(60) == 0
            assert not path.exists()
            return
    pytest.fail("the kernel did not wait for its first client")


@pytest.fixture
def runtime(folder, monkeypatch) -> Path:
    """Makes this the place of the user's own kernel."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder / "k42"


def pids_of_kernels(runtime: Path) -> set[int]:
    return {int(pid) for pid in re.findall(r"serving on .* pid (\d+)", (runtime / "kernel.log").read_text())}


def test_the_first_client_starts_the_users_kernel_and_the_last_ends_it(runtime, script):
    code = """
        import warnings
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", vm.UserModeOnlyWarning)
        path = sys.argv[1]
        with open(path, "rb") as file:
            wanted = file.read()
        sys.stdin.readline()
        with vm.open(path) as mapping, vm.anonymous(4096) as memory:
            memory[0] = 1
            assert bytes(mapping) == wanted
            from k42.vm.client import default_client
            say(default_client().kernel_pid)
            sys.stdin.readline()
            assert mapping[-1:] and memory[0] == 1
        """
    file = runtime.parent / "file"
    file.write_bytes(words(100_000))
    clients = [script(code, file, options=("-X", "dev")) for _ in range(4)]
    for client in clients:
        client.tell()  # all at once
    pids = {int(client.line()) for client in clients}
    assert len(pids) == 1
    [pid] = pids
    assert stat_module.S_IMODE(runtime.stat().st_mode) == 0o700
    assert pids_of_kernels(runtime) == pids
    for client in clients[:2]:
        client.tell()
        client.good()
    assert not has_ended(pid)
    for client in clients[2:]:
        client.tell()
        client.good()
        assert client.stderr() == ""
    until(lambda: has_ended(pid), "the kernel ends by itself")
    assert not (runtime / "kernel.sock").exists()
    assert "Traceback" not in (runtime / "kernel.log").read_text()
    # And the next starts another.
    later = script(code, file)
    later.tell()
    assert int(later.line()) != pid
    later.tell()
    later.good()
    until(lambda: not (runtime / "kernel.sock").exists(), "that one ends, too")


def test_a_forked_child_gets_the_users_kernel_for_itself(runtime, script):
    code = """
        path = sys.argv[1]
        mapping = vm.open(path)
        mapping[0]
        if (child := os.fork()) == 0:
            with vm.open(path) as own:
                good = bytes(own) == open(path, "rb").read()
            sys.exit(0 if good else 1)
        _, status = os.waitpid(child, 0)
        say(status, bytes(mapping) == open(path, "rb").read())
        """
    file = runtime.parent / "file"
    file.write_bytes(words(100_000))
    assert script(code, file, options=("-W", "ignore::DeprecationWarning")).good() == "0 True\n"
    [pid] = pids_of_kernels(runtime)
    os.kill(pid, signal.SIGTERM)  # it would end by itself, later
    until(lambda: has_ended(pid), "the kernel ends")


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701])
def test_a_runtime_folder_that_others_can_enter(runtime, mode):
    runtime.mkdir()
    runtime.chmod(mode)
    with pytest.raises(vm.KernelUnavailable, match=r"only you may enter \(chmod 700\)"):
        vm.connect()
    if mode != 0o755:
        return
    served = subprocess.run([sys.executable, "-m", "k42", "serve"], capture_output=True, text=True, timeout=60)
    assert served.returncode != 0
    assert "only you may enter" in served.stderr.replace("\n", " ")
    assert "Traceback" not in served.stderr


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_runtime_folder_that_is_none(runtime, kind):
    if kind == "file":
        runtime.touch(0o600)
    else:
        (runtime.parent / "elsewhere").mkdir(mode=0o700)
        runtime.symlink_to(runtime.parent / "elsewhere")
    with pytest.raises(vm.KernelUnavailable, match="must be a folder of yours"):
        vm.connect()


def test_a_kernel_that_cannot_start_names_its_log(folder):
    path = folder / "kernel.sock"
    with pytest.raises(vm.KernelUnavailable, match=rf"its log: {folder}/kernel.log\n(.|\n)*at least one page"):
        vm.launch(path, 1)
    assert "at least one page" in (folder / "kernel.log").read_text()
    path.mkdir()  # and for another reason
    with pytest.raises(vm.KernelUnavailable, match=r"its log: .*kernel.log"):
        vm.launch(path, 1 << 20)


def test_the_users_kernel_that_cannot_start_names_its_log(runtime):
    runtime.mkdir(mode=0o700)
    (runtime / "kernel.sock").mkdir()
    with pytest.raises(vm.KernelUnavailable, match=rf"its log: {runtime}/kernel.log"):
        vm.connect()
