"""Many clients and one kernel: who has which frames, who has to give some back, and that they all add up."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from vm_support import PAGE, file_counts, until, words

from k42 import destroy, vm
from k42.vm.fcm import SharedFCM
from k42.vm.fr import FileFR
from k42.vm.pins import Pins
from k42.vm.pm import Backing, ProcessPM, SharedGlobalPM

GREEDY = """
    socket, path, limit = sys.argv[1:]
    with vm.connect(socket, limit=int(limit) or None) as client, client.open(path) as mapping:
        say("ready")
        sys.stdin.readline()
        for turn in range(3):
            for at in range(0, len(mapping), 4096):
                mapping[at]
            say("turn", turn)
        sys.stdin.readline()
    """


def file_of(folder: Path, pages: int, name: str, seed: int = 0) -> Path:
    path = folder / name
    path.write_bytes(words(pages * PAGE, seed))
    return path


def of_client(client: vm.Client, pid: int) -> dict[str, int]:
    """What the kernel counts of one client process."""
    [counts] = [counts for counts in client.stat()["clients"] if counts["pid"] == pid]
    return counts


def holds(client: vm.Client) -> None:
    good, bad = client.check()
    assert not bad
    assert len(good) >= 6


def adds_up(client: vm.Client) -> None:
    """At rest every resident page is charged to somebody, or its client has gone."""
    holds(client)
    stat = client.stat()
    frames = stat["frames"]
    in_use = frames["file"] + frames["reserved"] + frames["overcommitted"]
    assert sum(counts["used"] for counts in stat["clients"]) <= in_use
    assert in_use == sum(file["resident"] for file in stat["files"])


@pytest.mark.parametrize("objects", ["default", "shared", "default,fcm=partitioned"])
@pytest.mark.parametrize("policy", ["fifo", "clock", "s3fifo"])
def test_a_greedy_client_does_not_push_a_modest_one_below_its_share(kernels, connect, script, folder, objects, policy):
    kernel = kernels(512 * PAGE, objects=objects, policy=policy)
    modest = connect(kernel)
    mine = modest.open(file_of(folder, 150, "mine"))  # the share of each of two is 236
    large = file_of(folder, 2048, "large", 1)
    greedy = script(GREEDY, kernel.socket, large, 0)
    assert greedy.line() == "ready"
    assert bytes(mine) == words(150 * PAGE)
    filled = file_counts(modest, folder / "mine")["filled"]
    greedy.tell()
    for turn in range(3):
        assert greedy.line() == f"turn {turn}"
        assert bytes(mine) == words(150 * PAGE)
    assert file_counts(modest, folder / "mine")["filled"] == filled  # none came from the store again
    assert file_counts(modest, large)["evicted"] > 3 * 1500
    mine_now = of_client(modest, os.getpid())
    assert mine_now["used"] == 150
    assert mine_now["share"] == of_client(modest, greedy.pid)["share"] == (512 - 40) // 2
    adds_up(modest)
    greedy.tell()
    greedy.good()


@pytest.mark.parametrize("limit", [1, 7, 100])
def test_a_limit_is_a_limit(kernels, connect, folder, limit):
    kernel = kernels(512 * PAGE, client_limit=limit * PAGE)
    path = file_of(folder, 400, "file")
    watcher, client = connect(kernel), connect(kernel, limit=1 << 40)  # more than the kernel's is not to be had
    most = 0
    ending = threading.Event()

    def watch() -> None:
        nonlocal most
        while not ending.is_set():
            most = max(most, *(counts["used"] for counts in watcher.stat()["clients"]))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        with client.open(path) as mapping:
            content = words(400 * PAGE)
            for at in [*range(0, len(content), PAGE), *range(len(content) - 1, 0, -PAGE)]:
                assert mapping[at] == content[at]
            assert file_counts(client, path)["resident"] <= limit
            stats = mapping.stats()["client"]
            assert stats["limit"] == limit
            assert limit // 2 <= stats["used"] <= limit
            if limit >= 7:
                mapping.prefetch()
                assert file_counts(client, path)["resident"] <= limit
    finally:
        ending.set()
        thread.join()
    assert most <= limit
    holds(client)


def test_a_client_limits_itself(kernels, connect, folder):
    kernel = kernels(512 * PAGE, client_limit=300 * PAGE)
    one, other = connect(kernel, limit=20 * PAGE), connect(kernel)
    path = file_of(folder, 200, "file")
    with one.open(path) as mapping:
        assert bytes(mapping) == words(200 * PAGE)
        assert file_counts(one, path)["resident"] <= 20
        with other.open(path) as mapping:
            assert bytes(mapping) == words(200 * PAGE)
        assert file_counts(one, path)["resident"] > 150
        assert sorted(c["limit"] for c in one.stat()["clients"]) == [20, 300]
        with pytest.raises(vm.OutOfFrames, match="limit of 81920 bytes"):
            one.anonymous(21 * PAGE)
        with one.anonymous(15 * PAGE), pytest.raises(vm.OutOfFrames, match="61440 are promised already"):
            one.anonymous(6 * PAGE)
        with one.anonymous(18 * PAGE) as memory:
            del memory
        with pytest.raises(vm.OutOfFrames, match="this client's limit"):
            one.open(path, page_size=16 * PAGE)
    with pytest.raises(ValueError, match="at least one page"):
        vm.connect(kernel.socket, limit=PAGE - 1)
    adds_up(one)


def test_pages_of_a_client_that_has_gone_go_to_who_uses_them(kernels, connect, folder):
    kernel = kernels(512 * PAGE)
    path = file_of(folder, 100, "file")
    watcher = connect(kernel)
    kept = watcher.open(path)  # so that the pages stay
    with vm.connect(kernel.socket) as first, first.open(path) as mapping:
        assert bytes(mapping) == words(100 * PAGE)
        assert sorted(c["used"] for c in watcher.stat()["clients"]) == [0, 100]
    until(lambda: len(watcher.stat()["clients"]) == 1, "the other has gone")
    assert watcher.stat()["clients"][0]["used"] == 0
    adds_up(watcher)
    assert bytes(kept) == words(100 * PAGE)
    assert watcher.stat()["clients"][0]["used"] == 100
    assert file_counts(watcher, path)["filled"] == 100
    adds_up(watcher)


LIFE = """
    import contextlib, random
    socket, path, seed = sys.argv[1:]
    random = random.Random(int(seed))
    while True:
        with vm.connect(socket) as client, contextlib.suppress(vm.OutOfFrames):
            maps = [client.open(path, "r+")]
            if random.random() < 0.5:
                maps.append(client.anonymous(20 * 4096, overcommit=True))
            for _ in range(random.randrange(300)):
                m = random.choice(maps)
                at = random.randrange(0, len(m), 4096)
                match random.randrange(8):
                    case 0: m[at] = m[at]
                    case 1: m.prefetch(at, 4096)
                    case 2: m.advise("dontneed")
                    case 3 if random.random() < 0.1 and len(maps) < 5: maps.append(m.snapshot())
                    case 4 if random.random() < 0.1: m.pin(at, 4096)
                    case _: m[at]
        say("alive")
    """


@pytest.mark.parametrize("objects", ["default", "shared", "default,fcm=partitioned"])
@pytest.mark.parametrize("frames", [31, 300])
def test_accounts_add_up_whatever_clients_do(kernels, connect, script, folder, objects, frames):
    """Clients open, fault, evict, snapshot and are killed, and the invariants hold whenever one looks."""
    kernel = kernels(frames * PAGE, objects=objects)
    client = connect(kernel)
    path = file_of(folder, 200, "file")
    chance = random.Random(frames)
    lives = [script(LIFE, kernel.socket, path, seed) for seed in range(2)]
    for life in lives:
        life.line()
    for turn in range(4):
        for _ in range(4):
            holds(client)
            time.sleep(0.02)
        killed = lives.pop(chance.randrange(2))
        os.kill(killed.pid, signal.SIGKILL)
        killed.finish()
        lives.append(script(LIFE, kernel.socket, path, 10 + turn))
        lives[-1].line()
    for life in lives:
        os.kill(life.pid, signal.SIGKILL)
        life.finish()
    until(lambda: len(client.stat()["clients"]) == 1, "the kernel sees that they have gone")
    until(lambda: all(file["dirty"] == 0 for file in client.stat()["files"]), "what they wrote is in the file")
    adds_up(client)
    with client.open(path) as mapping:
        assert bytes(mapping) == words(200 * PAGE)
        adds_up(client)


def test_after_a_take_over_accounts_start_from_what_is_resident(kernels, connect, folder):
    kernel = kernels(512 * PAGE, supervise=True, client_limit=200 * PAGE)
    client = connect(kernel)
    path = file_of(folder, 100, "file")
    mapping = client.open(path)
    assert bytes(mapping) == words(100 * PAGE)
    mapping.pin(0, 10 * PAGE)
    assert of_client(client, os.getpid())["used"] == 100
    os.kill(client.kernel_pid, signal.SIGKILL)
    assert of_client(client, os.getpid()) | {"used": 0} == of_client(client, os.getpid())
    assert of_client(client, os.getpid())["limit"] == 200
    adds_up(client)
    assert bytes(client.open(path)) == words(100 * PAGE)
    assert of_client(client, os.getpid())["used"] == 100
    adds_up(client)
    mapping.unpin(0, 10 * PAGE)
    mapping.unpin(0, 10 * PAGE)  # of what it has not
    adds_up(client)


PINNER = """
    socket, path = sys.argv[1:]
    client = vm.connect(socket)
    mapping = client.open(path)
    mapping.pin(0, 40 * 4096)
    mapping.pin(20 * 4096, 10 * 4096)
    say("pinned")
    sys.stdin.readline()
    """


@pytest.mark.parametrize("supervise", [False, True])
def test_pins_of_a_killed_client_end(kernels, connect, script, folder, supervise):
    kernel = kernels(64 * PAGE, supervise=supervise)
    client = connect(kernel)
    path, other = file_of(folder, 40, "file"), file_of(folder, 300, "other", 1)
    mine = client.open(path)  # keeps the file in the cache
    mine.pin(0, PAGE)
    pinner = script(PINNER, kernel.socket, path)
    assert pinner.line() == "pinned"
    if supervise:
        os.kill(client.kernel_pid, signal.SIGKILL)
    with client.open(other) as mapping:
        assert bytes(mapping) == words(300 * PAGE, 1)
        assert file_counts(client, path)["resident"] == 40
        mine.unpin(0, 40 * PAGE)  # ends its own alone
        assert bytes(mapping) == words(300 * PAGE, 1)
        assert file_counts(client, path)["resident"] == 40
        os.kill(pinner.pid, signal.SIGKILL)
        until(lambda: len(client.stat()["clients"]) == 1, "the kernel sees that it has gone")
        assert bytes(mapping) == words(300 * PAGE, 1)
        assert bytes(mapping) == words(300 * PAGE, 1)
        assert file_counts(client, path)["resident"] < 40
    adds_up(client)


def test_kernels_that_die_while_pages_are_pinned(kernels, connect, folder):
    # Wherever the kernel was: each pin that was answered holds, each that ended holds nothing.
    kernel = kernels(64 * PAGE, supervise=True)
    client, watcher = connect(kernel), connect(kernel)
    path, other = file_of(folder, 40, "file"), file_of(folder, 300, "other", 1)
    mapping = client.open(path)
    chance = random.Random(4)
    for _ in range(8):
        done = threading.Event()

        def kill(after: float = chance.uniform(0, 0.05), pid: int = client.kernel_pid, done=done) -> None:
            done.wait(after)
            os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        while killer.is_alive():
            mapping.pin(0, 30 * PAGE)
            mapping.unpin(PAGE, 20 * PAGE)
            mapping.unpin(0, 30 * PAGE)
        killer.join()
        mapping.pin(5 * PAGE, 20 * PAGE)
        with watcher.open(other) as scanned:
            assert bytes(scanned) == words(300 * PAGE, 1)
            assert file_counts(client, path)["resident"] >= 20
            mapping.unpin()
            assert bytes(scanned) == words(300 * PAGE, 1)
            assert bytes(scanned) == words(300 * PAGE, 1)
            assert file_counts(client, path)["resident"] < 20
        adds_up(client)
    assert bytes(mapping) == words(40 * PAGE)


def test_a_request_that_two_kernels_hear_pins_once(folder):
    path = file_of(folder, 12, "file")
    global_pm = SharedGlobalPM.create(40)
    global_pm.promise_file(global_pm.cluster())
    pm = ProcessPM.create(global_pm)
    fcm = SharedFCM.create(global_pm, FileFR.create(os.open(path, os.O_RDONLY), str(path)), Backing.FILE, 1)
    told: list[Any] = []
    pins = Pins(fcm, told.append)
    pins.pin(0, 10, pm, 1)
    pins.pin(5, 8, pm, 2)
    for request, first, end in ((3, 0, 2), (3, 0, 2), (2, 5, 8), (1, 0, 10)):
        pins = Pins(fcm, told.append)
        pins.restore(told[-1])
        assert pins.known() == Counter(dict(fcm.native().pinned()))
        if request == 3:
            pins.unpin(first, end, request)
        else:
            pins.pin(first, end, pm, request)
    assert fcm.native().pinned() == [(page, 2 if page in range(5, 8) else 1) for page in range(2, 10)]
    # What is pinned and belongs to nobody.
    fcm.pin(0, 3, pm)
    for page, _ in fcm.native().pinned():
        fcm.native().set_pins(page, 1 if page == 2 else 0)
    assert fcm.native().pinned() == [(2, 1)]
    pins.close()
    assert fcm.native().pinned() == []
    assert fcm.give_back(12) == 10
    fcm.close()
    destroy(fcm)


# A child says what it has found by its exit status alone.
MANY = """
    import ctypes, struct
    socket, path, shared, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    wanted = open(path, "rb").read()
    ready, go = os.pipe(), os.pipe()
    wrote, read = os.pipe(), os.pipe()

    def child(number):
        signal.alarm(110)
        client = vm.connect(socket)
        mapping, board = client.open(path), client.open(shared, "r+")
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        assert bytes(mapping) == wanted
        board[number * 64 : number * 64 + 4] = struct.pack("<I", number + 1)
        os.write(wrote[1], b"x")
        os.read(read[0], 1)
        for other in range(count):
            assert struct.unpack("<I", board[other * 64 : other * 64 + 4]) == (other + 1,)
        try:
            mapping[0] = 1
        except TypeError:
            pass
        else:
            raise AssertionError("a reader wrote")
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        if number % 4 == 0:  # by a pointer, past all that Python would refuse
            ctypes.memset(mapping.base, 1, 1)
            os._exit(3)

    def wait_for(pipe, count):
        while count:
            count -= len(os.read(pipe[0], count))

    signal.alarm(115)
    children = []
    for number in range(count):
        if (pid := os.fork()) == 0:
            try:
                child(number)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(pid)
    wait_for(ready, count)
    say("mapped")
    os.write(go[1], b"x" * count)
    wait_for(wrote, count)
    os.write(read[1], b"x" * count)
    wait_for(ready, count)
    say("read")
    sys.stdin.readline()
    os.write(go[1], b"x" * count)
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    say([ends[number] in (-signal.SIGSEGV, -signal.SIGBUS) if number % 4 == 0 else ends[number] == 0
         for number in range(count)].count(False), {end for end in ends})
    """


@pytest.mark.timeout(200)
def test_200_processes_map_one_file(kernels, connect, script, folder):
    kernel = kernels(2048 * PAGE)
    client = connect(kernel)
    path, shared = file_of(folder, 256, "file"), folder / "shared"
    shared.write_bytes(bytes(4 * PAGE))
    many = script(MANY, kernel.socket, path, shared, 200, options=("-W", "ignore"))
    assert many.line() == "mapped"
    assert many.line() == "read"
    assert len(client.stat()["clients"]) == 201
    for name, pages in ((path, 256), (shared, 4)):
        counts = file_counts(client, name)
        assert counts["resident"] == counts["filled"] == pages  # one frame a page, and it came once
        assert counts["evicted"] == 0
    adds_up(client)
    many.tell()
    wrong = many.line()
    assert wrong.startswith("0 "), wrong + many.stderr()
    until(lambda: len(client.stat()["clients"]) == 1, "all have gone")
    assert path.read_bytes() == words(256 * PAGE)
    adds_up(client)


def k42(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "k42", *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def test_k42_stat(kernels, connect, folder):
    kernel = kernels(512 * PAGE, client_limit=100 * PAGE)
    client = connect(kernel)
    path = file_of(folder, 30, "file")
    with client.open(path) as mapping:
        assert bytes(mapping) == words(30 * PAGE)
        shown = k42("stat", "--socket", kernel.socket)
        assert shown.returncode == 0
        for text in (str(os.getpid()), "120 KiB", "400 KiB", "2 MiB", "file"):
            assert text in shown.stdout
        checked = k42("stat", "--socket", kernel.socket, "--check")
        assert checked.returncode == 0
        assert checked.stdout.count("ok: ") == len(checked.stdout.splitlines()) >= 6
    nobody = k42("stat", "--socket", folder / "nobody.sock")
    assert nobody.returncode == 2
    assert "no kernel listens" in nobody.stderr


def test_a_violation_is_told(kernels, connect, folder, monkeypatch, capsys):
    import typer.testing

    from k42 import cli

    monkeypatch.setattr(vm.Client, "check", lambda _: (["one thing"], ["another"]))
    result = typer.testing.CliRunner().invoke(cli.app, ["stat", "--check", "--socket", str(kernels().socket)])
    assert result.exit_code == 1
    assert result.output == "ok: one thing\nVIOLATED: another\n"


def test_the_check_finds_what_is_wrong():
    from k42.vm.census import take_census
    from k42.vm.pm import Backing, DistributedGlobalPM, ProcessPM

    pm = DistributedGlobalPM.create(100)
    process = ProcessPM.create(pm)
    assert take_census(pm, [])[1] == []
    number = process.allocate(3, Backing.FILE)
    [lost] = take_census(pm, [])[1]  # frames without pages
    assert lost.startswith("3 frames are in use: 0 pages")
    process.account().uncharge(1)
    assert any(text.startswith("2 frames are charged to 2 accounts, 3 are in use") for text in take_census(pm, [])[1])
    with contextlib.suppress(ValueError):
        process.account().charge(1)
    pm.native().release(3, Backing.FILE, number)
    assert take_census(pm, [])[1] == []


def test_a_limit_has_room_for_pages_that_come_and_go(kernels, connect, folder):
    # Else a fault on one would hold up who waits for the same page, until it is known that no frame comes.
    kernel = kernels(512 * PAGE)
    path, content = file_of(folder, 64, "file"), words(64 * PAGE)
    one, other = connect(kernel, limit=64 * PAGE), connect(kernel, limit=64 * PAGE)
    with one.anonymous(64 * PAGE) as memory:
        memory[::PAGE] = b"x" * 64
        with pytest.raises(vm.OutOfFrames, match="pages that come and go"):
            one.open(path)
        with pytest.raises(vm.OutOfFrames, match="pages that come and go"):
            one.anonymous(PAGE, overcommit=True)
    with other.open(path, page_size=8 * PAGE) as mapping:
        with pytest.raises(vm.OutOfFrames, match="does not fit this client's limit"):
            other.anonymous(49 * PAGE)
        with other.anonymous(48 * PAGE) as memory:
            memory[::PAGE] = b"x" * 48
            assert bytes(mapping) == content
    assert one.check()[1] == []
