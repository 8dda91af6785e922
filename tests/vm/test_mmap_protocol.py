"""A Mapping does what an `mmap.mmap` of a copy of the file does: the same results, errors of the same types, and the
same bytes in the file at the end."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vm_support import PAGE, stop, words

from k42 import vm

MODES = ["r", "r+", "c", "anonymous"]
ACCESS = {"r": mmap.ACCESS_READ, "r+": mmap.ACCESS_WRITE, "c": mmap.ACCESS_COPY}

# Few different bytes, so that searches find something; three pages and a bit, so that what is done crosses pages.
SIZE = 3 * PAGE + 100
CONTENT = (b"ab\nba\n\nabba" * 1200)[: SIZE - 3] + b"end"

near = st.one_of(
    st.integers(-SIZE - 5, SIZE + 5),
    st.sampled_from([0, 1, -1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, SIZE - 1, SIZE, SIZE + 1, 2**70, -(2**70)]),
)
some = st.one_of(near, st.none())
data = st.one_of(
    st.binary(max_size=6),
    st.sampled_from([bytearray(b"ab"), "ab", 97, None]),
    st.sampled_from([b"a", b"ab", b"abba", b"\n", b"end", b"ba\n\n", b"", b"xyz" * 2000]),
)
slices = st.builds(slice, some, some, st.one_of(st.none(), st.integers(-7, 7), st.just(PAGE), st.just(-PAGE)))
byte = st.one_of(st.integers(-1, 256), st.sampled_from([b"a", 1.0, None]))
bounds = st.lists(near, max_size=2)

OPERATIONS = st.one_of(
    st.tuples(st.just("get"), st.one_of(near, slices, st.sampled_from(["a", 1.5, None]))),
    st.tuples(st.just("set"), near, byte),
    st.tuples(st.just("set slice"), slices, data),
    st.tuples(st.just("fill"), slices, st.integers(0, 255)),
    st.tuples(st.just("delete"), st.one_of(near, slices)),
    st.tuples(st.just("find"), data, bounds),
    st.tuples(st.just("rfind"), data, bounds),
    st.tuples(st.just("read"), st.one_of(some, st.just(2.0))),
    st.tuples(st.just("read_byte")),
    st.tuples(st.just("readline")),
    st.tuples(st.just("write"), data),
    st.tuples(st.just("write_byte"), byte),
    st.tuples(st.just("seek"), near, st.sampled_from([0, 0, 1, 2, 3, 4, -1])),
    st.tuples(st.just("tell")),
    st.tuples(st.just("move"), near, near, near),
    st.tuples(st.just("flush")),
    st.tuples(st.just("flush part"), st.sampled_from([-1, 0, PAGE, 2 * PAGE, 10 * PAGE]), near),
    st.tuples(st.just("in"), data),
    st.tuples(st.just("len")),
)
# Not to 0: an mmap.mmap then truncates the file, fails, and still shows pages that have gone.
RESIZE = st.tuples(st.just("resize"), st.sampled_from([-1, 1, 100, PAGE, PAGE + 1, SIZE, 5 * PAGE + 7, 9 * PAGE]))


def perform(target: Any, operation: tuple[Any, ...]) -> Any:
    """The result, or the type of the error."""
    name, *rest = operation
    try:
        match name:
            case "get":
                return target[rest[0]]
            case "set" | "set slice":
                target[rest[0]] = rest[1]
                return None
            case "fill":
                part = rest[0]
                target[part] = bytes([rest[1]]) * len(target[part])
                return None
            case "delete":
                del target[rest[0]]
                return None
            case "find" | "rfind":
                return getattr(target, name)(rest[0], *rest[1])
            case "in":
                return rest[0] in target
            case "len":
                return len(target)
            case "flush part":
                return target.flush(*rest)
            case "seek":
                target.seek(*rest)  # what it returns differs from version to version
                return target.tell()
            case _:
                return getattr(target, name)(*rest)
    except Exception as error:
        return type(error)


def compare(ours: vm.Mapping, theirs: mmap.mmap, operations: list[tuple[Any, ...]]) -> None:
    for operation in operations:
        wanted = perform(theirs, operation)
        found = perform(ours, operation)
        assert found == wanted, operation
        assert type(found) is type(wanted), operation
        assert ours.tell() == theirs.tell(), operation
    assert bytes(ours) == bytes(theirs)


@pytest.fixture(scope="module")
def place(shared_kernel: vm.KernelProcess, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes the two files of an example, and the mapping and the mmap of them."""
    folder = tmp_path_factory.mktemp("mmap")
    numbers = itertools.count()
    with vm.connect(shared_kernel.socket) as client:

        @contextlib.contextmanager
        def both(mode: str) -> Iterator[tuple[vm.Mapping, mmap.mmap]]:
            if mode == "anonymous":
                ours, theirs = client.anonymous(SIZE), mmap.mmap(-1, SIZE)
                ours[:] = theirs[:] = CONTENT
                with ours, theirs:
                    yield ours, theirs
                return
            number = next(numbers)
            paths = [folder / f"{number}-{name}" for name in ("ours", "theirs")]
            for path in paths:
                path.write_bytes(CONTENT)
            with open(paths[1], "r+b") as file:
                theirs = mmap.mmap(file.fileno(), 0, access=ACCESS[mode])
            with client.open(paths[0], mode) as ours, theirs:
                yield ours, theirs
                ours.flush()
                theirs.flush()
                assert paths[0].read_bytes() == paths[1].read_bytes()
            assert paths[0].read_bytes() == paths[1].read_bytes()
            for path in paths:
                path.unlink()

        yield both


EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("mode", MODES)
@EXAMPLES
@given(operations=st.lists(OPERATIONS, max_size=25))
def test_random_operations(place, mode, operations):
    with place(mode) as (ours, theirs):
        compare(ours, theirs, operations)


@EXAMPLES
@given(operations=st.lists(st.one_of(OPERATIONS, RESIZE), max_size=15))
def test_random_operations_with_resizing(place, operations):
    with place("r+") as (ours, theirs):
        compare(ours, theirs, operations)


@pytest.mark.parametrize("mode", MODES)
def test_every_operation_once_closed(place, mode):
    with place(mode) as (ours, theirs):
        pass
    operations: list[tuple[Any, ...]] = [
        ("get", 0), ("get", slice(0, 1)), ("set", 0, 1), ("set slice", slice(0, 1), b"a"), ("delete", 0),
        ("find", b"a", []), ("rfind", b"a", []), ("read", None), ("read_byte",), ("readline",), ("write", b"a"),
        ("write_byte", 1), ("seek", 0, 0), ("tell",), ("move", 0, 0, 0), ("flush",), ("in", b"a"), ("len",),
        ("size",), ("resize", 5), ("madvise", mmap.MADV_NORMAL), ("__enter__",), ("close",),
    ]  # fmt: skip
    for operation in operations:
        assert perform(ours, operation) == perform(theirs, operation), operation
    assert ours.closed
    assert ours.seekable()
    with pytest.raises(ValueError, match="closed"):
        memoryview(ours)


@pytest.mark.parametrize("mode", ["r+", "anonymous"])
def test_iteration(place, mode):
    with place(mode) as (ours, theirs):
        assert list(ours) == list(theirs)
        assert list(zip(ours, theirs, strict=True))[:2] == [(b"a", b"a"), (b"b", b"b")]
        assert (97 in ours) is (97 in theirs) is False


def test_lines_until_the_end(place):
    with place("r") as (ours, theirs):
        assert list(iter(ours.readline, b"")) == list(iter(theirs.readline, b"")) == CONTENT.splitlines(keepends=True)


def test_size_and_position_after_resizing(place):
    with place("r+") as (ours, theirs):
        for target in (ours, theirs):
            target.seek(SIZE)
            target.resize(2 * PAGE)
        for operation in [("read", 5), ("read_byte",), ("readline",), ("write", b""), ("find", b"", []), ("tell",)]:
            assert perform(ours, operation) == perform(theirs, operation), operation
        assert ours.size() == theirs.size() == 2 * PAGE


def test_resizing_to_nothing_changes_nothing(place):
    with place("r+") as (ours, theirs):
        with pytest.raises(OSError, match="at least one byte"):
            ours.resize(0)
        assert ours[:] == theirs[:]


def test_buffers_hold_it_open(place):
    for mode in MODES:
        with place(mode) as (ours, theirs):
            for target in (ours, theirs):
                with memoryview(target) as view:
                    assert view.readonly is (mode == "r")
                    with pytest.raises(BufferError):
                        target.close()
                    assert target[:2] == b"ab"
                    if mode == "r+":
                        with pytest.raises(BufferError):
                            target.resize(5)
                assert not target.closed


def test_resizing_anonymous_memory(client):
    with client.anonymous(3 * PAGE) as memory:
        memory[:3] = b"abc"
        with pytest.raises(ValueError, match="grow"):
            memory.resize(4 * PAGE)
        memory.resize(PAGE + 1)
        assert len(memory) == memory.size() == PAGE + 1
        assert memory[:4] == b"abc\0"
        memory[-1] = 9
        assert memory[PAGE:] == b"\x09"


def test_advice(client, folder):
    path = folder / "file"
    path.write_bytes(words(20 * PAGE))
    with client.open(path) as mapping:
        for option in (
            mmap.MADV_NORMAL,
            mmap.MADV_RANDOM,
            mmap.MADV_SEQUENTIAL,
            mmap.MADV_WILLNEED,
            mmap.MADV_DONTNEED,
        ):
            mapping.madvise(option)
            mapping.madvise(option, PAGE, 100 * PAGE)
            assert mapping[:] == words(20 * PAGE)
        mapping.madvise(mmap.MADV_DONTFORK)
        for option in (mmap.MADV_DOFORK, mmap.MADV_REMOVE, mmap.MADV_FREE, 9999):
            with pytest.raises(OSError, match="no use for"):
                mapping.madvise(option)
        for arguments in [(-1,), (20 * PAGE,), (0, -1)]:
            with pytest.raises(ValueError, match="madvise"):
                mapping.madvise(mmap.MADV_NORMAL, *arguments)
        with pytest.raises(ValueError, match="advice is one of"):
            mapping.advise("soon")


def test_finding_across_the_parts_that_are_searched_at_once(client):
    # A part is 1 MiB.
    size = 3 << 20
    with client.anonymous(size) as memory:
        for at in (0, (1 << 20) - 3, (1 << 20) - 1, 1 << 20, (2 << 20) - 2, size - 6):
            memory[at : at + 6] = b"needle"
            assert memory.find(b"needle") == memory.find(b"needle", at) == at
            assert memory.rfind(b"needle") == memory.rfind(b"needle", 0, at + 6) == at
            assert memory.find(b"needle", at + 1) == memory.rfind(b"needle", 0, at + 5) == -1
            memory[at : at + 6] = bytes(6)


def test_moving_long_and_overlapping(client):
    size = 1 << 20
    content = bytearray(words(size))
    with client.anonymous(size) as memory:
        memory[:] = content
        for to, source, count in [(1, 0, size - 1), (0, 1, size - 1), (100_000, 3, 500_000), (3, 100_000, 500_000)]:
            content[to : to + count] = content[source : source + count]
            memory.move(to, source, count)
            assert memory[:] == content


def test_threads_that_read_share_the_position(client):
    with client.anonymous(1 << 20) as memory:
        memory[:] = words(1 << 20)
        parts: list[bytes] = []

        def work() -> None:
            while part := memory.read(1000):
                parts.append(part)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert b"".join(sorted(parts, key=words(1 << 20).index)) == words(1 << 20)


def test_others_run_while_a_page_is_fetched(kernels, connect, folder):
    path = folder / "file"
    path.write_bytes(words(20 * PAGE))
    kernel = kernels()
    with connect(kernel, grace=60).open(path) as mapping:
        stop(kernel.pid)
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(mapping[:]))
        reader.start()
        # This thread goes on, though the other's page does not come; and so it does at a search.
        assert not got
        searcher = threading.Thread(target=lambda: got.append(bytes([mapping.find(b"nowhere") & 255])))
        searcher.start()
        searcher.join(0.2)
        assert searcher.is_alive()
        os.kill(kernel.pid, signal.SIGCONT)
        reader.join()
        searcher.join()
        assert sorted(got) == sorted([words(20 * PAGE), b"\xff"])


def test_closing_waits_for_accesses_and_not_for_ever(kernels, connect, folder, script):
    path = folder / "file"
    path.write_bytes(words(20 * PAGE))
    kernel = kernels()
    mapping = connect(kernel, grace=60).open(path)
    stop(kernel.pid)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(mapping[:]))
    reader.start()
    reader.join(0.1)
    assert reader.is_alive()
    closer = threading.Thread(target=mapping.close)
    closer.start()
    closer.join(0.1)
    assert closer.is_alive()
    with pytest.raises(ValueError, match="closed"):
        mapping[0]
    os.kill(kernel.pid, signal.SIGCONT)
    reader.join()
    closer.join()
    assert got == [words(20 * PAGE)]
    assert mapping.closed


def test_without_copies_to_others(client, folder):
    path = folder / "file"
    path.write_bytes(words(20 * PAGE))
    with client.anonymous(PAGE) as memory:
        array = numpy.from_dlpack(memory)
        array[5] = 7
        assert memory[5] == 7
        assert array.ctypes.data == numpy.asarray(memory).ctypes.data
        with pytest.raises(BufferError):
            memory.close()
        del array
    with client.open(path) as mapping:
        with pytest.raises(TypeError):
            pickle.dumps(mapping)
        pyarrow = pytest.importorskip("pyarrow")
        buffer = pyarrow.py_buffer(mapping)
        assert buffer.size == 20 * PAGE
        assert buffer.address == numpy.asarray(mapping).ctypes.data
        del buffer


def test_torch_reads_it(client):
    torch = pytest.importorskip("torch")
    with client.anonymous(PAGE) as memory:
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        tensor[3] = 9
        assert memory[3] == 9
        assert torch.from_numpy(numpy.asarray(memory)).data_ptr() == tensor.data_ptr()
        assert torch.from_dlpack(memory).data_ptr() == tensor.data_ptr()
        del tensor


def test_what_is_opened_anew_replaces_what_was_there(client, folder: Path):
    path = folder / "new"
    with client.open(path, "w+", 10, PAGE) as mapping:
        assert bytes(mapping) == bytes(PAGE)
        mapping[:3] = b"abc"
        assert mapping.mode == "r+"
    assert path.read_bytes() == bytes(10) + b"abc" + bytes(PAGE - 3)
    with client.open(path, "w+", 0, 5) as mapping:
        assert bytes(mapping) == bytes(5)
    assert path.read_bytes() == bytes(5)
    with pytest.raises(ValueError, match="needs a length"):
        client.open(path, "w+")
    assert path.read_bytes() == bytes(5)


def test_a_file_grows_where_it_is_opened_past_its_end(client, folder: Path):
    path = folder / "file"
    for content in (b"", b"abc", words(3 * PAGE + 5)):
        path.write_bytes(content)
        with client.open(path, "r+", 2, 4 * PAGE) as mapping:
            assert bytes(mapping) == (content + bytes(5 * PAGE))[2 : 4 * PAGE + 2]
            mapping[-1] = 7
        assert path.read_bytes() == (content + bytes(5 * PAGE))[: 4 * PAGE + 1] + b"\x07"


def test_private_copies_stay_private(client, folder: Path):
    path = folder / "file"
    content = words(10 * PAGE)
    path.write_bytes(content)
    path.chmod(0o400)
    with client.open(path, "c") as mine, client.open(path) as others, client.open(path, "c") as third:
        mine[5:10] = b"mine!"
        mine[9 * PAGE] = 255
        assert mine[:12] == content[:5] + b"mine!" + content[10:12]
        mine.flush()
        assert bytes(others) == bytes(third) == content
        with pytest.raises(TypeError):
            mine.resize(5)
        with pytest.raises(vm.Unsupported):
            mine.snapshot()
    assert path.read_bytes() == content


def test_modes_and_places_that_make_no_sense(client, folder: Path):
    path = folder / "file"
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match="storage_options are for URLs"):
        client.open(path, storage_options={"a": 1})
    with pytest.raises(vm.Unsupported, match="makes files, not URLs"):
        client.open("memory://x", "w+", length=5)
    with pytest.raises(ValueError, match="not before the end"):
        client.open(path, "r+", offset=3)
    with pytest.raises(FileNotFoundError):
        client.open(folder / "none", "r+", length=5)
    assert not (folder / "none").exists()
