"""Nobody who only reads can damage what others read."""

from __future__ import annotations

import contextlib
import os
import stat as stat_module

import pytest
from vm_support import PAGE, words

from k42 import vm

PAGES = 40


def test_a_page_made_writable_is_a_private_copy(shared_kernel, folder, script):
    kernel = shared_kernel
    content = words(PAGES * PAGE)
    path = folder / "file"
    path.write_bytes(content)
    code = """
        import ctypes, numpy
        socket, path = sys.argv[1:]
        libc = ctypes.CDLL(None, use_errno=True)
        client = vm.connect(socket)
        mapping = client.open(path)
        address = numpy.asarray(mapping).ctypes.data
        size = len(mapping)
        mapping[: size // 2]  # half is resident, half is not
        if libc.mprotect(ctypes.c_void_p(address), size, 3):
            say("refused")
        else:
            ctypes.memset(address, 0xEE, size)
            say("written", bytes(mapping) == b"\\xee" * size)
        sys.stdin.readline()
        client.close()
        """
    with vm.connect(kernel.socket) as other, other.open(path) as mapping:
        assert mapping[:PAGE] == content[:PAGE]
        vandal = script(code, kernel.socket, path)
        assert vandal.line() in ("written True", "refused")
        assert bytes(mapping) == content  # mapped before
        with other.open(path) as fresh:
            assert bytes(fresh) == content  # mapped after
        with vm.connect(kernel.socket) as third, third.open(path) as newest:
            assert bytes(newest) == content
        vandal.tell()
        vandal.good()
    assert path.read_bytes() == content


def memfds() -> set[tuple[int, int]]:
    """This process's descriptors of frames, with their inodes."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:k42:"):
                found.add((int(name), os.fstat(int(name)).st_ino))
    return found


def test_the_descriptor_of_the_frames(client, folder):
    content = words(PAGES * PAGE)
    path = folder / "file"
    path.write_bytes(content)
    before = memfds()  # of caches that other tests had in this process
    with client.open(path) as mapping:
        assert bytes(mapping) == content
        sent = memfds() - before
        assert sent
        for memfd, _ in sent:
            with pytest.raises(OSError, match=r"Bad file|Invalid"):
                os.write(memfd, b"x")
            with pytest.raises(OSError, match=r"Bad file|Invalid"):
                os.pwrite(memfd, b"x", 0)
            with pytest.raises(OSError, match=r"Bad file|Invalid"):
                os.ftruncate(memfd, 0)
            with pytest.raises(OSError, match=r"Bad file|Invalid"):
                os.posix_fallocate(memfd, 0, 2 * PAGES * PAGE)
            # Root may open what it likes; for others the file's mode counts.
            assert stat_module.S_IMODE(os.fstat(memfd).st_mode) & 0o222 == 0
        assert bytes(mapping) == content
        with client.open(path) as fresh:
            assert bytes(fresh) == content
