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
from collections.abc import Callable
from pathlib import Path

import pytest
from vm_support import PAGE, Script, running

import k42
from k42.vm.kernel import Kernel

PAGES = 64
WRITERS = 4  # two threads in each of two processes
OPERATIONS = int(os.environ.get("K42_TORTURE_OPERATIONS", "60"))
"""Operations of each writer at each budget; more by this variable."""
FCMS = ["shared", "replicated", "partitioned"]


def place(page: int) -> int:
    """Where a page lies: in one of four spans of 2 MiB, which are parts of a partitioned page table."""
    return (page % 4 * 512 + page // 4) * PAGE


SIZE = place(PAGES - 1) + PAGE

# One round for each line of input: socket, path, number of operations, seed. The first thread of a process goes through
# pointers, the other by copies. Says what each wrote last: in its own slots, and in the common ones.
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
    def work(writer, words, mapping, operations, chosen, result):
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
            if chosen.random() < 0.7:
                found = load(at)
                assert found == own[page], f"slot {writer} of page {page}: {found}, not {own[page]}"
                own[page] += 1
                store(at, own[page])
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
        socket, path, operations, seed = line.split()
        with vm.connect(socket) as client, client.open(path, "r+") as mapping:
            say("ready")
            sys.stdin.readline()
            result = {}
            with memoryview(mapping) as view, view.cast("Q") as words:
                threads = [
                    threading.Thread(target=work, args=(
                        writer, None if writer % 2 else words, mapping, int(operations),
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
    kernel: Kernel, clients: list[Script], path: Path, seed: str, meanwhile: Callable[[Kernel, random.Random], None]
) -> None:
    """One round: all writers at once, and `meanwhile` again and again; then compares the file."""
    path.write_bytes(b"")
    os.truncate(path, SIZE)
    for client in clients:
        client.tell(f"{kernel._path} {path} {OPERATIONS} {seed}")
    for client in clients:
        assert client.line() == "ready"
    ended = threading.Event()
    failures: list[BaseException] = []

    def act() -> None:
        chosen = random.Random(f"{seed} meanwhile")
        try:
            while not ended.is_set():
                meanwhile(kernel, chosen)
                ended.wait(0.001)
        except BaseException as error:
            failures.append(error)

    actor = threading.Thread(target=act)
    actor.start()
    try:
        for client in clients:
            client.tell()
        results = [client.line() for client in clients]
    finally:
        ended.set()
        actor.join()
    assert not failures, failures
    assert kernel._global_pm.check()
    check_file(path, results, seed)


def check_file(path: Path, results: list[str], seed: str) -> None:
    stored = path.read_bytes()
    last: dict[int, set[int]] = {page: set() for page in range(PAGES)}
    writers = {int(writer): written for result in results for writer, written in json.loads(result).items()}
    assert sorted(writers) == list(range(WRITERS))
    for writer, (own, common) in writers.items():
        for page, count in enumerate(own):
            [found] = struct.unpack_from("Q", stored, place(page) + writer * 8)
            assert found == count, f"lost: slot {writer} of page {page} ({seed})"
        for page, value in common.items():
            last[int(page)].add(writer << 32 | value)
    for page, candidates in last.items():
        # Who wrote last wrote its own last value.
        [found] = struct.unpack_from("Q", stored, place(page) + PAGE - 8)
        assert found in (candidates or {0}), f"lost: the common slot of page {page} ({seed})"


@pytest.fixture
def writers(script) -> list[Script]:
    return [script(WRITER, number) for number in range(WRITERS // 2)]


@pytest.mark.parametrize("fcm", FCMS)
def test_no_update_is_lost_at_any_budget(fcm, folder, writers):
    seed = random.randrange(1 << 32)
    for budget in range(1, PAGES // 2 + 1):
        with running(folder / "kernel.sock", budget, f"default,fcm={fcm}") as kernel:
            torture(kernel, writers, folder / "file", f"{seed}/{budget}", evict)
