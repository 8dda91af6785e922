"""Copy-on-write snapshots: isolation both ways, on real memory, with budgets that push pages out all the time."""

from __future__ import annotations

import itertools
import os
import struct
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vm_support import PAGE, Kernels, descriptors_of, file_counts, frame_bytes, until, words

from k42 import vm

_PAGES = 16


@pytest.mark.parametrize("budget", [64 << 20, 24 * PAGE, 2 * PAGE, PAGE])
@pytest.mark.parametrize("swapping", [False, True], ids=["reserved", "overcommitted"])
def test_isolation_both_ways(kernels, connect, budget, swapping):
    client = connect(kernels(budget))
    if not swapping and budget < 24 * PAGE:
        pytest.skip("memory that is reserved needs a budget")
    size = (4 if budget < 64 << 20 else 4 * _PAGES) * PAGE
    mine = client.anonymous(size, overcommit=swapping)
    mine[: size // 2] = words(size // 2, 1)
    before = bytes(mine)
    with mine.snapshot() as snapshot:
        assert snapshot.mode == "anonymous"
        mine[100:-100] = words(size - 200, 2)
        assert bytes(snapshot) == before
        now = bytes(mine)
        snapshot[50:-50] = words(size - 100, 3)
        assert bytes(mine) == now
        theirs = bytes(snapshot)
        assert theirs[50:-50] == words(size - 100, 3)
        mine.close()
        assert bytes(snapshot) == theirs


def test_snapshots_of_snapshots_that_go_in_any_order(client):
    size = 8 * PAGE
    origin = client.anonymous(size)
    kept = [(origin, bytearray(size))]
    for turn in range(8):
        of, content = kept[turn * 5 % len(kept)]
        kept.append((of.snapshot(), bytearray(content)))
        for number, (mapping, known) in enumerate(kept):
            at = (turn + number) % 8 * PAGE
            mapping[at : at + 9] = known[at : at + 9] = b"%9d" % (turn * 100 + number)
    while kept:
        for mapping, known in kept:
            assert bytes(mapping) == known
        mapping, _ = kept.pop(len(kept) * 3 // 5)
        mapping.close()


def test_a_file_keeps_its_own_writes_and_its_snapshot_does_not_see_them(client, folder: Path):
    path = folder / "file"
    content = words(10 * PAGE + 77)
    path.write_bytes(content)
    with client.open(path, "r+", offset=PAGE + 3) as mapping:
        snapshot = mapping.snapshot()
        assert len(snapshot) == len(mapping)
        mapping[: 5 * PAGE] = bytes(5 * PAGE)
        mapping.flush()
        snapshot[9 * PAGE :] = bytes(len(snapshot) - 9 * PAGE)
        assert path.read_bytes() == content[: PAGE + 3] + bytes(5 * PAGE) + content[6 * PAGE + 3 :]
        assert bytes(snapshot)[: 9 * PAGE] == content[PAGE + 3 : 10 * PAGE + 3]
    assert bytes(snapshot)[: 9 * PAGE] == content[PAGE + 3 : 10 * PAGE + 3]
    snapshot.close()


def test_a_file_that_shrinks_and_grows(client, folder: Path):
    path = folder / "file"
    content = words(10 * PAGE + 77)
    path.write_bytes(content)
    with client.open(path, "r+") as mapping:
        first = mapping.snapshot()
        mapping.resize(3 * PAGE + 5)
        second = mapping.snapshot()
        mapping.resize(20 * PAGE)
        mapping[3 * PAGE :] = b"x" * 17 * PAGE
        assert bytes(first) == content
        assert bytes(second) == content[: 3 * PAGE + 5]
        first.resize(2 * PAGE)
        assert bytes(first) == content[: 2 * PAGE]
    second.close()
    assert bytes(first) == content[: 2 * PAGE]
    first.close()


def test_what_others_made_of_the_file_is_an_error_not_a_mixture(client, folder: Path):
    path = folder / "file"
    path.write_bytes(words(64 * PAGE))
    with client.open(path, "r") as mapping, mapping.snapshot() as snapshot:
        assert snapshot[:8] == words(8)
        path.write_bytes(words(64 * PAGE, 5))
        with pytest.raises(vm.StoreError):
            snapshot[60 * PAGE : 60 * PAGE + 8]


def test_writing_goes_on_where_a_snapshot_has_lost_a_page(client, folder: Path):
    path = folder / "file"
    path.write_bytes(words(64 * PAGE))
    with client.open(path, "r+") as mapping:
        first = mapping.snapshot()
        second = mapping.snapshot()
        assert second[:8] == words(8)
        with path.open("r+b") as file:
            file.write(b"others")
        mapping[60 * PAGE] = 1
        second.close()
        with pytest.raises(vm.StoreError):
            first[60 * PAGE]
        first.close()


def test_local_windows_and_writers_of_other_clients(shared_kernel, connect, folder: Path):
    path = folder / "file"
    path.write_bytes(words(4 * PAGE))
    one, other = connect(shared_kernel), connect(shared_kernel)
    a, b = one.open(path, "r+"), other.open(path, "r+")
    local = a.local()
    a[:8] = b[PAGE : PAGE + 8] = local[2 * PAGE : 2 * PAGE + 8] = b"dirtied "
    before = bytes(a)
    snapshot = b.snapshot()
    a[:8] = b"a writes"
    b[PAGE : PAGE + 8] = b"b writes"
    local[2 * PAGE : 2 * PAGE + 8] = b"c writes"
    assert bytes(snapshot) == before


def test_without_swap_space_a_snapshot_is_reserved(kernels, connect):
    client = connect(kernels(20 * PAGE, swap=False))
    mine = client.anonymous(8 * PAGE)
    mine[:] = words(8 * PAGE)
    with mine.snapshot() as snapshot:
        with pytest.raises(vm.OutOfFrames):
            mine.snapshot()
        mine[:] = bytes(8 * PAGE)
        assert bytes(snapshot) == words(8 * PAGE)
    until(lambda: client.stat()["frames"]["promised_anonymous"] == 8, "the promise is taken back")


def test_a_thousand_cycles_are_bounded(kernels, connect):
    kernel = kernels(256 * PAGE)
    client = connect(kernel)
    mine = client.anonymous(_PAGES * PAGE, overcommit=True)
    content = bytearray(_PAGES * PAGE)
    kept: list[tuple[vm.Mapping, bytes]] = []

    def resident() -> int:
        status = Path(f"/proc/{kernel.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) >> 10

    def settled() -> bool:
        return len(client.stat()["files"]) <= 1 + len(kept)

    descriptors = memory = 0
    for turn in range(1000):
        kept.append((mine.snapshot(), bytes(content)))
        at = turn % _PAGES * PAGE
        mine[at : at + 8] = content[at : at + 8] = struct.pack("Q", turn)
        if turn % 7 == 3:  # the origin goes, and the snapshot goes on in its place
            mine.close()
            mine, was = kept.pop()
            content = bytearray(was)
        while len(kept) > turn % 3:
            snapshot, was = kept.pop(turn % len(kept))
            assert bytes(snapshot) == was
            snapshot.close()
        if turn % 100 == 99:
            until(settled, "what was closed has gone")
            if turn == 199:
                descriptors, memory = len(descriptors_of(kernel.pid)), resident()
    assert bytes(mine) == content
    for snapshot, _ in kept:
        snapshot.close()
    kept.clear()
    until(settled, "only the origin is left")
    assert len(descriptors_of(kernel.pid)) <= descriptors + 8
    assert resident() <= memory + 16
    assert client.stat()["frames"]["file"] <= _PAGES
    assert frame_bytes(kernel.pid) <= _PAGES * PAGE
    mine.close()
    until(lambda: client.stat()["frames"]["file"] == 0, "all frames are free")


@pytest.mark.parametrize("budget", [64 << 20, 48 * PAGE])
@pytest.mark.parametrize("kind", ["file", "anonymous", "overcommitted"])
def test_each_snapshot_is_one_moment_of_all_writers(kernels, connect, folder: Path, kind, budget):
    """Writers go over the pages in order, with the number of their round: in a snapshot later pages are never ahead."""
    kernel = kernels(budget)
    pages, writers = 8, 3
    size = pages * writers * PAGE
    path = folder / "file"
    path.write_bytes(bytes(size))
    client = connect(kernel)

    def opened(of: vm.Client) -> vm.Mapping:
        return of.open(path, "r+")

    mine = opened(client) if kind == "file" else client.anonymous(size, overcommit=kind == "overcommitted")
    others = [opened(connect(kernel)) if kind == "file" else mine for _ in range(writers)]
    ending = threading.Event()
    failures: list[BaseException] = []

    def write(who: int) -> None:
        try:
            turn = 0
            while not ending.is_set():
                turn += 1
                for page in range(pages):
                    at = (who * pages + page) * PAGE
                    others[who][at : at + 8] = struct.pack("Q", turn)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(who,)) for who in range(writers)]
    for thread in threads:
        thread.start()
    kept: list[tuple[vm.Mapping, bytes]] = []
    try:
        for turn in range(20):
            snapshot = mine.snapshot()
            seen = bytes(snapshot)
            kept.append((snapshot, seen))
            for who in range(writers):
                rounds = [struct.unpack_from("Q", seen, (who * pages + page) * PAGE)[0] for page in range(pages)]
                assert all(a >= b for a, b in itertools.pairwise(rounds)), rounds
                assert rounds[0] - rounds[-1] <= 1, rounds
            for snapshot, was in kept:
                assert bytes(snapshot) == was
            if turn % 2:
                kept.pop(turn % len(kept))[0].close()
    finally:
        ending.set()
        for thread in threads:
            thread.join()
    assert not failures
    for snapshot, was in kept:
        assert bytes(snapshot) == was


def test_children_that_end_in_any_way_damage_nothing(shared_kernel, script, folder: Path):
    path = folder / "file"
    path.write_bytes(words(8 * PAGE))
    code = """
        client = vm.connect(sys.argv[1])
        mapping, memory = client.open(sys.argv[2], "r+"), client.anonymous(8 * 4096)
        memory[0] = 1
        snapshots = [mapping.snapshot(), memory.snapshot()]
        wanted = [open(sys.argv[2], "rb").read(), bytes([1]) + bytes(8 * 4096 - 1)]
        mapping[4096] = memory[4096] = 77
        views = [memoryview(m) for m in (mapping, memory, *snapshots)]
        for way in range(4):
            for view in views:
                if (child := os.fork()) == 0:
                    if way == 0:
                        view[5 * 4096]  # which ends in a signal
                    elif way == 1:
                        os.execv("/bin/true", ["true"])
                    elif way == 2:
                        os.kill(os.getpid(), signal.SIGKILL)
                    sys.exit(0)
                mapping[2 * 4096 + way] = memory[2 * 4096 + way] = way
                os.waitpid(child, 0)
        say([bytes(snapshot) for snapshot in snapshots] == wanted)
        say(memory[:2], mapping[4096], memory[5 * 4096], mapping[2 * 4096 + 3])
        """
    parent = script(code, shared_kernel.socket, path, options=("-W", "ignore::DeprecationWarning"))
    assert parent.line() == "True"
    assert parent.line() == r"b'\x01\x00' 77 0 3"
    parent.good()


class Snapshots(RuleBasedStateMachine):
    """An origin and up to four snapshots, of each other, against byte arrays."""

    made: Kernels
    kernel: vm.KernelProcess

    def __init__(self) -> None:
        super().__init__()
        self.client = vm.connect(self.kernel.socket)
        self.kept: list[tuple[vm.Mapping, bytearray]] = []
        self.path = Path(self.kernel.socket).with_name("origin")

    @initialize(anonymous=st.booleans(), tail=st.integers(0, PAGE - 1))
    def begin(self, anonymous: bool, tail: int) -> None:
        size = _PAGES * PAGE - tail
        content = words(size, 7)
        if anonymous:
            mapping = self.client.anonymous(size, overcommit=True)
            mapping[: size // 2] = content[: size // 2]
            content = content[: size // 2] + bytes(size - size // 2)
        else:
            self.path.unlink(missing_ok=True)
            self.path.write_bytes(content)
            mapping = self.client.open(self.path, "r+")
        self.kept.append((mapping, bytearray(content)))

    @rule(data=st.data())
    def snapshot(self, data: st.DataObject) -> None:
        if 0 < len(self.kept) < 5:
            of, content = data.draw(st.sampled_from(self.kept))
            self.kept.append((of.snapshot(), bytearray(content)))

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), fill=st.binary(min_size=1, max_size=40), times=st.sampled_from([1, 100, 900]))
    def write(self, data: st.DataObject, fill: bytes, times: int) -> None:
        mapping, content = data.draw(st.sampled_from(self.kept))
        at = data.draw(st.integers(0, len(content) - 1))
        written = (fill * times)[: len(content) - at]
        mapping[at : at + len(written)] = content[at : at + len(written)] = written

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        mapping, content = data.draw(st.sampled_from(self.kept))
        assert bytes(mapping) == content

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.kept.pop(data.draw(st.integers(0, len(self.kept) - 1)))[0].close()

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def shrink(self, data: st.DataObject) -> None:
        mapping, content = data.draw(st.sampled_from(self.kept))
        size = data.draw(st.integers(max(1, len(content) - 3 * PAGE), len(content)))
        mapping.resize(size)
        del content[size:]

    @precondition(lambda self: self.kept and self.kept[0][0].mode == "r+")
    @rule(by=st.integers(1, 3 * PAGE))
    def grow(self, by: int) -> None:
        mapping, content = self.kept[0]
        mapping.resize(len(content) + by)
        content += bytes(by)

    @rule()
    def flush(self) -> None:
        for mapping, _ in self.kept:
            mapping.flush()
            mapping.advise("dontneed")

    @rule()
    def push_out(self) -> None:
        with self.client.anonymous(10 * PAGE, overcommit=True) as other:
            other[:] = bytes(10 * PAGE)

    @invariant()
    def frames_are_within_the_budget(self) -> None:
        frames = self.client.stat()["frames"]
        assert frames["file"] + frames["reserved"] + frames["overcommitted"] <= frames["budget"]

    def teardown(self) -> None:
        for mapping, content in self.kept:
            assert bytes(mapping) == content
        self.client.close()


@pytest.mark.parametrize("budget", [3 * PAGE, 12 * PAGE])
def test_model(kernels, budget):
    machine = type("Machine", (Snapshots,), {"kernel": kernels(budget)})
    machine.TestCase.settings = settings(
        max_examples=25,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    machine.TestCase("runTest").debug()


def test_counts_name_a_snapshot(client, folder: Path):
    path = folder / "file"
    path.write_bytes(words(PAGE))
    with client.open(path) as mapping, mapping.snapshot() as snapshot:
        assert snapshot.name == f"a snapshot of {path}"
        assert snapshot[:8] == words(8)
        assert file_counts(client, Path(f"a snapshot of {path}"))["filled"] == 1
    assert os.path.getsize(path) == PAGE
