"""A page that cannot be had: accesses of the mapping's own raise, and go on when the store has recovered; an access
through a pointer ends in SIGBUS."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from vm_support import PAGE, words

from k42 import vm

SIZE = 20 * PAGE


@pytest.fixture
def path(folder: Path) -> Path:
    made = folder / "file"
    made.write_bytes(words(SIZE))
    return made


def cut(path: Path, pages: int) -> None:
    os.truncate(path, pages * PAGE)


def mend(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(words(SIZE))


@pytest.mark.parametrize(
    "access",
    [
        lambda m: m[15 * PAGE + 5],
        lambda m: m[:],
        lambda m: m[::-1],
        lambda m: m[::PAGE],
        lambda m: m.find(b"not there"),
        lambda m: m.rfind(b"not there"),
        lambda m: m.read(),
        lambda m: m.readline(),
        lambda m: 300 in m,
        lambda m: b"\xff" in m,
        list,
    ],
)
def test_reading_raises_until_the_store_has_recovered(client, path, access):
    with client.open(path) as mapping:
        cut(path, 0)
        mapping.seek(12 * PAGE)
        for _ in range(3):
            with pytest.raises(vm.StoreError) as caught:
                access(mapping)
            assert caught.value.url == str(path)
            assert caught.value.offset in range(SIZE)
            assert "truncated" in caught.value.reason
            assert mapping.tell() == 12 * PAGE
        mend(path)
        access(mapping)
        assert mapping[:] == words(SIZE)


@pytest.mark.parametrize(
    "access",
    [
        lambda m: m.__setitem__(15 * PAGE, 1),
        lambda m: m.__setitem__(slice(None), bytes(SIZE)),
        lambda m: m.write(bytes(SIZE - 5)),
        lambda m: m.write_byte(1),
        lambda m: m.move(0, PAGE, SIZE - PAGE),
        lambda m: m.move(PAGE, 0, SIZE - PAGE),
    ],
)
def test_writing_raises_until_the_store_has_recovered(client, path, access):
    with client.open(path, "c") as mapping:
        cut(path, 0)
        for _ in range(3):
            with pytest.raises(vm.StoreError, match="truncated"):
                access(mapping)
            assert mapping.tell() == 0
        mend(path)
        wanted = bytearray(words(SIZE))
        with client.open(path, "c") as fresh:
            access(fresh)
            wanted[:] = fresh[:]
        access(mapping)
        assert mapping[:] == wanted


def test_no_memory_is_left_and_nothing_is_said(client, path, capfd):
    with client.open(path) as mapping:
        cut(path, 0)
        for _ in range(100):
            with pytest.raises(vm.StoreError):
                mapping[5 * PAGE : 6 * PAGE]
    assert capfd.readouterr().err == ""


def test_it_is_python_s_own_kind_of_error(client, path):
    with client.open(path, offset=PAGE + 5) as mapping:
        cut(path, 0)
        with pytest.raises(OSError, match=f"^{path}, offset [0-9]+: it ends at 0 bytes"):
            mapping[7 * PAGE]


def test_a_mark_from_an_access_of_others(client, path):
    # A system call that is given the memory fails with EFAULT and leaves the page marked as failed.
    with client.open(path) as mapping:
        cut(path, 0)
        read, write = os.pipe()
        with memoryview(mapping) as view, pytest.raises(OSError, match="Bad address"):
            os.write(write, view[12 * PAGE : 12 * PAGE + 10])
        mend(path)
        # Nothing has failed since: the page is asked for anew, at once.
        assert mapping[12 * PAGE : 13 * PAGE] == words(SIZE)[12 * PAGE : 13 * PAGE]
        with memoryview(mapping) as view:
            assert os.write(write, view[12 * PAGE : 12 * PAGE + 10]) == 10
        os.close(read)
        os.close(write)


def test_copies_outlive_the_failures_of_others(client, path):
    # In a mapping of copies a mark is replaced by the kernel, never dropped, which could drop a copy.
    content = bytearray(words(SIZE))
    with client.open(path, "c", page_size=4 * PAGE) as mapping:
        cut(path, 0)
        with pytest.raises(vm.StoreError):
            mapping[0]
        mend(path)
        for page in (3, 1, 0, 2):
            mapping[page * PAGE] = content[page * PAGE] = 7
        assert mapping[:] == content
        with client.open(path, "c") as other:
            cut(path, 6)
            for page in (0, 10, 15):
                with pytest.raises(vm.StoreError):
                    other[page * PAGE : (page + 1) * PAGE] if page else other[:]
            assert mapping[:] == content


def test_many_threads_on_pages_that_fail_and_recover(client, path):
    # Everyone gets right bytes or an error, whatever the others do to the same pages; in private copies, no write of
    # anybody is lost.
    content = words(SIZE)
    errors: list[BaseException] = []
    ending = threading.Event()
    with client.open(path, "c") as mapping, client.open(path) as reader:

        def work(number: int) -> None:
            writes = 0
            try:
                while not ending.is_set():
                    for page in range(20):
                        at = page * PAGE + 64 * number + 8
                        try:
                            assert reader[at : at + 8] == content[at : at + 8]
                            if writes:
                                assert mapping[at : at + 8] in (content[at : at + 8], b"%8d" % number)
                            mapping[at : at + 8] = b"%8d" % number
                            assert mapping[at : at + 8] == b"%8d" % number
                            writes += 1
                        except vm.StoreError:
                            pass
                for page in range(20):
                    at = page * PAGE + 64 * number + 8
                    mapping[at : at + 8] = b"%8d" % number
                    assert mapping[at : at + 8] == b"%8d" % number
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        cut(path, 0)
        for thread in threads:
            thread.start()
        for pages in (10, 0, 20, 5, 20):
            ending.wait(0.05)
            mend(path)
            cut(path, pages)
        ending.set()
        for thread in threads:
            thread.join()
        mend(path)
        assert not errors
        wanted = bytearray(content)
        for page in range(20):
            for number in range(4):
                at = page * PAGE + 64 * number + 8
                wanted[at : at + 8] = b"%8d" % number
        assert mapping[:] == wanted


def test_through_a_pointer_it_is_a_bus_error(shared_kernel, path, script):
    code = """
        import ctypes, numpy
        socket, path = sys.argv[1:]
        mapping = vm.connect(socket).open(path)
        address = numpy.asarray(mapping).ctypes.data
        os.truncate(path, 4096)
        try:
            mapping[:]
        except vm.StoreError as error:
            say("raised")
        ctypes.string_at(address + 5 * 4096, 1)
        """
    process = script(code, shared_kernel.socket, path)
    assert process.line() == "raised"
    assert process.finish() == -signal.SIGBUS
    assert f"k42: bus error in the mapping of {path}, offset {5 * PAGE}" in process.stderr()
    assert "truncated" in process.stderr()


def test_faulthandler_still_sees_what_is_a_crash(shared_kernel, path, script):
    # It may be enabled before, or after the first mapping.
    code = """
        import ctypes, faulthandler, numpy
        socket, path, when = sys.argv[1:]
        if when == "before": faulthandler.enable()
        mapping = vm.connect(socket).open(path)
        if when != "before": faulthandler.enable()
        address = numpy.asarray(mapping).ctypes.data
        os.truncate(path, 4096)
        if when != "after, unseen":
            try:
                mapping[:]
            except vm.StoreError as error:
                say("raised")
        ctypes.string_at(address + 5 * 4096, 1)
        """
    for when in ("before", "after", "after, unseen"):
        process = script(code, shared_kernel.socket, path, when)
        assert process.finish() == -signal.SIGBUS
        said = process.stderr()
        assert "Fatal Python error: Bus error" in said
        assert process.rest() == ("" if when == "after, unseen" else "raised\n")
        # One that came after us and that we have not seen yet gets the signal without us.
        assert ("k42: bus error in the mapping" in said) is (when != "after, unseen")
        path.write_bytes(words(SIZE))


def test_when_the_kernel_is_gone(kernels, path):
    kernel = kernels()
    client = vm.connect(kernel.socket, grace=0.1)
    mapping = client.open(path)
    assert mapping[:PAGE] == words(SIZE)[:PAGE]
    kernels.kill(kernel)
    for _ in range(3):
        with pytest.raises(vm.KernelUnavailable, match="is gone and none took over"):
            mapping[:]
    with pytest.raises(vm.KernelUnavailable):
        mapping.prefetch()
    mapping.close()
