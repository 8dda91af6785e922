"""The virtual memory system in situations that any implementation must pass: faults that race all that can end them,
and the same end for every choice of objects.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from vm_support import PAGE, Script, frame_bytes, held, running, until, words

from k42.vm import caches
from k42.vm.fcm import FileCacheManager
from k42.vm.kernel import Kernel

# Evaluates what it is told, line by line; `vm`, `client` and all that was assigned before are there.
PUPPET = """
    names = {"vm": vm, "threading": threading, "client": vm.connect(sys.argv[1], **eval(sys.argv[2]))}
    for line in sys.stdin:
        try:
            say(repr(eval(line, names)))
        except Exception as error:
            say(type(error).__name__, error)
    """


@pytest.fixture
def puppet(script):
    """A client that does what it is told; see `ask`."""
    return lambda kernel, **options: script(PUPPET, kernel._path, options)


def ask(client: Script, expression: str) -> str:
    client.tell(expression)
    return client.line()


def have_open(path: Path, *clients: Script, mode: str = "r") -> None:
    """Has each map the file, as `mapping`."""
    for client in clients:
        assert "Mapping" in ask(client, f"(mapping := client.open({str(path)!r}, {mode!r}))")


def only_cache(kernel: Kernel) -> FileCacheManager:
    [fcm] = kernel._fcms()
    return fcm


def check_frames(kernel: Kernel) -> None:
    """Frames are conserved: what the pool counts, what the tables hold and what Linux made is one."""
    pm = kernel._global_pm
    assert pm.check()

    def same() -> bool:
        usage = pm.usage()
        used = usage["file"] + usage["reserved"] + usage["overcommitted"]
        resident = sum(len(fcm.native().resident()) for fcm in kernel._fcms())
        return used == resident == frame_bytes(os.getpid()) // PAGE

    until(same, "what is being closed has gone, and the counts are the same")


# 9, 10, 11: threads on one or many objects.

CHOICES = [
    f"region={region},fcm={fcm}"
    for region in ("shared", "distributed")
    for fcm in ("shared", "replicated", "partitioned")
]

TOUCH = """
    socket, pages, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    client = vm.connect(socket, homing=False, sticky=False)
    cpus = sorted(os.sched_getaffinity(0))[:2] * 2
    if kind == "private":
        made = [client.anonymous(pages * 4096) for _ in cpus]
    else:
        whole = client.anonymous(len(cpus) * pages * 4096) if kind == "shared" else client.open(kind)
    say("made")
    sys.stdin.readline()
    def touch(number):
        os.sched_setaffinity(0, {cpus[number]})
        first = 0 if kind != "shared" else number * pages
        mapping = made[number] if kind == "private" else whole.local()
        for page in range(first, first + pages):
            if kind in ("private", "shared"):
                mapping[page * 4096] = 1 + (number + page) % 251
            elif mapping[page * 4096 : (page + 1) * 4096] != wanted[page * 4096 : (page + 1) * 4096]:
                os._exit(1)
    if kind not in ("private", "shared"):
        wanted = open(kind, "rb").read()
    for _ in range(2):
        threads = [threading.Thread(target=touch, args=(number,)) for number in range(len(cpus))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(len(cpus) if kind in ("private", "shared") else 0):
        first = 0 if kind == "private" else number * pages
        mapping = made[number] if kind == "private" else whole
        found = mapping[first * 4096 : (first + pages) * 4096]
        assert found[::4096] == bytes(1 + (number + page) % 251 for page in range(first, first + pages))
        assert found.count(0) == pages * 4095
    say("right")
    sys.stdin.readline()
    """


def test_9_private_arrays_cost_a_fault_a_page(folder, script):
    """Each thread touches an array of its own: as many faults as pages, each served where it happened, none again."""
    with running(folder / "kernel.sock", 4096, "distributed") as kernel:
        client = script(TOUCH, kernel._path, 100, "private")
        assert client.line() == "made"
        client.tell()
        assert client.line() == "right"
        assert kernel._engine.counts()["faults"] == 4 * 100
        for fcm in kernel._fcms():
            assert fcm.native().counts()["zero_filled"] == len(fcm.native().resident()) == 100
        check_frames(kernel)
        client.tell()
        client.good()


@pytest.mark.parametrize("objects", CHOICES)
def test_10_one_shared_region_is_the_same_to_all_choices_of_objects(folder, script, objects):
    """Threads touch parts of one mapping, each through a window of its own: the same bytes, and a frame a page."""
    with running(folder / "kernel.sock", 4096, objects) as kernel:
        client = script(TOUCH, kernel._path, 100, "shared")
        assert client.line() == "made"
        client.tell()
        assert client.line() == "right"
        counts = only_cache(kernel).native().counts()
        assert counts["zero_filled"] == counts["resident"] == kernel._global_pm.usage()["reserved"] == 4 * 100
        check_frames(kernel)
        client.tell()
        client.good()


@pytest.mark.parametrize("objects", CHOICES)
def test_11_threads_that_scan_one_file_fill_each_page_once(folder, script, objects):
    """However many read it at the same time, each page is read once from the store."""
    path = folder / "file"
    path.write_bytes(words(600 * PAGE + 5))
    with running(folder / "kernel.sock", 4096, objects) as kernel:
        client = script(TOUCH, kernel._path, 600, path)
        assert client.line() == "made"
        client.tell()
        assert client.line() == "right"
        counts = only_cache(kernel).native().counts()
        assert counts["filled"] in (600, 601)  # the last was not asked for, and may have come along
        check_frames(kernel)
        client.tell()
        client.good()


# 12: faults that race what takes their page, their file or their process away.


def test_12_a_fill_under_way_brings_nothing_back_that_was_cut_off(folder, puppet, monkeypatch):
    """The file ends earlier in its last page, which was just read and comes in only now: what is cut off is zeros."""
    path = folder / "file"
    path.write_bytes(b"x" * 3 * PAGE)
    with running(folder / "kernel.sock", 64) as kernel, held(monkeypatch, "fill") as fill:
        reader, cutter = puppet(kernel), puppet(kernel)
        have_open(path, reader)
        have_open(path, cutter, mode="r+")
        reader.tell("mapping[2 * 4096]")
        fill.reached()
        cutter.tell("mapping.resize(2 * 4096 + 100)")
        until(lambda: path.stat().st_size == 2 * PAGE + 100, "the file is cut")
        fill.resume()
        assert cutter.line() == "None"
        assert reader.line() == str(ord("x"))
        assert ask(cutter, "mapping.resize(4 * 4096)") == "None"
        assert ask(cutter, "mapping[2 * 4096 :].count(b'x'), mapping[2 * 4096 + 100 :].strip(bytes(1))") == "(100, b'')"
        assert ask(cutter, "mapping.close()") == "None"
        assert path.read_bytes() == b"x" * (2 * PAGE + 100) + bytes(2 * PAGE - 100)
        check_frames(kernel)


def test_12_a_write_back_under_way_stores_nothing_that_was_cut_off(folder, puppet, monkeypatch):
    """The file ends earlier in its last page, and later again, while a write-back has the old bytes: they stay out."""
    path = folder / "file"
    path.write_bytes(bytes(3 * PAGE))
    with running(folder / "kernel.sock", 64) as kernel, held(monkeypatch, "write-back") as write:
        writer, cutter = puppet(kernel), puppet(kernel)
        have_open(path, writer, cutter, mode="r+")
        assert ask(writer, "mapping.write(b'x' * 3 * 4096)") == str(3 * PAGE)
        writer.tell("mapping.flush()")
        write.reached()
        cutter.tell("mapping.resize(2 * 4096 + 100), mapping.resize(4 * 4096)")
        until(lambda: path.stat().st_size == 2 * PAGE + 100, "the file is cut")
        with contextlib.suppress(AssertionError):  # what did not wait for the write-back would grow it now
            until(lambda: path.stat().st_size == 4 * PAGE, "it grows", limit=0.5)
        write.resume()
        assert cutter.line() == "(None, None)"
        assert writer.line() == "None"
        for client in (writer, cutter):
            assert ask(client, "mapping.close()") == "None"
        assert path.read_bytes() == b"x" * (2 * PAGE + 100) + bytes(2 * PAGE - 100)


def test_12_a_fault_on_a_page_that_is_cut_off_ends_in_an_error(folder, puppet, monkeypatch):
    """Its page never comes in, no frame is left, and the access raises."""
    path = folder / "file"
    path.write_bytes(b"x" * 64 * PAGE)
    with running(folder / "kernel.sock", 64) as kernel, held(monkeypatch, "fill") as fill:
        reader, cutter = puppet(kernel), puppet(kernel)
        have_open(path, reader)
        have_open(path, cutter, mode="r+")
        reader.tell("mapping[40 * 4096]")
        fill.reached()
        cutter.tell("mapping.resize(4096)")
        until(lambda: path.stat().st_size == PAGE, "the file is cut")
        fill.resume()
        assert cutter.line() == "None"
        assert reader.line().startswith("StoreError")
        assert ask(reader, "mapping[0]") == str(ord("x"))
        assert ask(reader, "mapping[50 * 4096]").startswith("StoreError")
        assert only_cache(kernel).native().resident() == [0]
        check_frames(kernel)


def test_12_a_client_that_dies_in_a_fault_leaves_a_page_and_no_mapping(folder, puppet, monkeypatch):
    """What its fault asked for comes in for others; the region it was in is gone, and so is the client."""
    path = folder / "file"
    path.write_bytes(words(64 * PAGE))
    with running(folder / "kernel.sock", 64) as kernel, held(monkeypatch, "fill") as fill:
        reader, other = puppet(kernel), puppet(kernel)
        have_open(path, reader, other)
        reader.tell("mapping[20 * 4096]")
        fill.reached()
        reader.process.kill()
        until(lambda: len(kernel._clients) == 1, "the kernel has seen it go")
        other.tell("mapping[20 * 4096 : 20 * 4096 + 8]")
        fill.resume()
        assert other.line() == repr(words(64 * PAGE)[20 * PAGE : 20 * PAGE + 8])
        [client] = kernel._clients.values()
        assert len(client.regions) == 1
        check_frames(kernel)


def test_12_a_fault_that_waits_when_its_kernel_ends_is_not_shown_a_wrong_byte(folder, puppet, monkeypatch):
    """The kernel ends while it fills: the access gets the page, or an error."""
    path = folder / "file"
    path.write_bytes(b"x" * 4 * PAGE)
    with held(monkeypatch, "fill") as fill:
        with running(folder / "kernel.sock", 64) as kernel:
            reader = puppet(kernel, grace=0.5)
            have_open(path, reader)
            reader.tell("mapping[4096]")
            fill.reached()
            kernel.stop()
            until(lambda: not kernel._clients or kernel._stopping, "it ends")
            fill.resume()
        line = reader.line()
        assert line == str(ord("x")) or line.startswith("KernelUnavailable"), line


def test_12_a_snapshot_that_comes_in_a_fault_shows_what_was_there(folder, puppet, monkeypatch):
    """A page is on its way in, for a read and for a write, when the snapshot is made: it has the page as it was."""
    path = folder / "file"
    path.write_bytes(b"x" * 64 * PAGE)
    with running(folder / "kernel.sock", 64) as kernel, held(monkeypatch, "fill") as fill:
        writer, reader, copier = puppet(kernel), puppet(kernel), puppet(kernel)
        have_open(path, writer, reader, copier, mode="r+")
        writer.tell("mapping.__setitem__(20 * 4096, 7)")
        reader.tell("mapping[21 * 4096]")
        fill.reached()
        assert "Mapping" in ask(copier, "(copy := mapping.snapshot())")
        fill.resume()
        assert writer.line() == "None"
        assert reader.line() == str(ord("x"))
        assert (
            ask(copier, "mapping[20 * 4096], copy[20 * 4096], copy[:].count(b'x')") == f"(7, {ord('x')}, {64 * PAGE})"
        )
        for client in (writer, reader, copier):
            assert ask(client, "client.close()") == "None"
        assert path.read_bytes() == b"x" * 20 * PAGE + b"\7" + b"x" * (44 * PAGE - 1)
        check_frames(kernel)


def test_12_eviction_passes_over_a_page_that_comes_in(folder, puppet, monkeypatch):
    """Frames are asked for while a fill is held: its pages are left alone, and are right when they are there."""
    path = folder / "file"
    path.write_bytes(words(64 * PAGE))
    with running(folder / "kernel.sock", 64) as kernel, held(monkeypatch, "fill") as fill:
        reader = puppet(kernel)
        have_open(path, reader)
        reader.tell("mapping[20 * 4096 : 20 * 4096 + 8]")
        fill.reached()
        fcm = only_cache(kernel)
        assert fcm.give_back(64) == 0
        assert fcm.native().discard(0, 64, True) == 16  # they are busy
        fill.resume()
        assert reader.line() == repr(words(64 * PAGE)[20 * PAGE : 20 * PAGE + 8])
        assert fcm.give_back(64) == 16
        check_frames(kernel)


# 14: memory pressure.


def test_14_what_waits_for_frames_goes_on_when_there_are_some(folder, puppet, monkeypatch):
    """All frames are in I/O: another fault waits for them, and is served when one of them can be taken."""
    path, other = folder / "file", folder / "other"
    path.write_bytes(words(64 * PAGE))
    other.write_bytes(words(64 * PAGE, 1))
    with running(folder / "kernel.sock", 4) as kernel, held(monkeypatch, "fill") as fill:
        first = [puppet(kernel) for _ in range(4)]
        last = puppet(kernel)
        for client in first:
            have_open(path, client)
        have_open(other, last)
        for number, client in enumerate(first):
            client.tell(f"mapping[{number * 16 * PAGE}]")
        until(lambda: kernel._global_pm.usage()["file"] == 4, "there is no free frame")
        last.tell(f"mapping[{7 * PAGE} : {7 * PAGE + 8}]")
        [cache] = [fcm.native() for fcm in kernel._fcms() if fcm.fr().name() == str(other)]
        until(lambda: cache.present(7, 8), "its page is marked as in I/O, and has no frame")
        fill.resume()
        assert last.line() == repr(words(64 * PAGE, 1)[7 * PAGE : 7 * PAGE + 8])
        for number, client in enumerate(first):
            assert client.line() == str(words(64 * PAGE)[number * 16 * PAGE])
        check_frames(kernel)


# 15: independent processes.


def test_15_independent_processes_are_served_on_one_processor_each(folder, script):
    """Two processes, each pinned to a CPU, with memory of their own: at least 99% of what a Process and a Region of
    theirs are used for is on one processor.
    """
    cpus = sorted(os.sched_getaffinity(0))[:2]
    code = """
        os.sched_setaffinity(0, {int(sys.argv[2])})
        client = vm.connect(sys.argv[1])
        memory = client.anonymous(1000 * 4096)
        for page in range(1000):
            memory[page * 4096] = 1
        say("touched")
        sys.stdin.readline()
        """
    with running(folder / "kernel.sock", 4096, "distributed") as kernel:
        clients = [script(code, kernel._path, cpu) for cpu in cpus]
        for client in clients:
            assert client.line() == "touched"
        for served in kernel._clients.values():
            [mapped] = served.regions.values()
            for distributed, uses, _ in (mapped.region.native().traffic(), served.process.region_map().traffic()):
                assert distributed
                assert sum(uses) >= 1000
                assert max(uses) >= 0.99 * sum(uses)
        for client in clients:
            client.tell()
            client.good()


def test_a_file_that_is_opened_while_its_unused_cache_goes_has_what_was_written(folder, puppet, monkeypatch):
    """Until its write-back has ended, who opens the file finds the cache that makes room for others."""
    path, other = folder / "file", folder / "other"
    path.write_bytes(b"x" * 2 * PAGE)
    other.write_bytes(b"x" * PAGE)
    monkeypatch.setattr(caches, "_UNUSED", 1)
    with running(folder / "kernel.sock", 64) as kernel, held(monkeypatch, "write-back") as write:
        writer, client = puppet(kernel), puppet(kernel)
        have_open(path, writer, mode="r+")
        assert ask(writer, "mapping.write(b'written')") == "7"
        writer.process.kill()  # it would flush
        until(lambda: len(kernel.stat()["clients"]) == 1, "it is gone")
        have_open(other, client)
        assert ask(client, "mapping.close()") == "None"
        write.reached()
        assert path.read_bytes()[:7] == b"x" * 7
        assert ask(client, f"(mapping := client.open({str(path)!r}))[:8]") == "b'writtenx'"
        write.resume()
        until(lambda: path.read_bytes()[:8] == b"writtenx", "it is in the file")
        check_frames(kernel)
