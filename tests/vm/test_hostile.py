"""Whatever a client sends: the kernel goes on, leaks nothing, and serves the others."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import random
import signal
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vm_support import PAGE, Raw, Script, descriptors_of, has_ended, until, words

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

        def closed() -> bool:
            # Without a GIL what the kernel's main thread has made goes when that thread runs: a request makes it run.
            self.client.stat()
            return len(descriptors_of(self.kernel.pid)) <= len(before)

        until(closed, "all descriptors are closed")
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
        cpus = os.sched_getaffinity(0)
        for cpu in cpus:  # what is made at the first mapping on a CPU, and stays
            os.sched_setaffinity(0, {cpu})
            with client.open(path) as mapping:
                mapping.prefetch()
        os.sched_setaffinity(0, cpus)
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


# Whatever is said, in whatever order, with whatever descriptors: true ones, others', closed at once, or too many.

_NUMBERS = st.sampled_from([-1, 0, 1, 2, PAGE, 10 * PAGE, 1 << 30, (1 << 30) + PAGE, 1 << 40, 1 << 63, 1 << 64])
_VALUES = st.one_of(
    _NUMBERS, st.none(), st.booleans(), st.floats(), st.text(max_size=20), st.lists(_NUMBERS, max_size=3)
)
_OPERATIONS = [
    "hello",
    "uffd",
    "map",
    "window",
    "unmap",
    "stat",
    "channel",
    "flush",
    "resize",
    "pin",
    "advise",
    "url_size",
]
_MESSAGES = st.one_of(
    st.binary(max_size=200),
    st.fixed_dictionaries(
        {"op": st.sampled_from(_OPERATIONS)},
        optional={
            "id": _VALUES,
            "cpu": st.one_of(st.sampled_from([0, 1]), _VALUES),
            "base": _NUMBERS,
            "size": st.one_of(st.sampled_from([PAGE, 10 * PAGE]), _VALUES),
            "first": st.one_of(st.sampled_from([0, 5]), _VALUES),
            "group": st.sampled_from([1, 2, 3, 512]),
            "around": st.sampled_from([1, 16, 17, 1 << 40]),
            "kind": st.sampled_from(["anonymous", "file", "url", "snapshot", 5]),
            "mode": st.sampled_from(["r", "r+", "c", "w", 5]),
            "name": st.text(max_size=10),
            "url": st.sampled_from(["memory://nothing", "file:///etc/hostname", "x", 5]),
            "options": st.one_of(st.just({}), _VALUES),
            "overcommit": st.booleans(),
            "region": _NUMBERS,
            "count": _NUMBERS,
            "advice": st.sampled_from(["normal", "willneed", "dontneed", "x"]),
            "client": st.sampled_from([1, 2, 3, 1 << 70, "1", None]),
            "token": st.one_of(st.text(max_size=32), _VALUES),
            "version": st.sampled_from([1, 1, 1, 0, "1"]),
        },
    ),
)
_STEPS = st.lists(st.tuples(_MESSAGES, st.lists(st.integers(0, 5), max_size=6)), max_size=12)


@pytest.fixture(scope="module")
def belongings(scene: Scene) -> Iterator[list[int]]:
    """Descriptors to send: of a file, for reading and for both; a memfd; a userfaultfd; both ends of a pipe."""
    with scene.client.open(scene.path) as mapping:
        mine = [
            os.open(scene.path, os.O_RDONLY),
            os.open(scene.path, os.O_RDWR),
            os.memfd_create("some"),
            userfaultfd(),
            *os.pipe(),
        ]
        assert mapping[0] == 1
        yield mine
    for descriptor in mine:
        os.close(descriptor)


@settings(max_examples=int(os.environ.get("K42_FUZZ_EXAMPLES", "60")), deadline=None)
@given(steps=_STEPS, greeted=st.booleans(), leaves=st.booleans())
def test_any_conversation(scene, belongings, steps, greeted, leaves):
    with scene.raw(greeted=greeted) as raw:
        raw.socket.settimeout(30)
        for message, chosen in steps:
            data = message if isinstance(message, bytes) else json.dumps(message).encode()
            descriptors = [belongings[i] for i in chosen]
            try:
                socket.send_fds(raw.socket, [data or b"\0"], descriptors)
                if leaves and message is steps[-1][0]:
                    break  # in the middle
                reply, received, _, _ = socket.recv_fds(raw.socket, 65536, 8)
                for descriptor in received:
                    os.close(descriptor)
                if not reply:
                    break  # the kernel had enough of us
                answer = json.loads(reply)
                assert ("error" in answer) != ("ok" in answer)
            except (BrokenPipeError, ConnectionResetError):
                break
    assert not has_ended(scene.kernel.pid)


def test_after_all_conversations(scene):
    with scene.unharmed():
        pass
    assert scene.path.read_bytes() == words(100 * PAGE)


def test_channels_of_others(scene):
    with scene.unharmed(), scene.raw() as raw:
        mine = raw.ask(HELLO)
        for greeting in (
            {"client": mine["client"], "token": "0" * 32},
            {"client": mine["client"], "token": None},
            {"client": mine["client"] - 1, "token": mine["token"]},  # a good client, with our token
            {"client": -1, "token": mine["token"]},
            {"client": mine["client"]},
            {},
        ):
            with scene.raw(greeted=False) as other:
                assert "error" in other.ask({"op": "channel"} | greeting), greeting
        with scene.client.open(scene.path) as theirs, scene.raw(greeted=False) as channel:
            assert channel.ask({"op": "channel", "client": mine["client"], "token": mine["token"]})["ok"]
            for operation in ("flush", "prefetch", "show", "pin", "unpin", "region_stat", "resize", "advise"):
                request = {
                    "op": operation,
                    "region": theirs.base,
                    "first": 0,
                    "count": 1,
                    "page": 0,
                    "size": 1,
                    "advice": "normal",
                }
                assert "no such region" in channel.ask(request)["message"]


def test_floods_of_channels(scene):
    with scene.unharmed(), scene.raw() as raw, contextlib.ExitStack() as stack:
        mine = raw.ask(HELLO)
        greeting = {"op": "channel", "client": mine["client"], "token": mine["token"]}
        answers = []
        for _ in range(40):
            channel = stack.enter_context(scene.raw(greeted=False))
            answers.append(channel.ask(greeting))
            channel.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                for _ in range(1000):  # and reads no answer
                    channel.socket.send(b'{"op": "region_stat", "region": 5}')
        assert sum("ok" in answer for answer in answers) == 16
        assert all("16 channels at most" in answer["message"] for answer in answers if "ok" not in answer)
        scene.good.tell()
        assert scene.good.line() == "right"


def test_what_the_kernel_gives_is_for_reading(scene):
    with scene.unharmed(), scene.raw() as raw:
        raw.socket.send(json.dumps(HELLO).encode())
        _, received, _, _ = socket.recv_fds(raw.socket, 65536, 8)
        for descriptor in received:  # why accesses failed, and the commands
            size = os.fstat(descriptor).st_size
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.write(descriptor, b"x")
            with pytest.raises(OSError, match="Invalid argument"):
                os.ftruncate(descriptor, 0)
            with pytest.raises(PermissionError):
                mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            if os.getuid() == 0:  # who may do all may do this as well; but not make it shorter than the kernel thinks
                own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
                with pytest.raises(PermissionError):
                    os.ftruncate(own, 0)
                os.pwrite(own, b"\xff" * size, 0)  # its own status and commands: it harms itself
                os.close(own)
            os.close(descriptor)


def test_limits_of_one_client(kernels, folder, script):
    # A kernel that may have few descriptors: each file cache costs it some.
    code = """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (2048, 2048))
        folder, = sys.argv[1:]
        kernel = vm.launch(folder + "/kernel.sock", 1 << 20)
        greedy, good = vm.connect(kernel.socket), vm.connect(kernel.socket)
        held = []
        try:
            while True:
                held.append(greedy.anonymous(4096, overcommit=True))
        except vm.KernelUnavailable as error:
            say(len(held), error)
        with good.anonymous(4096) as memory:
            memory[0] = 1
            say(memory[0])
        held.pop().close()
        held.append(greedy.anonymous(4096, overcommit=True))
        for mapping in held:
            mapping.close()
        shown = greedy.anonymous(4096)
        say(greedy.stat()["clients"][0]["regions"])
        greedy.close(), good.close()
        say(kernel.stop())
        """
    greedy = script(code, folder)
    count, _, message = greedy.line().partition(" ")
    assert int(count) == 2048 // 16
    assert "128 file caches at most" in message
    assert [greedy.line() for _ in range(3)] == ["1", "1", "0"]
    greedy.good()


def test_a_million_opens(scene):
    # Of the same file, so that each costs nothing but a region; a few more than there may be stand for a million.
    with scene.unharmed(), scene.raw() as raw:
        uffd = userfaultfd()
        assert raw.ask({"op": "uffd", "cpu": 0}, (uffd,))["ok"]
        os.close(uffd)
        file = os.open(scene.path, os.O_RDONLY)
        for n in range(17_000):
            reply = raw.ask(a_map(scene, kind="file", name="f", base=(n + 1) << 20, size=PAGE), (file,))
            if "ok" not in reply:
                break
        os.close(file)
        assert n == 16384
        assert "16384 mappings at most" in reply["message"]
        assert raw.ask({"op": "unmap", "region": 1 << 20, "base": 1 << 20})["ok"]
        for n in range(1, 70_000):
            reply = raw.ask({"op": "window", "region": 2 << 20, "base": (1 << 45) + (n << 20), "cpu": 0})
            if "ok" not in reply:
                break
        assert "windows at most" in reply["message"]
        scene.good.tell()
        assert scene.good.line() == "right"


def test_connections_that_say_nothing(kernels, folder):
    kernel = kernels()
    with contextlib.ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(Raw(kernel.socket))
        with vm.connect(kernel.socket) as client, client.anonymous(PAGE) as memory:
            assert memory[0] == 0
        until(lambda: len(descriptors_of(kernel.pid)) < 400, "no more of them are kept than there may be")


@pytest.mark.parametrize("how", ["shrink", "punch"])
def test_frames_that_a_writer_takes_away(kernels, connect, script, folder, how):
    # Who may write to the file may as well write zeros, or make it end: others see that, or an error. Never more.
    kernel = kernels(4 << 20)
    path, other = folder / "file", folder / "other"
    path.write_bytes(words(64 * PAGE))
    other.write_bytes(words(64 * PAGE, 1))
    code = """
        import ctypes
        socket, path, how = sys.argv[1:]
        client = vm.connect(socket)
        mapping = client.open(path, "r+")
        mapping[:: 4096]
        memfd = mapping._shown.memfd
        if how == "shrink":
            os.ftruncate(memfd, 4096)
        else:
            ctypes.CDLL(None).fallocate(memfd, 3, ctypes.c_long(4096), ctypes.c_long(63 * 4096))
        say("done")
        os._exit(0)
        """
    client = connect(kernel)
    with client.open(other) as unrelated:
        victim = script(
            """
            mapping = vm.connect(sys.argv[1]).open(sys.argv[2])
            wanted = open(sys.argv[2], "rb").read()
            assert bytes(mapping) == wanted
            say("read")
            sys.stdin.readline()
            try:
                found = bytes(mapping[4096 * 10 : 4096 * 11])
                say(found in (wanted[4096 * 10 : 4096 * 11], bytes(4096)))
            except vm.StoreError as error:
                say("StoreError", error)
            """,
            kernel.socket,
            path,
        )
        victim.line()
        assert script(code, kernel.socket, path, how).good() == "done\n"
        victim.tell()
        status = victim.finish()
        assert status == -signal.SIGBUS or "True" in (said := victim.rest()) or "StoreError" in said
        assert bytes(unrelated) == words(64 * PAGE, 1)
    assert not has_ended(kernel.pid)
    with connect(kernel).open(other) as unrelated:
        assert bytes(unrelated) == words(64 * PAGE, 1)
    assert other.read_bytes() == words(64 * PAGE, 1)
