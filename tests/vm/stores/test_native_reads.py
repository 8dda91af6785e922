"""Absent pages of local files are read by native threads: what they read, and what they leave to Python."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import threading
import time
from pathlib import Path

import pytest
from vm_support import PAGE, until

from k42 import _native, vm

PAGES = 4096


def _numbered(path, pages=PAGES):
    with path.open("wb") as file:
        for number in range(pages):
            file.write(struct.pack("<QQ", number, 0).ljust(PAGE, b"k"))
    return path


@pytest.mark.parametrize("objects", ["shared", "distributed", "default,fcm=partitioned"])
def test_they_read_what_the_file_has(kernels, connect, folder, objects):
    path = _numbered(folder / "file")
    with path.open("ab") as file:
        file.write(b"end")
    client = connect(kernels(budget=64 << 20, objects=objects))
    with client.open(path) as mapping:
        mapping.advise("random")
        _, wrong = _native.visit_pages(memoryview(mapping)[: PAGES * PAGE], 500, 42, 0)
        assert wrong == 0
        assert mapping[PAGES * PAGE :] == b"end"

        def all_are_counted():  # which is after who faulted goes on
            counts = client.stat()["engine"]
            return counts["read"] > 300 and counts["faults"] == counts["finished"] + counts["handed_up"]

        until(all_are_counted, "every fault is finished here or handed up")
        assert bytes(mapping) == path.read_bytes()


def test_what_follows_is_read_ahead(kernels, connect, folder):
    path = _numbered(folder / "file")
    client = connect(kernels(budget=64 << 20))
    with client.open(path) as mapping:
        _, wrong = _native.visit_pages(mapping, PAGES, 0, 0)
        assert wrong == 0
        stat = client.stat()
        [file] = stat["files"]
        assert file["read_ahead"] > 0
        assert file["io_submitted"] == 0  # by nobody but native threads
        assert stat["engine"]["read"] < PAGES // 16


def test_a_resize_that_is_refused_leaves_read_ahead_as_it_is(kernels, connect, folder):
    path = _numbered(folder / "file")
    kernel = kernels(budget=64 << 20)
    client = connect(kernel)
    with client.open(path) as mapping:
        with pytest.raises(vm.Unsupported):  # `Mapping.resize` would not even ask for it
            client._long_request({"op": "resize", "region": mapping._shown.region, "size": 1})
        _, wrong = _native.visit_pages(mapping, PAGES, 0, 0)
        assert wrong == 0
        assert mapping.stats()["read_ahead"] > PAGES // 2


@pytest.mark.parametrize("limit", [256, 512])
def test_who_has_a_limit_is_not_read_ahead_for_beyond_it(kernels, connect, folder, limit):
    path = _numbered(folder / "file")
    kernel = kernels(budget=64 << 20)
    client = connect(kernel, limit=limit * PAGE)
    with client.open(path) as mapping:
        for page in range(PAGES):
            assert mapping[page * PAGE] == page % 256
            if page % 8 == 0:
                time.sleep(0.0005)  # a slow reader: what is read for it has time to be pushed out
        assert mapping.stats()["filled"] < PAGES + PAGES // 4


def test_threads_that_read_ahead_run_where_the_kernel_may(kernels, connect, folder):
    path = _numbered(folder / "file")
    client = connect(kernels(budget=64 << 20))
    with client.open(path) as mapping:
        _native.visit_pages(mapping, PAGES, 0, 0)
        pid = client.stat()["pid"]
        threads = [int(each.name) for each in Path(f"/proc/{pid}/task").iterdir()]
        named = {thread: Path(f"/proc/{pid}/task/{thread}/comm").read_text().strip() for thread in threads}
        ahead = [thread for thread, name in named.items() if name == "k42-read-ahead" and thread != pid]
        native = [thread for thread in ahead if os.sched_getaffinity(thread) == os.sched_getaffinity(pid)]
        assert native


def test_with_little_memory_nothing_is_wrong_and_no_frame_is_lost(kernels, connect, folder):
    path = _numbered(folder / "file")
    kernel = kernels(budget=8 << 20)
    client = connect(kernel)
    failures = []

    def visit(seed):
        for turn in range(4):
            with client.open(path, "r+") as mapping:
                if seed % 2:
                    mapping.advise("random")
                _, wrong = _native.visit_pages(mapping, 1000, seed + 100 * turn, seed if seed % 3 == 0 else 0)
                if wrong:
                    failures.append((seed, turn, wrong))

    threads = [threading.Thread(target=visit, args=(seed,)) for seed in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with client.open(path, "r+") as mapping:
        mapping.flush()
        frames = client.stat()["frames"]
        assert frames["file"] <= frames["budget"] == (8 << 20) // PAGE
        [file] = client.stat()["files"]
        assert file["evicted"] > 0
    data = path.read_bytes()
    numbers = [struct.unpack_from("<Q", data, page * PAGE)[0] for page in range(PAGES)]
    assert numbers == list(range(PAGES))
    assert client.stat()["engine"]["read"] > 0


def test_a_client_that_dies_while_pages_are_read_harms_nobody(kernels, connect, folder, script):
    path = _numbered(folder / "file")
    kernel = kernels(budget=8 << 20)
    client = connect(kernel)
    code = """
        from k42 import _native
        import threading
        client = vm.connect(sys.argv[1])
        mapping = client.open(sys.argv[2])
        mapping.advise("random")
        def visit(seed):
            while True:
                _native.visit_pages(mapping, 1000, seed, 0)
        for seed in range(1, 5):
            threading.Thread(target=visit, args=(seed,), daemon=True).start()
        say("ready")
        import time
        time.sleep(60)
        """
    with client.open(path) as mapping:
        for _ in range(5):
            process = script(code, kernel.socket, path)
            assert process.line() == "ready"
            time.sleep(0.1)
            os.kill(process.pid, signal.SIGKILL)
            _, wrong = _native.visit_pages(mapping, 500, 7, 0)
            assert wrong == 0


def test_a_file_that_others_truncate_is_an_error_not_zeros(kernels, connect, folder):
    path = _numbered(folder / "file")
    client = connect(kernels(budget=64 << 20))
    with client.open(path) as mapping:
        mapping.advise("random")
        assert mapping[:8] == struct.pack("<Q", 0)
        os.truncate(path, 100 * PAGE)
        with pytest.raises(vm.StoreError, match="truncated"):
            mapping[200 * PAGE : 200 * PAGE + 8]
        assert mapping[50 * PAGE : 50 * PAGE + 8] == struct.pack("<Q", 50)


def test_shrinking_and_growing_leave_zeros_behind(kernels, connect, folder):
    path = _numbered(folder / "file", 64)
    client = connect(kernels(budget=64 << 20))
    with client.open(path, "r+") as mapping:
        mapping.advise("random")
        mapping.resize(32 * PAGE + 16)
        mapping.resize(64 * PAGE)
        assert mapping[32 * PAGE : 32 * PAGE + 8] == struct.pack("<Q", 32)
        assert mapping[32 * PAGE + 16 :] == bytes(32 * PAGE - 16)


@pytest.mark.parametrize("frames", [1, 31])
def test_what_has_few_frames_is_read_by_python(kernels, connect, folder, frames):
    path = _numbered(folder / "file", 100)
    client = connect(kernels(budget=frames * PAGE))
    with client.open(path) as mapping:
        _, wrong = _native.visit_pages(mapping, 200, 42, 0)
        assert wrong == 0
        assert client.stat()["engine"]["read"] == 0
        assert client.stat()["frames"]["file"] <= frames


def test_at_random_pages_are_read_alone_once_that_shows(kernels, connect, folder):
    path = _numbered(folder / "file", 16 * PAGES)
    client = connect(kernels(budget=256 << 20))
    with client.open(path) as mapping:
        _, wrong = _native.visit_pages(mapping, 1000, 42, 0)
        assert wrong == 0
        [file] = client.stat()["files"]
        assert file["filled"] < 1000 * 16 // 2
        _native.visit_pages(mapping, 16 * PAGES, 0, 0)  # in order it is read on, as before
        assert client.stat()["engine"]["read"] < 1000 + 16 * PAGES // 8


def test_a_file_that_others_write_meanwhile_is_no_mixture(kernels, connect, folder):
    path = folder / "file"
    path.write_bytes(bytes(PAGES * PAGE))
    client = connect(kernels(budget=8 << 20))
    stop = threading.Event()
    one_page = [bytes([value]) * PAGE for value in range(256)]

    def write():
        value = 0
        with path.open("r+b", buffering=0) as file:
            while not stop.is_set():
                value = (value + 1) % 256
                os.pwrite(file.fileno(), one_page[value], value % 64 * PAGE)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with client.open(path) as mapping:
            mapping.advise("random")
            for turn in range(500):
                page = turn % 64
                with contextlib.suppress(vm.StoreError):  # others write to it all the time
                    assert len(set(mapping[page * PAGE : (page + 1) * PAGE])) == 1
                if page == 63:
                    mapping.advise("dontneed")
    finally:
        stop.set()
        writer.join()


def test_the_last_client_and_the_kernel_go_while_pages_are_read(kernels, folder, script):
    path = _numbered(folder / "file")
    code = """
        from k42 import _native
        client = vm.connect(sys.argv[1])
        mapping = client.open(sys.argv[2])
        mapping.advise("random")
        for seed in range(1, 5):
            threading.Thread(target=_native.visit_pages, args=(mapping, 1 << 30, seed, 0), daemon=True).start()
        say("ready")
        sys.stdin.readline()
        os._exit(0)
        """
    for end_kernel_first in (False, True):
        kernel = kernels(budget=8 << 20)
        process = script(code, kernel.socket, path)
        assert process.line() == "ready"
        if not end_kernel_first:
            os.kill(process.pid, signal.SIGKILL)
        assert kernel.stop() == 0
