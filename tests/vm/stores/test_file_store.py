from __future__ import annotations

import errno
import itertools
import os
import pickle
import resource
import threading

import pytest
from stores_support import PAGE, Frames, padded, words

import k42
from k42 import vm
from k42.vm import protocol
from k42.vm.fr import FileFR, ZeroFR


@pytest.fixture
def opened(folder):
    """Makes a file of some content and its FR."""
    made = []

    def make(content: bytes, flags: int = os.O_RDONLY):
        path = folder / f"file{len(made)}"
        path.write_bytes(content)
        made.append(FileFR.create(os.open(path, flags), str(path)))
        return path, made[-1]

    yield make
    for fr in made:
        fr.close()
        k42.destroy(fr)


@pytest.mark.parametrize("size", [1, 100, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 7, (1 << 20) + 5, (3 << 20) + PAGE + 1])
def test_all_pages_of_any_size(opened, frames, size):
    _, fr = opened(words(size))
    pages = -(-size // PAGE)
    assert fr.size() == size
    assert frames(pages).filled(fr, 0, pages) == padded(words(size), pages)
    one = frames(pages)
    for page in {0, pages // 2, pages - 1}:
        assert one.filled(fr, page, 1) == padded(words(size), pages)[page * PAGE : (page + 1) * PAGE]


def test_pages_past_the_end_are_zeros(opened, frames):
    _, fr = opened(words(PAGE + 10))
    assert frames(600).filled(fr, 0, 600) == padded(words(PAGE + 10), 600)
    assert frames(600).filled(fr, 2, 598) == bytes(598 * PAGE)


def test_a_large_read_of_what_linux_has_not_cached(opened, frames):
    content = words((4 << 20) + 123)
    path, fr = opened(content)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    for _ in range(3):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        assert frames(1025).filled(fr, 0, 1025) == padded(content, 1025)
        os.pread(descriptor, 100 * PAGE, 256 * PAGE)  # partly
        assert frames(1025).filled(fr, 3, 1022) == padded(content, 1025)[3 * PAGE :]
    os.close(descriptor)


def test_what_is_written_back_is_in_the_file_and_nothing_past_its_end(opened, frames):
    path, fr = opened(words(3 * PAGE + 7), os.O_RDWR)
    memory = frames(4)
    new = words(4 * PAGE, 1)
    memory.put(new)
    fr.write_back(memory.memfd, 1, 1)
    fr.write_back(memory.memfd, 3, 1)
    fr.sync()
    expected = words(3 * PAGE + 7)
    expected = expected[:PAGE] + new[PAGE : 2 * PAGE] + expected[2 * PAGE : 3 * PAGE] + new[3 * PAGE : 3 * PAGE + 7]
    assert path.read_bytes() == expected
    fr.write_back(memory.memfd, 0, 4)
    assert path.read_bytes() == new[: 3 * PAGE + 7]


def test_a_large_write_back(opened, frames):
    path, fr = opened(bytes((5 << 20) + 9), os.O_RDWR)
    memory = frames(1281)
    memory.put(words(1281 * PAGE))
    fr.write_back(memory.memfd, 0, 1281)
    assert path.read_bytes() == words((5 << 20) + 9)


def test_resize(opened, frames):
    path, fr = opened(words(2 * PAGE), os.O_RDWR)
    fr.resize(5 * PAGE + 3)
    assert fr.size() == path.stat().st_size == 5 * PAGE + 3
    assert frames(6).filled(fr, 0, 6) == padded(words(2 * PAGE), 6)
    fr.resize(100)
    assert fr.size() == path.stat().st_size == 100
    assert frames(6).filled(fr, 0, 6) == padded(words(100), 6)
    assert not fr.changed()
    with pytest.raises(vm.StoreError) as refused:
        fr.resize(1 << 62)
    assert refused.value.errno in (errno.EFBIG, errno.EINVAL)
    assert fr.size() == path.stat().st_size == 100


def test_a_reader_refuses_to_write(opened, frames):
    path, fr = opened(words(PAGE))
    assert not fr.writable()
    for call in (lambda: fr.write_back(frames(1).memfd, 0, 1), lambda: fr.resize(0)):
        with pytest.raises(vm.Unsupported, match="reading only"):
            call()
    assert path.read_bytes() == words(PAGE)


def test_a_writer_joins_readers(opened, frames):
    path, fr = opened(words(4 * PAGE))
    number = fr.native_descriptor()
    other = path.with_name("other")
    other.write_bytes(b"x")
    for wrong, flags in ((other, os.O_RDWR), (path, os.O_RDONLY), (path, os.O_WRONLY)):
        descriptor = os.open(wrong, flags)
        with pytest.raises(ValueError, match="not a descriptor"):
            fr.make_writable(descriptor)
        os.close(descriptor)
    stop = threading.Event()
    failures = []

    def read():
        memory = frames(4)
        while not stop.is_set():
            if memory.filled(fr, 0, 4) != words(4 * PAGE):
                failures.append("wrong bytes")

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(50):
        fr.make_writable(os.open(path, os.O_RDWR))
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures
    assert fr.writable()
    assert fr.native_descriptor() == number
    memory = frames(1)
    memory.put(words(PAGE, 9))
    fr.write_back(memory.memfd, 0, 1)
    assert path.read_bytes() == words(PAGE, 9) + words(4 * PAGE)[PAGE:]


@pytest.mark.parametrize("size", [0, 100, PAGE])
def test_a_truncated_file(opened, frames, size):
    path, fr = opened(words(3 * PAGE), os.O_RDWR)
    os.truncate(path, size)
    memory = frames(3)
    with pytest.raises(vm.StoreError, match=f"it ends at {size} bytes, .* was truncated") as short:
        memory.filled(fr, 0, 3)
    assert (short.value.url, short.value.offset) == (str(path), 0)
    memory.put(words(3 * PAGE, 1))
    with pytest.raises(vm.StoreError, match=f"it has {size} bytes, not {3 * PAGE}: it was truncated"):
        fr.write_back(memory.memfd, 1, 1)
    assert path.stat().st_size == size
    assert fr.changed()
    path.write_bytes(words(3 * PAGE, 2))  # it is whole again
    assert frames(3).filled(fr, 0, 3) == words(3 * PAGE, 2)


def test_what_others_change_shows_in_the_version_and_what_we_write_does_not(opened, frames):
    path, fr = opened(words(2 * PAGE), os.O_RDWR)
    memory = frames(2)
    memory.put(words(2 * PAGE, 1))
    first = fr.version()
    fr.write_back(memory.memfd, 0, 2)
    assert not fr.changed()
    second = fr.version()
    assert hash(second) != hash(first)
    with open(path, "r+b") as other:
        other.write(b"other")
    assert fr.changed()
    fr.write_back(memory.memfd, 0, 2)
    assert fr.changed()  # for good: some page may be from before
    assert fr.version() == second


def test_what_is_read_at_once_was_there_at_once(opened, frames):
    """Others write page after page: a read sees the new content up to some byte, and the one before from there on."""
    path, fr = opened(bytes(32 * PAGE))
    stop = threading.Event()

    def write():
        descriptor = os.open(path, os.O_RDWR)
        for value in itertools.cycle(range(1, 200)):
            for page in range(32):
                os.pwrite(descriptor, bytes([value]) * PAGE, page * PAGE)
            if stop.wait(0.002):
                break
        os.close(descriptor)

    writer = threading.Thread(target=write)
    writer.start()
    memory = frames(32)
    good = 0
    try:
        while good < 200:
            try:
                data = memory.filled(fr, 0, 32)
            except vm.StoreError:  # they write all the time
                continue
            good += 1
            new = data[0]
            rest = data.lstrip(bytes([new]))
            assert len(set(rest)) <= 1
            assert not rest or new in (rest[0] + 1, 1)
    finally:
        stop.set()
        writer.join()


def test_our_own_writes_are_no_changes(opened, frames):
    """Threads write pages back, each its own, while others are filled: nothing fails, and no version is lost."""
    path, fr = opened(words(40 * PAGE), os.O_RDWR)
    stop = threading.Event()
    failures = []

    def write(me):
        memory = Frames(40)
        seed = 0
        while not stop.is_set():
            seed += 1
            memory.put(words(40 * PAGE, seed))
            fr.write_back(memory.memfd, me * 10, 10)
        memory.close()

    writers = [threading.Thread(target=write, args=(me,)) for me in range(2)]
    for writer in writers:
        writer.start()
    memory = frames(40)
    try:
        for n in range(300):
            if memory.filled(fr, 20 + n % 20, 1) != words(40 * PAGE)[(20 + n % 20) * PAGE : (21 + n % 20) * PAGE]:
                failures.append(n)
            if fr.changed():
                failures.append("changed")
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert not failures
    assert path.stat().st_size == 40 * PAGE


def test_linux_refuses(opened, frames):
    path, fr = opened(words(PAGE), os.O_RDWR)
    memory = frames(4)
    with pytest.raises(vm.StoreError) as error:
        fr.fill(999999, 0, 1)
    assert error.value.errno == errno.EBADF
    assert isinstance(error.value.__cause__, OSError)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    fr.resize(4 * PAGE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE, hard))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(vm.StoreError, match="EFBIG") as error:
            fr.write_back(memory.memfd, 2, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (error.value.url, error.value.offset, error.value.errno) == (str(path), 2 * PAGE, errno.EFBIG)
    fr.write_back(memory.memfd, 0, 1)  # and again


def test_zeros(frames):
    fr = ZeroFR.create(10 * PAGE)
    memory = frames(10)
    fr.fill(memory.memfd, 2, 3)
    assert os.fstat(memory.memfd).st_blocks * 512 == 3 * PAGE
    assert os.pread(memory.memfd, 10 * PAGE, 0) == bytes(10 * PAGE)
    assert not fr.writable()
    fr.close()
    k42.destroy(fr)


@pytest.mark.parametrize(
    "error",
    [
        vm.StoreError("gone"),
        vm.StoreError("it is short", url="http://127.0.0.1/x", offset=1 << 40),
        vm.StoreError("No space left on device", url="/a/b", offset=0, errno=errno.ENOSPC),
    ],
)
def test_a_store_error_is_the_same_on_any_way(error):
    told = protocol.to_error(protocol.to_reply(error))
    for other in (told, pickle.loads(pickle.dumps(error))):
        assert type(other) is vm.StoreError
        assert str(other) == str(error)
        assert (other.url, other.offset, other.errno) == (error.url, error.offset, error.errno)
        assert error.url in str(other)
        assert error.offset is None or str(error.offset) in str(other)
        assert error.errno is None or "ENOSPC" in str(other)


def test_a_store_error_from_who_does_not_keep_to_the_protocol():
    told = protocol.to_error({"error": "store", "message": 5, "url": [], "offset": "x", "errno": True})
    assert isinstance(told, vm.StoreError)
    assert (told.offset, told.errno) == (None, None)
