from __future__ import annotations

import os
import re
import signal

import pytest
from vm_support import PAGE, until, words

from k42 import vm


@pytest.mark.parametrize("same_size", [True, False])
def test_a_file_that_is_written_between_two_openings(client, folder, same_size):
    path = folder / "file"
    for round_ in range(5):
        content = words(50 * PAGE + (0 if same_size else round_), seed=round_)
        path.write_bytes(content)  # in place
        with client.open(path) as mapping:
            assert bytes(mapping) == content


def test_a_file_that_is_replaced(client, folder):
    path = folder / "file"
    old, new = words(50 * PAGE, 1), words(50 * PAGE, 2)
    path.write_bytes(old)
    with client.open(path) as mapping:
        assert mapping[:PAGE] == old[:PAGE]
        (folder / "new").write_bytes(new)
        os.replace(folder / "new", path)
        with client.open(path) as other:
            assert bytes(other) == new
            assert bytes(mapping) == old  # what was opened stays what it was


def test_old_pages_go_when_nobody_maps_them(kernels, connect, folder):
    client = connect(kernels())
    path = folder / "file"
    for seed in range(5):
        path.write_bytes(words(100 * PAGE, seed))
        with client.open(path) as mapping:
            assert bytes(mapping) == words(100 * PAGE, seed)
            # What was closed just before is closed by another thread.
            until(lambda: client.stat()["frames"]["file"] == 100 and len(client.stat()["files"]) == 1, "the old go")


def test_a_file_that_is_removed(client, folder):
    path = folder / "file"
    content = words(50 * PAGE)
    path.write_bytes(content)
    with client.open(path) as mapping:
        path.unlink()
        assert bytes(mapping) == content


TOUCH = """
    socket, path = sys.argv[1:]
    client = vm.connect(socket)
    mapping = memoryview(client.open(path))  # raw memory: the mapping's own accesses would raise
    say(mapping[0])
    sys.stdin.readline()
    say(mapping[5])  # resident
    say(mapping[3 << 20])
    """


@pytest.mark.parametrize("size", [0, 1 << 20, (3 << 20) + 5])
def test_a_file_that_is_truncated_while_it_is_mapped(client, shared_kernel, script, folder, size):
    kernel = shared_kernel
    path = folder / "file"
    content = words(4 << 20)
    path.write_bytes(content)
    reader = script(TOUCH, kernel.socket, path)
    assert reader.line() == "1"
    os.truncate(path, size)
    reader.tell()
    assert reader.line() == "0"
    assert reader.finish() == -signal.SIGBUS
    assert reader.rest() == ""  # zeros would be a wrong byte
    message = rf"k42: bus error in the mapping of {path}, offset {3 << 20} \(address 0x[0-9a-f]+\): "
    assert re.search(rf"{message}{path}.* was truncated", reader.stderr())
    # Others are served as before.
    other = folder / "other"
    other.write_bytes(content)
    with client.open(other) as mapping:
        assert bytes(mapping) == content


def test_a_truncated_file_in_a_page_that_only_lost_its_end(shared_kernel, script, folder):
    kernel = shared_kernel
    path = folder / "file"
    path.write_bytes(words(2 * PAGE + 100))
    code = """
        mapping = memoryview(vm.connect(sys.argv[1]).open(sys.argv[2]))
        say("ready")
        sys.stdin.readline()
        say(mapping[2 * 4096 + 99])
        """
    reader = script(code, kernel.socket, path)
    reader.line()
    os.truncate(path, 2 * PAGE + 50)
    reader.tell()
    assert reader.finish() == -signal.SIGBUS
    assert "was truncated" in reader.stderr()
    # Opened again it is what it is now.
    with vm.connect(kernel.socket) as client, client.open(path) as mapping:
        assert bytes(mapping) == words(2 * PAGE + 50)


def test_a_failed_page_is_tried_again_by_the_next(kernels, script, folder, connect):
    kernel = kernels()
    path = folder / "file"
    content = words(4 << 20)
    path.write_bytes(content)
    client = connect(kernel)
    mapping = client.open(path)
    reader = script(TOUCH, kernel.socket, path)
    reader.line()
    os.truncate(path, 1 << 20)
    reader.tell()
    assert reader.finish() == -signal.SIGBUS
    path.write_bytes(content)
    assert bytes(mapping) == content
    assert client.stat()["frames"]["file"] == 1024
    mapping.close()
