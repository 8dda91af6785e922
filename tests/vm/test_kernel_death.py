"""Never a wrong byte: when the kernel dies, a client waits, then ends with SIGBUS and says why."""

from __future__ import annotations

import re
import signal

import pytest
from vm_support import PAGE, until, words

from k42 import vm

FAULTING = """
    import random, zlib
    socket, path, count, page_size = sys.argv[1:]
    wanted = open(path, "rb").read()
    chunk = 8192  # large enough that crc32 lets the other threads run
    right = [zlib.crc32(wanted[at : at + chunk]) for at in range(0, len(wanted), chunk)]
    client = vm.connect(socket, grace=0.5)
    mapping = client.open(path, page_size=int(page_size))
    view = memoryview(mapping)
    read = [0] * int(count)
    def work(me):
        chosen = random.Random(me)
        while True:
            i = chosen.randrange(len(right))
            if zlib.crc32(view[i * chunk : (i + 1) * chunk]) != right[i]:
                os.write(1, b"WRONG\\n")
            read[me] += 1
            if read[me] == 200:
                os.write(1, b"busy\\n")
    for me in range(int(count)):
        threading.Thread(target=work, args=(me,), daemon=True).start()
    signal.pause()
    """
GONE = r"the kernel \(k42 serve\) that served it is gone and none took over"


@pytest.mark.parametrize(("threads", "page_size"), [(1, 65536), (4, 4096)])
def test_threads_that_fault_when_the_kernel_is_killed(kernels, script, folder, threads, page_size):
    kernel = kernels(1 << 20)  # an eighth of the file: nearly every access faults
    path = folder / "file"
    path.write_bytes(words(8 << 20))
    faulting = script(FAULTING, kernel.socket, path, threads, page_size)
    for _ in range(threads):
        assert faulting.line() == "busy"
    kernels.kill(kernel)
    assert faulting.finish() == -signal.SIGBUS
    assert faulting.rest() == ""
    messages = faulting.stderr().splitlines()
    assert messages
    for message in messages:
        found = re.fullmatch(
            rf"k42: bus error in the mapping of (.*), offset (\d+) \(address 0x[0-9a-f]+\): {GONE}", message
        )
        assert found, message
        assert found[1] == str(path)
        assert int(found[2]) < 8 << 20


def test_anonymous_memory_when_the_kernel_is_killed(kernels, script):
    kernel = kernels()
    code = """
        client = vm.connect(sys.argv[1], grace=0.5)
        memory = client.anonymous(100 * 4096)
        memory[: 50 * 4096] = b"x" * (50 * 4096)
        say("written")
        sys.stdin.readline()
        say(memory[: 50 * 4096] == b"x" * (50 * 4096))
        say(memoryview(memory)[60 * 4096])  # raw memory: the mapping's own accesses would raise
        """
    writer = script(code, kernel.socket)
    assert writer.line() == "written"
    kernels.kill(kernel)
    writer.tell()
    assert writer.line() == "True"
    assert writer.finish() == -signal.SIGBUS
    assert writer.rest() == ""
    assert re.search(rf"mapping of anonymous memory, offset {60 * PAGE} .*: {GONE}", writer.stderr())


def test_what_was_mapped_stays_readable(kernels, script, folder):
    kernel = kernels()
    path = folder / "file"
    path.write_bytes(words(2 << 20))
    code = """
        socket, path = sys.argv[1:]
        wanted = open(path, "rb").read()
        client = vm.connect(socket, grace=0.1)
        mapping = client.open(path)
        assert bytes(mapping) == wanted
        say("read")
        sys.stdin.readline()
        for _ in range(20):
            assert bytes(mapping) == wanted
        for use in (client.stat, lambda: client.open(path), lambda: client.anonymous(1)):
            try:
                use()
            except vm.KernelUnavailable as error:
                say(error)
        with vm.connect(sys.stdin.readline().strip()) as new, new.open(path) as again:
            assert bytes(again) == wanted == bytes(mapping)
        mapping.close()
        client.close()
        say("closed")
        """
    reader = script(code, kernel.socket, path)
    assert reader.line() == "read"
    kernels.kill(kernel)
    reader.tell()
    for _ in range(3):
        assert "the kernel has gone away" in reader.line()
    reader.tell(str(kernels().socket))
    assert reader.good() == "closed\n"


def test_a_kernel_that_is_ended_cleanly_leaves_no_wrong_byte_either(kernels, script, folder):
    kernel = kernels(1 << 20)
    path = folder / "file"
    path.write_bytes(words(8 << 20))
    faulting = script(FAULTING, kernel.socket, path, 2, 4096)
    for _ in range(2):
        assert faulting.line() == "busy"
    assert kernel.stop() == 0
    assert faulting.finish() == -signal.SIGBUS
    assert faulting.rest() == ""
    assert re.search(r"k42: bus error in the mapping of .*: ", faulting.stderr())


def test_a_fault_handler_of_the_program_still_runs(kernels, script, folder):
    kernel = kernels(1 << 20)
    path = folder / "file"
    path.write_bytes(words(2 << 20))
    code = """
        import faulthandler
        faulthandler.enable()
        client = vm.connect(sys.argv[1], grace=0.1)
        mapping = client.open(sys.argv[2])
        def the_reader():
            say(mapping[0])
            sys.stdin.readline()
            memoryview(mapping)[1 << 20]
        the_reader()
        """
    reader = script(code, kernel.socket, path)
    assert reader.line() == "1"
    kernels.kill(kernel)
    reader.tell()
    assert reader.finish() == -signal.SIGBUS
    assert re.search(GONE, reader.stderr())
    assert "the_reader" in reader.stderr()


def test_closing_while_the_kernel_is_dead(kernels):
    # No wait for the grace: a program that closes does not need the kernel.
    kernel = kernels()
    client = vm.connect(kernel.socket, grace=1000)
    memory = client.anonymous(1 << 20)
    memory[0] = 1
    kernels.kill(kernel)
    memory.close()
    until(lambda: not memory.shown, "closed")
    client.close()
