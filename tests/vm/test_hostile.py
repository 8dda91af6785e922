"""Whatever a client sends: the kernel goes on, leaks nothing, and serves the others."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vm_support import PAGE, Raw, Script, descriptors_of, until, words

from k42 import _native, vm

HELLO = {"op": "hello", "version": 2}


class Scene:
    """A kernel, a good client of it in another process that reads all along, and a file."""

    def __init__(self, kernel: vm.KernelProcess, path: Path, good: Script, client: vm.Client) -> None:
        self.kernel = kernel
        self.path = path
        self.good = good
        self.client = client

    def raw(self, *, greeted: bool = True) -> Raw:
        raw = Raw(self.kernel.socket)
        if greeted:
            assert raw.ask(HELLO)["ok"]
        return raw

    @contextlib.contextmanager
    def unharmed(self) -> Iterator[None]:
        """What is done within costs the kernel nothing, and holds the good client up in nothing."""
        until(lambda: len(self.client.stat()["clients"]) == 2, "only the good are there")
        before = descriptors_of(self.kernel.pid)
        frames = self.client.stat()["frames"]
        yield
        until(lambda: len(self.client.stat()["clients"]) == 2, "only the good are there")
        until(lambda: len(descriptors_of(self.kernel.pid)) <= len(before), "all descriptors are closed")
        after = self.client.stat()["frames"]
        for kind in ("promised_anonymous", "reserved", "overcommitted"):
            assert after[kind] == frames[kind]
        self.good.tell()
        assert self.good.line() == "right"


@pytest.fixture(scope="module")
def scene(shared_kernel: vm.KernelProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    path = tmp_path_factory.mktemp("hostile") / "file"
    path.write_bytes(words(100 * PAGE))
    code = """
        socket, path = sys.argv[1:]
        wanted = open(path, "rb").read()
        client = vm.connect(socket)
        cpus = sorted(os.sched_getaffinity(0))
        for line in sys.stdin:
            right = True
            for cpu in cpus:  # every fault server serves
                os.sched_setaffinity(0, {cpu})
                with client.open(path) as mapping, client.anonymous(40960) as memory:
                    memory[::4096] = b"x" * 10
                    right &= bytes(mapping) == wanted and memory[4096] == 120
            say("right" if right else "WRONG")
        """
    good = Script("signal.alarm(0)\n" + textwrap.dedent(code), shared_kernel.socket, path)
    with vm.connect(shared_kernel.socket) as client:
        good.tell()
        assert good.line() == "right"
        yield Scene(shared_kernel, path, good, client)
    good.dispose()


def userfaultfd() -> int:
    with contextlib.suppress(PermissionError):
        return _native.open_userfaultfd(False)
    return _native.open_userfaultfd(True)


NO_MESSAGES = [
    b"\0",
    b"hello",
    b"{",
    b"[]",
    b"5",
    b"null",
    b'"hello"',
    b"\xff\xfe\xfd",
    b"[" * 60_000,  # deeper than any parser goes
    b'{"a":' * 10_000,
    b"9" * 60_000,
    b"-",
    b" " * 65_536,
    b"x" * 65_537,  # longer than a message may be
    b"x" * 150_000,
    b'{"op": "hello", "version": NaN}',
    b'{"op": "hello", "version": Infinity}',
    b'{"op": "\\ud800"}',
]


@pytest.mark.parametrize("data", NO_MESSAGES, ids=lambda data: f"{data[:12]!r}x{len(data)}")
@pytest.mark.parametrize("greeted", [False, True])
def test_what_is_no_message(scene, data, greeted):
    with scene.unharmed(), scene.raw(greeted=greeted) as raw:
        assert raw.ask(data)["error"] in ("protocol", "kernel", "value")
        if greeted:
            assert raw.ask({"op": "stat"})["ok"]  # and the next is heard


def test_an_empty_message(scene):
    with scene.unharmed(), scene.raw() as raw:
        raw.socket.send(b"")
        assert raw.socket.recv(100) == b""  # taken for the end


def test_random_bytes(scene):
    chosen = random.Random(42)
    with scene.unharmed(), scene.raw() as raw:
        for _ in range(300):
            assert "error" in raw.ask(chosen.randbytes(chosen.randrange(1, 2000)))


def a_map(scene: Scene, **changed: Any) -> dict[str, Any]:
    message = {"op": "map", "cpu": 0, "base": 1 << 30, "size": 10 * PAGE, "first": 0, "group": 1}
    message |= {"kind": "anonymous", "overcommit": False}
    return {key: value for key, value in (message | changed).items() if value is not ...}


ODD = [
    None,
    True,
    -1,
    0,
    1,
    7,
    1 << 31,
    1 << 63,
    1 << 64,
    1 << 200,
    -(1 << 70),
    1.5,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x",
    "7",
    "9" * 5000,
    "\ud800",
    "\0",
    "x" * 30_000,
    [],
    [1],
    {},
    {"a": 1},
]


@pytest.mark.parametrize("with_file", [False, True])
def test_odd_values_in_every_place(scene, with_file):
    kind = {"kind": "file", "name": "f"} if with_file else {}
    file = os.open(scene.path, os.O_RDONLY)
    descriptors = (file,) if with_file else ()
    with scene.unharmed(), scene.raw() as raw:
        uffd = userfaultfd()
        assert raw.ask({"op": "uffd", "cpu": 0}, (uffd,))["ok"]
        mapped = 0
        for key in a_map(scene, **kind):
            for value in [..., *ODD]:
                if key == "size" and isinstance(value, int) and value > 1 << 20:
                    continue
                reply = raw.ask(
                    a_map(scene, **kind, base=(mapped + 1) << 30) | ({key: value} if value is not ... else {}),
                    descriptors,
                )
                mapped += "ok" in reply
        for operation in ("window", "unmap"):
            for key in ("region", "base", "cpu"):
                for value in ODD:
                    raw.ask({"op": operation, "region": 1 << 30, "base": 1 << 40, "cpu": 0, key: value})
        for value in ODD:
            raw.ask({"op": value})
            raw.ask({"op": "uffd", "cpu": value})
        assert raw.ask({"op": "stat"})["ok"]
        os.close(uffd)
    os.close(file)


def test_values_that_must_be_refused(scene):
    with scene.unharmed(), scene.raw() as raw:
        assert raw.ask(a_map(scene))["error"]  # no userfaultfd yet
        uffd = userfaultfd()
        assert raw.ask({"op": "uffd", "cpu": 0}, (uffd,))["ok"]
        assert raw.ask({"op": "uffd", "cpu": 0}, (uffd,)) == {"ok": True}  # the first stays
        os.close(uffd)
        for changed in (
            {"cpu": -1},
            {"cpu": 1000},
            {"cpu": "0"},
            {"base": 1},
            {"base": -PAGE},
            {"base": 1 << 60},
            {"size": 0},
            {"size": -PAGE},
            {"size": 100},
            {"first": -1},
            {"group": 0},
            {"group": 3},
            {"group": 1024},
            {"group": -1},
            {"kind": "file", "name": "x"},
            {"size": 1 << 56},
            {"base": "x"},
            {"overcommit": ...},
        ):
            assert "error" in raw.ask(a_map(scene, **changed)), changed
        assert raw.ask(a_map(scene))["ok"]
        for start in ((1 << 30) + PAGE, (1 << 30) - 5 * PAGE, 1 << 30):
            # What was at these addresses is gone: the client shows something new there.
            assert raw.ask(a_map(scene, base=start)) == {"ok": True, "region": start}
            mine = [c["regions"] for c in raw.ask({"op": "stat"})["stat"]["clients"] if c["pid"] == os.getpid()]
            assert 1 in mine
        for region, base in ((1 << 30, 5), (5, 1 << 30)):  # nothing there: nothing is done
            assert raw.ask({"op": "unmap", "region": region, "base": base}) == {"ok": True}
        assert "error" in raw.ask({"op": "window", "region": 5, "base": 1 << 40, "cpu": 0})
        assert "error" in raw.ask({"op": "window", "region": 1 << 30, "base": (1 << 30) + PAGE, "cpu": 0})
        assert raw.ask({"op": "unmap", "region": 1 << 30, "base": 1 << 30})["ok"]
        assert raw.ask({"op": "unmap", "region": 1 << 30, "base": 1 << 30})["ok"]


def test_wrong_descriptors(scene):
    read_end, write_end = os.pipe()
    directory = os.open("/", os.O_RDONLY)
    file = os.open(scene.path, os.O_RDONLY)
    writable = os.open(scene.path.with_name("other"), os.O_WRONLY | os.O_CREAT)
    path_only = os.open(scene.path, os.O_PATH)
    left, right = socket.socketpair()
    wrong = [read_end, write_end, directory, writable, path_only, left.fileno()]
    with scene.unharmed(), scene.raw() as raw:
        for descriptor in [*wrong, file]:
            assert "error" in raw.ask({"op": "uffd", "cpu": 0}, (descriptor,))
        for count in (0, 2, 3, 4, 5, 50):
            assert "error" in raw.ask({"op": "uffd", "cpu": 0}, (file,) * count)
        uffd = userfaultfd()
        assert raw.ask({"op": "uffd", "cpu": 0}, (uffd,))["ok"]
        for descriptor in [*wrong, uffd]:
            assert "error" in raw.ask(a_map(scene, kind="file", name="x"), (descriptor,))
        for count in (0, 2, 3, 4, 5, 50):
            assert "error" in raw.ask(a_map(scene, kind="file", name="x"), (file,) * count)
        # Where none is asked for they are closed.
        for _ in range(50):
            assert raw.ask({"op": "stat"}, (file, read_end, directory))["ok"]
            assert "error" in raw.ask({"op": "nothing"}, (file, read_end))
            assert "error" in raw.ask(b"no message", (file, read_end))
        os.close(uffd)
    for descriptor in (read_end, write_end, directory, file, writable, path_only):
        os.close(descriptor)
    left.close()
    right.close()


def test_a_userfaultfd_that_blocks_its_reader(scene):
    # The server thread of the CPU reads it: it must not wait there.
    with scene.unharmed(), scene.raw() as raw:
        for index in range(len(os.sched_getaffinity(scene.kernel.pid))):
            uffd = userfaultfd()
            fcntl.fcntl(uffd, fcntl.F_SETFL, fcntl.fcntl(uffd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
            raw.ask({"op": "uffd", "cpu": index}, (uffd,))
            os.close(uffd)
        scene.good.tell()
        assert scene.good.line() == "right"


def test_a_userfaultfd_that_is_not_set_up(scene):
    import ctypes

    with scene.unharmed(), scene.raw() as raw:
        uffd = (
            ctypes.CDLL(None).syscall(323, os.O_NONBLOCK | os.O_CLOEXEC | 1) if os.uname().machine == "x86_64" else -1
        )
        if uffd < 0:
            pytest.skip("the number of the system call is known for x86-64 alone, or it is not allowed")
        raw.ask({"op": "uffd", "cpu": 0}, (uffd,))
        assert raw.ask(a_map(scene))["ok"]
        os.close(uffd)
        assert raw.ask({"op": "stat"})["ok"]


def test_hellos_that_are_not_finished(scene):
    with scene.unharmed():
        for _ in range(20):
            with scene.raw(greeted=False) as raw:
                raw.socket.send(b'{"op": "hel')
            with scene.raw(greeted=False):
                pass
            with scene.raw(greeted=False) as raw:
                raw.socket.send(b'{"op": "hello", "version": 2}')  # gone before the reply
            with scene.raw(greeted=False) as raw:
                raw.socket.shutdown(socket.SHUT_WR)


def test_two_hundred_quick_connections(scene):
    with scene.unharmed():
        for _ in range(200):
            scene.raw(greeted=False).socket.close()
        kept = [scene.raw(greeted=False) for _ in range(100)]  # and some at once
        scene.good.tell()
        assert scene.good.line() == "right"
        for raw in kept:
            raw.socket.close()


def test_who_never_reads_the_replies(scene):
    with scene.unharmed(), scene.raw() as raw:
        raw.socket.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            for _ in range(5000):
                raw.socket.send(b'{"op": "stat"}')
                sent += 1
        assert sent > 10
        scene.good.tell()
        assert scene.good.line() == "right"


def test_who_goes_in_the_middle_of_everything(scene):
    for stage in range(4):
        with scene.unharmed(), scene.raw() as raw:
            uffd = userfaultfd()
            if stage > 0:
                raw.ask({"op": "uffd", "cpu": 0}, (uffd,))
            if stage > 1:
                raw.ask(a_map(scene, size=1 << 20))
            if stage > 2:
                raw.ask({"op": "window", "region": 1 << 30, "base": 1 << 40, "cpu": 0})
            os.close(uffd)


def test_counts_of_many_files_with_long_names(kernels, connect, folder):
    client = connect(kernels())
    place = folder / ("語" * 80) / ("語" * 80)
    place.mkdir(parents=True)
    for i in range(150):
        path = place / f"{i}"
        path.write_bytes(b"x")
        client.open(path).close()
    files = client.stat()["files"]
    assert len(files) >= 50
    assert {file["pages"] for file in files} == {1}


def test_names_that_are_none(scene):
    scratch = scene.path.with_name("scratch")
    scratch.write_bytes(b"x")
    scene.client.open(scratch).close()  # the kernel keeps it, as it will keep the last below
    with scene.unharmed(), scene.raw() as raw:
        uffd = userfaultfd()
        raw.ask({"op": "uffd", "cpu": 0}, (uffd,))
        os.close(uffd)
        for name in ["", "\0", "a\0b", "\ud800", "\udcff", "x" * 60_000, "語" * 5000, "../..", 5, None, ["x"]]:
            scratch.write_bytes(scratch.read_bytes() + b"x")  # so that the name is used, and not that of before
            descriptor = os.open(scratch, os.O_RDONLY)
            if "ok" in raw.ask(a_map(scene, kind="file", name=name, size=PAGE), (descriptor,)):
                assert raw.ask({"op": "unmap", "region": 1 << 30, "base": 1 << 30})["ok"]
            os.close(descriptor)
        assert raw.ask({"op": "stat"})["ok"]
