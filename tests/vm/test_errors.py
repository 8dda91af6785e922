from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from vm_support import PAGE, Raw

from k42 import vm


@pytest.fixture
def path(folder: Path) -> Path:
    made = folder / "file"
    made.write_bytes(bytes(range(256)) * 64)
    return made


def test_what_is_no_regular_file(client, folder):
    with pytest.raises(FileNotFoundError) as missing:
        client.open(folder / "missing")
    assert os.fspath(missing.value.filename) == str(folder / "missing")
    with pytest.raises(IsADirectoryError):
        client.open(folder)
    os.mkfifo(folder / "fifo")  # nobody writes: an ordinary open would wait for ever
    with pytest.raises(ValueError, match="regular"):
        client.open(folder / "fifo")
    with pytest.raises(ValueError, match="regular"):
        client.open("/dev/zero")
    (folder / "empty").touch()
    with pytest.raises(ValueError, match="empty"):
        client.open(folder / "empty")


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (-1, None),
        (0, -1),
        (16384, None),
        (16385, 1),
        (0, 16385),
        (16383, 2),
        (1 << 70, None),
        (0, 1 << 70),
        (-PAGE, 10),
    ],
)
def test_offset_and_length(client, path, offset, length):
    with pytest.raises(ValueError, match=r"offset|length"):
        client.open(path, offset=offset, length=length)


@pytest.mark.parametrize("page_size", [-4096, 0, 1, 2048, 4095, 4097, 12288, (2 << 20) + 1, 4 << 20, 1 << 70])
def test_page_sizes(client, path, page_size):
    with pytest.raises(ValueError, match=r"power of two from 4096 to 2097152 bytes, not"):
        client.open(path, page_size=page_size)
    with pytest.raises(ValueError, match=r"power of two"):
        client.anonymous(10, page_size=page_size)


@pytest.mark.parametrize("mode", ["", "w", "rb", "x", None])
def test_no_modes(client, path, mode):
    with pytest.raises(ValueError, match=r"mode must be 'r', 'r\+', 'w\+' or 'c'"):
        client.open(path, mode)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_anonymous_memory_of_nothing(client, nbytes):
    with pytest.raises(ValueError, match="at least one byte"):
        client.anonymous(nbytes)


@pytest.mark.parametrize("nbytes", [1 << 47, 1 << 62, 1 << 70])
def test_anonymous_memory_beyond_any_address_space(client, nbytes):
    with pytest.raises((ValueError, MemoryError, OSError, OverflowError)):
        client.anonymous(nbytes, overcommit=True)
    assert client.stat()["frames"]["promised_anonymous"] == 0


def test_reading_only(client, path):
    with client.open(path) as mapping:
        with memoryview(mapping) as view:
            assert view.readonly
        with pytest.raises(TypeError):
            mapping[0] = 1


def test_nothing_is_left_by_what_failed(client, path):
    before = client.stat()
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        with pytest.raises(ValueError, match="past the end"):
            client.open(path, length=1 << 30)
        with pytest.raises(vm.OutOfFrames):
            client.anonymous(1 << 40)
    after = client.stat()
    assert after["clients"] == before["clients"]
    assert after["frames"] == before["frames"]
    # At most a userfaultfd for each CPU came to be meanwhile.
    assert len(os.listdir("/proc/self/fd")) <= descriptors + len(os.sched_getaffinity(0))


@pytest.mark.parametrize("budget", ["1", "4095"])
def test_a_budget_below_one_page(folder, budget):
    command = [sys.executable, "-m", "k42", "serve", "--socket", str(folder / "s"), "--budget", budget]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    assert "at least one page of 4096 bytes" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (folder / "s").exists()


def test_no_kernel(folder):
    with pytest.raises(vm.KernelUnavailable, match=r"no kernel listens on .*start one with `k42 serve --socket .*`"):
        vm.connect(folder / "none")
    (folder / "file").touch()
    with pytest.raises(vm.KernelUnavailable, match="no kernel listens"):
        vm.connect(folder / "file")


def test_a_path_too_long_for_a_socket(folder):
    path = folder / ("s" * 120)
    with pytest.raises(vm.KernelUnavailable, match="too long"):
        vm.connect(path)
    with pytest.raises(vm.KernelUnavailable, match="too long"):
        vm.launch(path)


def test_another_version_of_the_protocol(shared_kernel):
    for version in (0, 1, 3, "2", None):
        with Raw(shared_kernel.socket) as raw:
            reply = raw.ask({"op": "hello", "version": version})
            assert reply["error"] == "kernel"
            assert "speaks protocol 2" in reply["message"]
            assert f"client {version}" in reply["message"]
            # Nor is it let in afterwards.
            assert raw.ask({"op": "stat"})["error"] == "protocol"


def test_a_kernel_of_another_version(folder, script):
    code = """
        import json, socket
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(sys.argv[1])
        listener.listen()
        say("ready")
        connection, _ = listener.accept()
        version = json.loads(connection.recv(65536))["version"]
        reply = {"error": "kernel", "message": f"I speak protocol {version + 1}"}
        connection.send(json.dumps(reply).encode())
        """
    kernel = script(code, folder / "s", connect=False)
    kernel.line()
    with pytest.raises(vm.KernelUnavailable, match="I speak protocol 3"):
        vm.connect(folder / "s")


@pytest.mark.parametrize("answer", [b"", b"{", b"[]", b"{}", b'{"ok": true}', b'{"error": 5}', b'"ok"'])
def test_what_answers_is_no_kernel(folder, script, answer):
    code = """
        import socket
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(sys.argv[1])
        listener.listen()
        say("ready")
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.send(bytes.fromhex(sys.argv[2]))
        """
    kernel = script(code, folder / "s", answer.hex(), connect=False)
    kernel.line()
    with pytest.raises((vm.ProtocolError, vm.KernelUnavailable)):
        vm.connect(folder / "s")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_another_user(kernels, script, folder):
    kernel = kernels()
    # Let the other user get as far as the kernel's own check.
    for opened in (kernel.socket.parent, kernel.socket):
        opened.chmod(0o777)
    code = """
        import json, socket, warnings
        path = sys.argv[1]
        vm.connect(path).close()  # brings in all modules while they can be read
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        raw.connect(path)
        say(json.loads(raw.recv(65536))["message"])
        say(repr(raw.recv(65536)))
        raw.close()
        try:
            vm.connect(path)
        except vm.KernelUnavailable as error:
            say(error)
        """
    other = script(code, kernel.socket)
    assert other.line() == "this kernel serves user 0 alone"
    assert other.line() == "b''"
    assert other.line() == "the kernel there belongs to user 0, not to you"
    other.good()
    assert "of user 65534" in kernel.log.read_text()
    kernel.socket.chmod(0o600)
    code = """
        import socket
        os.setuid(65534)
        try:
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect(sys.argv[1])
        except PermissionError:
            say("denied")
        """
    denied = script(code, kernel.socket, connect=False)
    assert denied.line() == "denied"
    denied.good()


def test_not_linux(script):
    code = """
        import k42
        sys.platform = "darwin"
        try:
            import k42.vm
        except k42.Error as error:
            say(type(error).__name__, error)
        import k42.objects
        """
    other = script(code, connect=False)
    assert other.line().startswith("Unsupported k42.vm needs Linux (userfaultfd); this is darwin.")
    other.good()


def test_errors_are_of_the_kinds_that_python_programs_catch():
    assert issubclass(vm.OutOfFrames, MemoryError)
    assert issubclass(vm.KernelUnavailable, ConnectionError)
    assert issubclass(vm.StoreError, OSError)
    assert issubclass(vm.Unsupported, NotImplementedError)
