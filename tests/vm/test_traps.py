"""The rules of page faults in user space, each of which was learned from a program that broke it. Here are those that
no other test here would notice.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from vm_support import PAGE, PAGES, held, running, words


def watched(pid: int) -> int:
    """How many mappings of a process a userfaultfd watches."""
    flags = re.findall(r"^VmFlags: (.*)$", Path(f"/proc/{pid}/smaps").read_text(), re.MULTILINE)
    return sum(not {"um", "uw", "ui"}.isdisjoint(line.split()) for line in flags)


def test_no_memory_of_the_kernel_is_managed(shared_kernel, script, path):
    """Who serves faults never has one: it is another process, and no userfaultfd watches any of its memory. So a fault
    of a thread that holds its interpreter is served.
    """
    code = """
        sys.setswitchinterval(1000)
        client = vm.connect(sys.argv[1])
        with memoryview(client.open(sys.argv[2])) as view:
            say(view[:: 4096].tobytes() == open(sys.argv[2], "rb").read()[:: 4096])
            sys.stdin.readline()
        """
    client = script(code, shared_kernel.socket, path)
    assert client.line() == "True"
    assert watched(client.pid) >= 1
    assert watched(shared_kernel.pid) == 0
    client.tell()
    client.good()


def test_a_frame_that_is_there_is_no_page_before_it_is_filled(folder, script, path):
    """The state of a page is the kernel's own table's: Linux has a frame, and says so by the kind of the fault, but
    what is in it came from nobody who may say what the page is.
    """
    code = """
        client = vm.connect(sys.argv[1])
        mapping = client.open(sys.argv[2])
        wanted = open(sys.argv[2], "rb").read()
        say("mapped")
        sys.stdin.readline()
        say(all(mapping[at : at + 4096] == wanted[at : at + 4096] for at in range(20 * 4096, 64 * 4096, 4096)))
        sys.stdin.readline()
        """
    with running(folder / "kernel.sock", 2 * PAGES) as kernel:
        client = script(code, kernel._path, path)
        assert client.line() == "mapped"
        [fcm] = kernel._fcms()
        os.pwrite(fcm.memfd(), b"planted!" * (PAGE // 8) * 20, 20 * PAGE)
        client.tell()
        assert client.line() == "True"
        client.tell()
        client.good()


def test_a_page_that_is_read_is_not_made_of_zeros(folder, script, path, monkeypatch):
    """While a page is on its way in, its memory in Linux may be zeros already: nobody sees them."""
    code = """
        client = vm.connect(sys.argv[1])
        mapping = client.open(sys.argv[2])
        say("mapped")
        say(bytes(mapping) == open(sys.argv[2], "rb").read())
        """
    with running(folder / "kernel.sock", 2 * PAGES) as kernel, held(monkeypatch, "fill") as fill:
        clients = [script(code, kernel._path, path) for _ in range(2)]
        for client in clients:
            assert client.line() == "mapped"
        fill.reached()
        [fcm] = kernel._fcms()
        os.pread(fcm.memfd(), 16 * PAGE, 0)
        os.posix_fallocate(fcm.memfd(), 0, 16 * PAGE)
        fill.resume()
        for client in clients:
            assert client.line() == "True"


WRITES = """
    import itertools
    client = vm.connect(sys.argv[1])
    path = sys.argv[2]
    def stored(page):
        with open(path, "rb") as file:
            return os.pread(file.fileno(), 1, page * 4096)[0]
    mapping = client.open(path, "r+")
    others = [client.open(path, "r+"), mapping.local()]
    values = itertools.cycle(range(1, 256))
    for page in range(32):
        for window in (mapping, *others):
            window[page * 4096]  # clean, and mapped; its neighbours with it
            for _ in range(2):
                window[page * 4096] = value = next(values)
                client.open(path, "r").close()
                mapping.flush(page * 4096, 4096)
                if stored(page) != value:
                    say("lost", page, value)
        # Dirty in all windows, then clean in all: a write through any of them counts.
        for window in (mapping, *others):
            window[page * 4096] = value = next(values)
        mapping.flush()
        for window in (*others, mapping):
            window[page * 4096] = value = next(values)
            mapping.flush()
            if stored(page) != value:
                say("lost again", page, value)
    say("done")
    """


@pytest.mark.parametrize("fcm", ["shared", "replicated", "partitioned"])
def test_a_write_to_a_clean_page_is_noticed_in_every_window(kernels, script, path, fcm):
    """A clean page is mapped so that writing is a fault; writing back makes it so again, wherever it is mapped."""
    client = script(WRITES, kernels(objects=f"default,fcm={fcm}").socket, path)
    assert client.good() == "done\n"


def test_what_is_used_is_seen_and_stays(kernels, script, folder):
    """Pages are unmapped softly, by the client itself, to see who uses them: those in use stay in, and are read once
    from the store, while ten times the budget goes through.
    """
    kernel = kernels(64 * PAGE)
    path = folder / "large"
    path.write_bytes(words(648 * PAGE))
    code = """
        mapping = vm.connect(sys.argv[1]).open(sys.argv[2], fault_around=4096)
        mapping.advise("random")
        for page in range(8, 648):
            mapping[page * 4096]
            for used in range(8):
                mapping[used * 4096]
        counts = mapping.stats()
        say(counts["probed"] > 500, counts["rescued"] > 8, counts["filled"] < 680)
        """
    assert script(code, kernel.socket, path).good() == "True True True\n"


def test_private_copies_outlive_the_frames(kernels, connect, script, folder, path):
    """What is written in mode "c" is memory of the client alone: it costs no frame, and no eviction takes it."""
    kernel = kernels(8 * PAGE)
    code = """
        client = vm.connect(sys.argv[1])
        mine, others = client.open(sys.argv[2], "c"), client.open(sys.argv[2])
        wanted = open(sys.argv[2], "rb").read()
        for page in range(0, 64, 2):
            mine[page * 4096 : page * 4096 + 4] = b"mine"
        for _ in range(3):
            assert bytes(others) == wanted
            for page in range(64):
                part = slice(page * 4096, (page + 1) * 4096)
                assert mine[part] == (wanted[part] if page % 2 else b"mine" + wanted[part][4:]), page
        [counts] = client.stat()["files"]
        say(counts["resident"] <= 8, counts["evicted"] > 64, client.stat()["frames"]["file"] <= 8)
        """
    assert script(code, kernel.socket, path).good() == "True True True\n"
    assert path.read_bytes() == words(PAGES * PAGE)
