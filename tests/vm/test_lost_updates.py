"""No update is lost: processes and threads that write one file while its pages go out and come in all the time.

Every page of the file has a slot of 8 bytes for each writer, which that writer alone counts up, and one that all of
them write: so that writers meet on pages, and in words. At the end plain file I/O must find the last value in each.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
import threading
from pathlib import Path

import pytest
from vm_support import PAGE, Script, running

import k42
from k42.vm.kernel import Kernel

PAGES = 64
WRITERS = 4  # two threads in each of two processes
OPERATIONS = int(os.environ.get("K42_TORTURE_OPERATIONS", "40"))
"""Operations of each writer at each budget; more by this variable."""
FCMS = ["shared", "replicated", "partitioned"]


def place(page: int) -> int:
    """Where a page lies: in one of four spans of 2 MiB, which are parts of a partitioned page table."""
    return (page % 4 * 512 + page // 4) * PAGE


SIZE = place(PAGES - 1) + PAGE

CUT = place(2) + 16
"""Where the file ends for moments, in one test: what lies behind may become zeros, and never what it was before."""

# One round for each line of input: socket, path, number of operations, where the file may be cut, seed. The first
# thread of a process goes through pointers, where nothing is cut, and the other by copies. Says what each wrote last:
# in its own slots, and in the common ones.
WRITER = """
    import json, random, struct, traceback
    PAGE, PAGES, WRITERS = 4096, 64, 4
    number = int(sys.argv[1])
    def place(page):
        return (page % 4 * 512 + page // 4) * PAGE
    def give_up(args):
        traceback.print_exception(args.exc_value)
        os._exit(1)
    threading.excepthook = give_up
    def work(writer, words, mapping, operations, cut, chosen, result):
        own, common = [0] * PAGES, {}
        newest = [[0] * WRITERS for _ in range(PAGES)]  # of the values seen in each common slot, by writer
        def load(at):
            return words[at // 8] if words else struct.unpack("Q", mapping[at : at + 8])[0]
        def store(at, value):
            if words:
                words[at // 8] = value
            else:
                mapping[at : at + 8] = struct.pack("Q", value)
        for turn in range(1, operations + 1):
            page = chosen.randrange(PAGES)
            at = place(page) + writer * 8
            if chosen.random() < 0.7 or place(page) + PAGE > cut:
                try:
                    found = load(at)
                    good = found == own[page] or (found == 0 and at >= cut)
                    assert good, f"slot {writer} of page {page}: {found}, not {own[page]}"
                    own[page] = found
                    store(at, found + 1)
                    own[page] = found + 1
                except vm.StoreError as error:
                    assert at >= cut, error
                continue
            at = place(page) + PAGE - 8
            found = load(at)
            who, value = found >> 32, found & 0xffffffff
            # As each location of memory: what one writer wrote is never seen to go back.
            assert value >= newest[page][who], f"page {page}: {value} of {who}, after {newest[page][who]}"
            newest[page][who] = value
            common[page] = newest[page][writer] = turn
            store(at, writer << 32 | turn)
            if chosen.random() < 0.03:
                mapping.flush(place(page), PAGE)
        result[writer] = [own, common]
    for line in sys.stdin:
        signal.alarm(60)
        socket, path, operations, cut, seed = line.split()
        cut = int(cut)
        with vm.connect(socket) as client, client.open(path, "r+") as mapping:
            say("ready")
            sys.stdin.readline()
            result = {}
            with memoryview(mapping) as view, view.cast("Q") as words:
                threads = [
                    threading.Thread(target=work, args=(
                        writer, None if writer % 2 or cut < len(mapping) else words, mapping, int(operations), cut,
                        random.Random(f"{seed} {writer}"), result))
                    for writer in (2 * number, 2 * number + 1)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        say(json.dumps(result))
    """


def evict(kernel: Kernel, chosen: random.Random) -> None:
    """Takes pages of any cache, or writes dirty ones back."""
    for fcm in kernel._fcms():
        with contextlib.suppress(k42.Destroyed):
            fcm.give_back(chosen.randrange(1, 9)) if chosen.random() < 0.8 else fcm.write_back(8)
    assert kernel._global_pm.check()


def torture(
    kernel: Kernel, clients: list[Script], path: Path, seed: str, cut: int = SIZE, beside: Script | None = None
) -> list[str]:
    """One round: all writers at once, `beside` them another client, and evictions; what they say they wrote."""
    for client in clients:
        client.tell(f"{kernel._path} {path} {OPERATIONS} {cut} {seed}")
    for client in clients:
        assert client.line() == "ready"
    ended = threading.Event()
    failures: list[BaseException] = []

    def act() -> None:
        chosen = random.Random(f"{seed} evict")
        try:
            while not ended.is_set():
                evict(kernel, chosen)
                ended.wait(0.001)
        except BaseException as error:
            failures.append(error)

    actor = threading.Thread(target=act)
    actor.start()
    try:
        for client in (*clients, *([beside] if beside else ())):
            client.tell()
        results = [client.line() for client in clients]
    finally:
        ended.set()
        actor.join()
    assert not failures, failures
    assert kernel._global_pm.check()
    return results


def check_file(path: Path, results: list[str], seed: str, cut: int = SIZE) -> None:
    stored = path.read_bytes()
    last: dict[int, set[int]] = {page: set() for page in range(PAGES)}
    writers = {int(writer): written for result in results for writer, written in json.loads(result).items()}
    assert sorted(writers) == list(range(WRITERS))
    for writer, (own, common) in writers.items():
        for page, count in enumerate(own):
            at = place(page) + writer * 8
            [found] = struct.unpack_from("Q", stored, at)
            assert found == count or (found == 0 and at >= cut), f"lost: slot {writer} of page {page} ({seed})"
        for page, value in common.items():
            last[int(page)].add(writer << 32 | value)
    assert b"mine own" not in stored  # it is of snapshots
    for page, candidates in last.items():
        # Who wrote last wrote its own last value.
        [found] = struct.unpack_from("Q", stored, place(page) + PAGE - 8)
        assert found in (candidates or {0}), f"lost: the common slot of page {page} ({seed})"


@pytest.fixture
def writers(script) -> list[Script]:
    return [script(WRITER, number) for number in range(WRITERS // 2)]


@pytest.fixture
def path(folder) -> Path:
    return folder / "file"


def empty(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, SIZE)


@pytest.mark.parametrize("fcm", FCMS)
def test_no_update_is_lost_at_any_budget(fcm, folder, path, writers):
    seed = random.randrange(1 << 32)
    for budget in range(1, PAGES // 2 + 1):
        empty(path)
        with running(folder / "kernel.sock", budget, f"default,fcm={fcm}") as kernel:
            results = torture(kernel, writers, path, f"{seed}/{budget}")
            check_file(path, results, f"{seed}/{budget}")


# Takes snapshots until it is told to end. Each stays as it is, and of two the later has no slot with less.
COPIER = """
    import struct
    def place(page):
        return (page % 4 * 512 + page // 4) * 4096
    def slots(mapping):
        return [struct.unpack("4Q", mapping[place(page) : place(page) + 32]) for page in range(64)]
    ending = threading.Event()
    client = vm.connect(sys.argv[1])
    mapping = client.open(sys.argv[2], "r+")
    say("ready")
    sys.stdin.readline()
    threading.Thread(target=lambda: (sys.stdin.readline(), ending.set())).start()
    older = mapping.snapshot()
    seen = slots(older)
    taken = 1
    while not ending.is_set() or taken == 1:
        newer = mapping.snapshot()
        now = slots(newer)
        taken += 1
        assert slots(older) == seen, "a snapshot has changed"
        assert all(a <= b for was, has in zip(seen, now) for a, b in zip(was, has)), "a snapshot is older than another"
        newer[32:40] = b"mine own"  # nobody else sees that
        older.close()
        older, seen = newer, now
    older.close()
    mapping.close()
    say("ended")
    """


@pytest.mark.parametrize("fcm", FCMS)
def test_no_update_is_lost_while_snapshots_are_taken(fcm, folder, path, writers, script):
    seed = random.randrange(1 << 32)
    for budget in (2, 7, 24):
        empty(path)
        with running(folder / "kernel.sock", budget, f"default,fcm={fcm}") as kernel:
            copier = script(COPIER, kernel._path, path)
            assert copier.line() == "ready"
            results = torture(kernel, writers, path, f"{seed}/{budget}", beside=copier)
            copier.tell()
            assert copier.good() == "ended\n"
            check_file(path, results, f"{seed}/{budget}")


# Cuts the file and makes it longer again until it is told to end.
CUTTER = """
    ending = threading.Event()
    client = vm.connect(sys.argv[1])
    mapping = client.open(sys.argv[2], "r+")
    size = len(mapping)
    say("ready")
    sys.stdin.readline()
    threading.Thread(target=lambda: (sys.stdin.readline(), ending.set())).start()
    cuts = 0
    while not ending.is_set() or not cuts:
        mapping.resize(int(sys.argv[3]))
        mapping.resize(size)
        cuts += 1
    mapping.close()
    say("ended")
    """


@pytest.mark.parametrize("fcm", FCMS)
def test_no_update_is_lost_and_none_comes_back_while_the_file_is_cut(fcm, folder, path, writers, script):
    seed = random.randrange(1 << 32)
    for budget in (1, 2, 4, 11, 32):
        empty(path)
        with running(folder / "kernel.sock", budget, f"default,fcm={fcm}") as kernel:
            cutter = script(CUTTER, kernel._path, path, CUT)
            assert cutter.line() == "ready"
            results = torture(kernel, writers, path, f"{seed}/{budget}", CUT, cutter)
            cutter.tell()
            assert cutter.good() == "ended\n"
            check_file(path, results, f"{seed}/{budget}", CUT)
