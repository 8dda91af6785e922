from __future__ import annotations

import ctypes
import gc
import os
import random
import re
import threading
from pathlib import Path
from typing import Any

import numpy
import pytest
from vm_support import PAGE, file_counts, words

from k42 import vm

PAGE_SIZES = [4096, 16384, 65536, 2 << 20]


@pytest.fixture
def make(folder: Path) -> Any:
    """Makes a file of so many bytes: (path, bytes)."""

    def make(size: int, name: str = "file") -> tuple[Path, bytes]:
        content = random.Random(size).randbytes(size)
        path = folder / name
        path.write_bytes(content)
        return path, content

    return make


def address_of(mapping: vm.Mapping) -> int:
    return int(numpy.asarray(mapping).ctypes.data)


@pytest.mark.parametrize("page_size", [None, *PAGE_SIZES])
@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 65537, (5 << 20) + 11])
def test_every_byte_and_zeros_behind_the_last(client, make, size, page_size):
    path, content = make(size)
    with client.open(path, page_size=page_size) as mapping:
        assert len(mapping) == size
        assert mapping.page_size == (page_size or PAGE)
        assert bytes(mapping) == content
        tail = -size % PAGE
        assert ctypes.string_at(address_of(mapping) + size, tail) == bytes(tail)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_the_last_bytes_first(client, make, page_size):
    # The tail of the file shares its page with nothing that was there before.
    path, content = make((3 << 20) + 5)
    with client.open(path, page_size=page_size) as mapping:
        assert mapping[-5:] == content[-5:]
        assert ctypes.string_at(address_of(mapping) + len(content), -len(content) % PAGE).strip(b"\0") == b""
        assert bytes(mapping) == content


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_offset_and_length_need_not_be_whole_pages(client, make, page_size):
    size = (4 << 20) + 1234
    path, content = make(size)
    chosen = random.Random(page_size)
    cases = [(0, 1), (1, 1), (PAGE - 1, 2), (PAGE, PAGE), (size - 1, 1), (size - 1, None), (2 << 20, None)]
    for _ in range(20):
        offset = chosen.randrange(size)
        cases.append((offset, chosen.randrange(1, size - offset + 1)))
    for offset, length in cases:
        with client.open(path, "r", offset, length, page_size) as mapping:
            wanted = content[offset:] if length is None else content[offset : offset + length]
            assert len(mapping) == len(wanted)
            assert mapping[:1] + mapping[-1:] == wanted[:1] + wanted[-1:]
            assert bytes(mapping) == wanted, (offset, length)


def test_two_page_sizes_show_the_same_frames(client, make):
    path, content = make(1 << 20)
    mappings = [client.open(path, page_size=page_size, offset=PAGE) for page_size in PAGE_SIZES]
    for at in random.Random(1).sample(range(len(content) - PAGE), 200):
        assert {mapping[at] for mapping in mappings} == {content[at + PAGE]}
    for mapping in mappings:
        assert bytes(mapping) == content[PAGE:]
    assert file_counts(client, path)["filled"] == 256
    for mapping in mappings:
        mapping.close()


def test_what_python_can_do_with_a_mapping(client, make):
    path, content = make(100_000)
    with client.open(path) as mapping:
        with memoryview(mapping) as view:
            assert view.nbytes == 100_000
            assert view.format == "B"
            assert view == content
        assert mapping[0] == content[0]
        assert mapping[-1] == content[-1]
        assert mapping[5000:5010] == content[5000:5010]
        assert mapping[::4099] == content[::4099]
        assert mapping[::-1] == content[::-1]
        assert mapping[200_000:] == b""
        with pytest.raises(IndexError):
            mapping[100_000]
        array = numpy.asarray(mapping)
        assert array.dtype == numpy.uint8
        assert not array.flags.writeable
        assert numpy.array_equal(array, numpy.frombuffer(content, numpy.uint8))
        found = re.search(re.escape(content[70_000:70_020]), mapping)
        assert found is not None
        assert found.span() == (70_000, 70_020)
        assert repr(mapping) == f"<k42.vm.Mapping of {path}, 100000 bytes>"
        del array, found


def test_system_calls_can_be_given_the_memory(client, make, folder):
    path, content = make(300_000)
    if client_mode_is_restricted():
        pytest.skip("userfaultfd in user mode only: Linux cannot serve faults from within system calls")
    copy = folder / "copy"
    with client.open(path) as mapping, open(copy, "wb", buffering=0) as out:
        assert out.write(mapping) == 300_000
    assert copy.read_bytes() == content
    with client.anonymous(300_000) as memory, open(path, "rb", buffering=0) as source:
        assert source.readinto(memory) == 300_000
        assert bytes(memory) == content


def client_mode_is_restricted() -> bool:
    from k42 import _native

    try:
        os.close(_native.open_userfaultfd(False))
    except PermissionError:
        return True
    return False


def test_path_objects_and_relative_paths(client, make, monkeypatch):
    path, content = make(10)
    monkeypatch.chdir(path.parent)
    for name in (path, str(path), "file", Path("file")):
        with client.open(name) as mapping:
            assert bytes(mapping) == content


@pytest.mark.parametrize("name", ["日本語" * 20, "\udcff\udcfe", "a b\n\t\"'"])
def test_any_name(client, make, name):
    # Long in UTF-8, not UTF-8 at all, and hard to quote.
    path, content = make(10_000, name)
    with client.open(path) as mapping:
        assert bytes(mapping) == content


def test_a_long_path_of_long_characters(client, folder):
    deep = folder
    for _ in range(3):
        deep = deep / ("語" * 80)
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"deep")
    with client.open(deep / "file") as mapping:
        assert bytes(mapping) == b"deep"


def test_anonymous_memory_is_zeros_until_written(client):
    for size in (1, PAGE, PAGE + 1, 3 << 20):
        for page_size in (None, 65536, 2 << 20):
            with client.anonymous(size, page_size=page_size) as memory:
                assert len(memory) == size
                assert bytes(memory) == bytes(size)
                memory[size - 1] = 7
                memory[0] = 9
                content = bytearray(size)
                content[size - 1] = 7
                content[0] = 9
                assert bytes(memory) == content


def test_anonymous_memory_as_an_array(client):
    with client.anonymous(8 << 20) as memory:
        array = numpy.asarray(memory).view("<u8")
        array[:] = numpy.arange(len(array))
        assert int(array.sum()) == len(array) * (len(array) - 1) // 2
        memory[8:16] = bytes(8)
        assert array[1] == 0
        del array


def test_closing(client, make):
    path, content = make(10_000)
    mapping = client.open(path)
    with memoryview(mapping) as view:
        with pytest.raises(BufferError, match="uses the memory"):
            mapping.close()
        with pytest.raises(BufferError, match="uses the memory"):
            client.close()
        assert bytes(view) == content  # nothing was closed
        assert mapping[9_999] == content[9_999]
    mapping.close()
    mapping.close()
    for use in (len, memoryview, bytes, lambda m: m[0], lambda m: m[1:2], lambda m: m.local()):
        with pytest.raises(ValueError, match="closed"):
            use(mapping)
    assert "closed" in repr(mapping)
    with client.open(path) as again:
        assert bytes(again) == content


def test_an_exception_closes_it_too(client, make):
    path, _ = make(10)
    with pytest.raises(KeyError), client.open(path) as mapping:
        raise KeyError
    assert not mapping.shown


def test_dropping_frees_the_region(client, make):
    path, content = make(100_000)

    def regions() -> int:
        return sum(c["regions"] for c in client.stat()["clients"] if c["pid"] == os.getpid())

    before = regions()
    mappings = [client.open(path) for _ in range(5)]
    memory = client.anonymous(1 << 20)
    memory[0] = 1
    assert regions() == before + 6
    assert client.stat()["frames"]["reserved"] == 1
    del mappings, memory
    gc.collect()
    assert regions() == before
    assert client.stat()["frames"]["reserved"] == 0
    assert client.stat()["frames"]["promised_anonymous"] == 0
    # Their addresses are used again, and nothing of before is seen there.
    with client.open(path) as mapping:
        assert bytes(mapping) == content


def test_a_view_keeps_the_memory(client, make):
    path, content = make(100_000)
    view = memoryview(client.open(path))
    gc.collect()
    assert bytes(view) == content
    view.release()


def test_a_client_that_is_dropped_is_gone(shared_kernel, client, make):
    path, _ = make(10_000)

    def connected() -> int:
        return len(client.stat()["clients"])

    def open_descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before, descriptors = connected(), open_descriptors()
    mapping = vm.connect(shared_kernel.socket).open(path)
    mapping[0]
    assert connected() == before + 1
    del mapping
    gc.collect()
    assert connected() == before
    assert open_descriptors() == descriptors


def test_a_closed_client(shared_kernel, make):
    path, _ = make(10)
    client = vm.connect(shared_kernel.socket)
    mapping = client.open(path)
    client.close()
    client.close()
    assert not mapping.shown
    for use in (client.stat, lambda: client.open(path), lambda: client.anonymous(1)):
        with pytest.raises(vm.KernelUnavailable, match="closed"):
            use()


def on_cpu(cpu: int, work: Any) -> Any:
    """What `work` gives on a thread that is on this CPU alone."""
    results: list[Any] = []

    def body() -> None:
        os.sched_setaffinity(0, {cpu})
        results.append(work())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_local_windows(client, make):
    path, content = make((1 << 20) + 3)
    cpus = sorted(os.sched_getaffinity(0))[:2]
    with client.open(path, offset=1) as mapping:
        windows = [on_cpu(cpu, mapping.local) for cpu in cpus]
        assert windows[0] is not windows[1]
        assert mapping in windows
        assert len({window.base for window in windows}) == 2
        for cpu, window in zip(cpus, windows, strict=True):
            assert on_cpu(cpu, mapping.local) is window
            assert on_cpu(cpu, windows[0].local) is window
            assert on_cpu(cpu, lambda window=window: bytes(window)) == content[1:]
        assert file_counts(client, path)["filled"] == 257
        with memoryview(windows[0]), pytest.raises(BufferError):
            mapping.close()
    for window in windows:
        with pytest.raises(ValueError, match="closed"):
            len(window)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_writes_are_seen_through_every_local_window(client):
    cpus = sorted(os.sched_getaffinity(0))[:2]
    pages = 64
    with client.anonymous(pages * PAGE) as memory:
        one, two = (on_cpu(cpu, memory.local) for cpu in cpus)

        def write(window: vm.Mapping, first: int) -> None:
            for page in range(first, pages, 2):
                window[page * PAGE] = page + 1

        on_cpu(cpus[0], lambda: write(one, 0))
        on_cpu(cpus[1], lambda: write(two, 1))
        for window in (one, two, memory):
            assert window[::PAGE] == bytes(range(1, pages + 1))
        one[17] = 99
        assert two[17] == 99
        assert client.stat()["frames"]["reserved"] == pages


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_dropping_a_mapping_with_local_windows(client, make):
    path, _ = make(100_000)
    cpus = sorted(os.sched_getaffinity(0))[:2]
    mapping = client.open(path)
    windows = [on_cpu(cpu, mapping.local) for cpu in cpus]
    mine = [c for c in client.stat()["clients"] if c["pid"] == os.getpid()]
    assert [c["regions"] for c in mine] == [1]
    del mapping, windows
    gc.collect()
    mine = [c for c in client.stat()["clients"] if c["pid"] == os.getpid()]
    assert [c["regions"] for c in mine] == [0]


def test_two_clients_share_the_frames(shared_kernel, client, folder):
    path = folder / "shared"
    content = words(300 * PAGE)
    path.write_bytes(content)
    with vm.connect(shared_kernel.socket) as other, client.open(path) as one, other.open(path) as two:
        assert bytes(one) == bytes(two) == content
        with other.open(path, page_size=65536) as three:
            assert bytes(three) == content
        counts = file_counts(client, path)
        assert counts["filled"] == counts["descriptors"] == 300
        assert counts["evicted"] == 0
    # The pages stay for whoever comes next.
    with client.open(path) as later:
        assert bytes(later) == content
    assert file_counts(client, path)["filled"] == 300


def test_a_link_to_a_file_is_the_file(client, make):
    path, content = make(10 * PAGE)
    os.link(path, path.with_name("hard"))
    path.with_name("soft").symlink_to(path)
    for name in ("file", "hard", "soft"):
        with client.open(path.with_name(name)) as mapping:
            assert bytes(mapping) == content
    assert file_counts(client, path)["filled"] == 10


def test_many_mappings(client, make):
    path, content = make(1 << 20)
    mappings = [client.open(path, offset=i * 97, length=97) for i in range(1500)]
    for i, mapping in enumerate(mappings):
        assert bytes(mapping) == content[i * 97 : (i + 1) * 97]
    for mapping in mappings:
        mapping.close()


def test_threads_that_read_one_mapping(client, make):
    path, content = make(4 << 20)
    wrong: list[int] = []
    with client.open(path) as mapping:

        def read(seed: int) -> None:
            chosen = random.Random(seed)
            for _ in range(300):
                at = chosen.randrange(len(content) - 100)
                if mapping[at : at + 100] != content[at : at + 100]:
                    wrong.append(at)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert file_counts(client, path)["filled"] == 1024


def test_threads_that_close_one_mapping_while_others_read(shared_kernel, make, script):
    # In a process of its own: what goes wrong here is a crash, or a descriptor of somebody else that is closed.
    path, _ = make(20 * PAGE)
    code = """
        socket, path = sys.argv[1:]
        client = vm.connect(socket)
        wanted = open(path, "rb").read()
        for round in range(150):
            mapping = client.open(path)
            start = threading.Barrier(4)
            def read():
                start.wait()
                try:
                    while True:
                        if mapping[::4096] != wanted[::4096]:
                            os._exit(3)
                except ValueError:
                    pass  # closed
            def close():
                start.wait()
                while True:
                    try:
                        return mapping.close()
                    except BufferError:
                        pass
            threads = [threading.Thread(target=work) for work in (read, read, close, close)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            pipe = os.pipe()  # would be closed by a second close of the same number
            client.stat()
            for end in pipe: os.close(end)
        regions = [c["regions"] for c in client.stat()["clients"] if c["pid"] == os.getpid()]
        say(regions)
        client.close()
        """
    assert script(code, shared_kernel.socket, path).good() == "[0]\n"


def test_a_client_that_closes_while_others_open(kernels, script, make):
    # Whoever loses hears of it; nobody is left with memory that the kernel no longer serves.
    path, _ = make(400_000)
    code = """
        socket, path = sys.argv[1:]
        wanted = open(path, "rb").read()
        for _ in range(60):
            client = vm.connect(socket)
            gate = threading.Barrier(3)
            kept = []
            def work():
                gate.wait()
                try:
                    while True:
                        kept.append(client.open(path))
                except vm.KernelUnavailable as error:
                    assert str(error) == "this client is closed", error
            threads = [threading.Thread(target=work) for _ in range(2)]
            for thread in threads: thread.start()
            gate.wait()
            client.close()
            for thread in threads: thread.join()
            for mapping in kept:
                try:
                    assert mapping[:] == wanted
                    say("still shown")
                except ValueError:
                    pass  # closed
        say("done")
        """
    assert script(code, kernels().socket, path).good() == "done\n"
