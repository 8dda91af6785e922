"""Memory in use never exceeds the budget, and all that is read under it is right."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
from pathlib import Path

import pytest
from vm_support import PAGE, Kernels, anonymous_bytes, file_counts, frame_bytes, until, words

from k42 import vm

READ_ALL = """
    import random
    socket, path, page_size, order, seed = sys.argv[1:]
    wanted = open(path, "rb").read()
    with vm.connect(socket) as client, client.open(path, page_size=int(page_size)) as mapping:
        say("ready")
        sys.stdin.readline()
        step = 4096
        places = list(range(0, len(wanted), step))
        if order == "random":
            random.Random(int(seed)).shuffle(places)
        for at in places:
            if mapping[at : at + step] != wanted[at : at + step]:
                say("WRONG at", at)
        say("done")
    """


@pytest.fixture(scope="module")
def kernel_of():
    """A kernel with this budget, the same for all tests that do not mind what was before."""
    made, kernels = Kernels(), {}
    yield lambda budget: kernels.get(budget) or kernels.setdefault(budget, made(budget, swap=False))
    made.end()


def file_of(folder: Path, size: int, name: str = "file", seed: int = 0) -> tuple[Path, bytes]:
    content = words(size, seed)
    path = folder / name
    path.write_bytes(content)
    return path, content


@pytest.mark.parametrize("page_size", [4096, 65536])
@pytest.mark.parametrize("order", ["sequential", "random"])
def test_two_processes_read_eight_times_the_budget(kernel_of, connect, script, folder, page_size, order):
    budget = 1 << 20
    kernel = kernel_of(budget)
    path, _ = file_of(folder, 8 * budget + 123)
    client = connect(kernel)
    readers = [script(READ_ALL, kernel.socket, path, page_size, order, seed) for seed in (1, 2)]
    for reader in readers:
        assert reader.line() == "ready"
    for reader in readers:
        reader.tell()
    most = polls = 0
    while any(reader.process.poll() is None for reader in readers):
        # Linux takes freed pages off the count of a memfd a moment after they have gone: what was taken by another
        # thread meanwhile is then counted too. Such an excess passes; a real one stays.
        looks = (frame_bytes(kernel.pid) for _ in range(100))
        resident = next((look for look in looks if look <= budget), budget + 1)
        frames = client.stat()["frames"]
        assert resident <= budget
        assert frames["file"] + frames["reserved"] + frames["overcommitted"] <= frames["budget"] == budget // PAGE
        most = max(most, resident)
        polls += 1
    for reader in readers:
        assert reader.good() == "done\n"
    assert polls > 3
    assert most > budget // 2  # the poll saw the work
    assert file_counts(client, path)["evicted"] >= 7 * budget // PAGE


@pytest.mark.parametrize("frames", [1, 2, 31])
def test_tiny_budgets(kernel_of, connect, folder, frames):
    kernel = kernel_of(frames * PAGE)
    path, content = file_of(folder, 100 * PAGE + 17)
    with connect(kernel).open(path) as mapping:
        if frames > 1:
            assert bytes(mapping) == content
        # Byte by byte: an access to two pages at once cannot be had with one frame.
        places = [*range(0, len(content), PAGE), *range(len(content) - 1, 0, -PAGE)]
        places += random.Random(frames).sample(range(len(content)), 300)
        for at in places:
            assert mapping[at] == content[at]
            assert frame_bytes(kernel.pid) <= frames * PAGE


def test_a_budget_of_a_million_pages(kernels, connect, folder):
    frames, group = 10**6, 2 << 20
    if os.sysconf("SC_AVPHYS_PAGES") < 2 * frames:
        pytest.skip("this machine has not the memory for it")
    kernel = kernels(frames * PAGE)
    path = folder / "file"
    size = frames * PAGE // group * group * 5 // 4
    with path.open("wb") as file:
        file.truncate(size)  # holes, but for a byte in each two megabytes
        for number in range(size // group):
            file.seek(number * group + number)
            file.write(bytes([number % 255 + 1]))
    client = connect(kernel)
    with client.open(path, page_size=group) as mapping:
        for number in range(size // group):
            assert mapping[number * group + number] == number % 255 + 1
        usage = client.stat()["frames"]
        assert frames * 3 // 4 < usage["file"] <= frames == usage["budget"]
        assert frame_bytes(kernel.pid) <= frames * PAGE
        assert file_counts(client, path)["evicted"] >= frames // 8


def test_a_budget_that_is_no_whole_number_of_pages(kernels, connect, folder):
    kernel = kernels(5 * PAGE + 4095)
    path, content = file_of(folder, 50 * PAGE)
    client = connect(kernel)
    with client.open(path) as mapping:
        assert bytes(mapping) == content
        assert client.stat()["frames"]["budget"] == 5
        assert frame_bytes(kernel.pid) <= 5 * PAGE


def test_two_files_take_frames_from_each_other(kernel_of, connect, folder):
    kernel = kernel_of(65 * PAGE)
    client = connect(kernel)
    files = [file_of(folder, 60 * PAGE, f"file{i}", i) for i in range(4)]
    mappings = [client.open(path) for path, _ in files]
    for _ in range(3):
        for mapping, (_, content) in zip(mappings, files, strict=True):
            assert bytes(mapping) == content
            assert client.stat()["frames"]["file"] <= 65
    for mapping in mappings:
        mapping.close()


def test_pages_larger_than_the_budget(kernel_of, connect, folder):
    kernel = kernel_of(31 * PAGE)
    path, content = file_of(folder, 10 * PAGE)
    client = connect(kernel)
    for page_size in (32 * PAGE, 16 * PAGE):  # one access can need two
        with pytest.raises(vm.OutOfFrames, match=r"smaller page_size.*--budget"):
            client.open(path, page_size=page_size)
        with pytest.raises(vm.OutOfFrames, match="page_size"):
            client.anonymous(PAGE, page_size=page_size, overcommit=True)
    with client.open(path, page_size=8 * PAGE) as mapping:
        assert bytes(mapping) == content


@pytest.mark.parametrize("page_size", [4096, 65536])
def test_an_access_across_two_pages_ends(kernel_of, script, folder, page_size):
    # All frames but those kept for files are taken: two neighbours must still be there at once.
    kernel = kernel_of(256 * PAGE)
    path, _ = file_of(folder, 400 * PAGE)
    code = """
        socket, path, page_size = sys.argv[1:]
        content = open(path, "rb").read()
        client = vm.connect(socket)
        mapping = client.open(path, page_size=int(page_size))
        frames = client.stat()["frames"]
        memory = client.anonymous((frames["budget"] - frames["promised_file"]) * 4096)
        memory[::4096] = b"x" * (len(memory) // 4096)
        for boundary in range(4096, len(content), 4096):
            around = slice(boundary - 9, boundary + 10)
            assert mapping[around] == content[around]
        say("done")
        """
    assert script(code, kernel.socket, path, page_size).good() == "done\n"


def test_anonymous_memory_that_does_not_fit(kernels, connect, folder):
    kernel = kernels(100 * PAGE)
    client = connect(kernel)
    with pytest.raises(vm.OutOfFrames, match=r"404 KiB of anonymous memory.*400 KiB.*--budget"):
        client.anonymous(101 * PAGE)
    whole = client.anonymous(100 * PAGE)
    with pytest.raises(vm.OutOfFrames, match="--budget"):
        client.anonymous(1)
    path, content = file_of(folder, 200 * PAGE)
    with pytest.raises(vm.OutOfFrames, match="--budget"):
        client.open(path)  # there would be no frame for it, ever
    whole[::PAGE] = b"x" * 100
    assert client.stat()["frames"]["reserved"] == 100
    assert frame_bytes(kernel.pid) == 100 * PAGE
    whole.close()
    assert client.stat()["frames"]["reserved"] == client.stat()["frames"]["promised_anonymous"] == 0
    with client.anonymous(60 * PAGE) as again:
        assert bytes(again) == bytes(60 * PAGE)  # nothing of what was written before
        with client.open(path) as mapping:
            assert bytes(mapping) == content
        assert frame_bytes(kernel.pid) <= 100 * PAGE


def test_promised_memory_is_had_from_files(kernels, connect, folder):
    kernel = kernels(100 * PAGE)
    client = connect(kernel)
    path, content = file_of(folder, 300 * PAGE)
    with client.open(path) as mapping:
        assert bytes(mapping) == content
        assert client.stat()["frames"]["file"] > 60
        memory = client.anonymous(65 * PAGE)
        memory[::PAGE] = bytes(range(65))
        assert client.stat()["frames"]["reserved"] == 65
        assert client.stat()["frames"]["file"] <= 35
        assert bytes(mapping) == content
        assert memory[::PAGE] == bytes(range(65))
        memory.close()


@pytest.mark.parametrize("page_size", [4096, 65536])
def test_overcommitted_memory_runs_out(kernel_of, connect, script, page_size):
    kernel = kernel_of(64 * PAGE)
    code = """
        client = vm.connect(sys.argv[1])
        memory = memoryview(client.anonymous(1 << 30, page_size=int(sys.argv[2]), overcommit=True))
        for page in range(1 << 18):
            memory[page * 4096] = 1
            if page % 16 == 15:
                say(page + 1)
        """
    touching = script(code, kernel.socket, page_size)
    assert touching.finish() == -signal.SIGBUS
    assert touching.rest().split() == ["16", "32", "48", "64"]
    assert re.search(
        r"k42: bus error in the mapping of anonymous memory, offset 262144 \(address 0x[0-9a-f]+\): "
        r"the kernel's budget \(256 KiB\) has no frame left for this page: .*--budget",
        touching.stderr(),
    )
    client = connect(kernel)
    until(lambda: client.stat()["frames"]["overcommitted"] == 0, "the dead client's frames are free")
    with client.anonymous(64 * PAGE) as memory:
        memory[::PAGE] = b"y" * 64


def test_a_tebibyte_costs_nothing_until_touched(kernels, connect):
    kernel = kernels(64 << 20)
    client = connect(kernel)

    def resident(pid: int | str) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE

    client.anonymous(PAGE, overcommit=True).close()
    before = resident("self"), resident(kernel.pid)
    memory = client.anonymous(1 << 40, overcommit=True)
    assert len(memory) == 1 << 40
    assert resident("self") - before[0] < 10 << 20
    assert resident(kernel.pid) - before[1] < 10 << 20
    for i in range(100):
        memory[i * (10 << 30) + 5] = i
    assert [memory[i * (10 << 30) + 5] for i in range(100)] == list(range(100))
    assert memory[-1] == 0
    assert client.stat()["frames"]["file"] == 101  # it can be swapped out
    assert resident(kernel.pid) - before[1] < 10 << 20
    memory.close()
    assert client.stat()["frames"]["file"] == 0


@pytest.mark.parametrize("kind", ["anonymous", "file"])
def test_a_resident_page_costs_48_bytes(kernels, connect, folder, kind):
    pages = 200_000  # so many that what else the kernel comes to need is hardly seen
    first = 20_000  # what they bring in once, such as threads, is not the pages'
    kernel = kernels(1 << 30)
    client = connect(kernel)
    path = folder / "file"
    with path.open("wb") as sparse:
        sparse.truncate((pages + first) * PAGE)
    size = (pages + first) * PAGE
    mapping = client.open(path, page_size=65536) if kind == "file" else client.anonymous(size)
    mapping[: first * PAGE : PAGE]
    before = anonymous_bytes(kernel.pid)
    assert mapping[first * PAGE :: PAGE] == bytes(pages)
    [counts] = client.stat()["files"]
    assert counts["descriptors"] == pages + first
    # With buckets that are set aside, and are no memory before they are used.
    assert counts["table_bytes"] <= 56 * counts["descriptors"]
    client.anonymous(PAGE).close()  # without a GIL the kernel then collects what its threads are done with
    # Beside the pages' is what Python has for its threads: without a GIL each has a heap of its own.
    beside = (1 if getattr(sys, "_is_gil_enabled", lambda: True)() else 3) << 20
    until(lambda: anonymous_bytes(kernel.pid) - before <= 48 * pages + beside, "it has grown by no more")
    mapping.close()


def test_evicted_pages_cost_nothing(kernel_of, connect, folder):
    kernel = kernel_of(65 * PAGE)
    path, _ = file_of(folder, 4000 * PAGE)
    client = connect(kernel)
    with client.open(path) as mapping:
        for _ in range(2):
            mapping[::PAGE]
            counts = file_counts(client, path)
            assert counts["descriptors"] <= 65
            assert counts["table_bytes"] < 256 << 10
