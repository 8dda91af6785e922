"""What a process may have of userfaultfd, and what it is told when that is not all."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest
from vm_support import PAGE, words

ARCHITECTURES = {"x86_64": (0xC000003E, 323), "aarch64": (0xC00000B7, 282)}

# A filter as containers have it: the call is not permitted, nor the way by the device.
FILTER = """
    import ctypes, struct
    def forbid(architecture, number, error):
        def statement(code, k, yes=0, no=0):
            return struct.pack("HBBI", code, yes, no, k)
        program = b"".join([
            statement(0x20, 4),  # load the architecture
            statement(0x15, architecture, 0, 5),
            statement(0x20, 0),  # load the number of the call
            statement(0x15, number, 4, 0),
            statement(0x20, 24),  # load the second argument
            statement(0x15, 0xAA00, 2, 0),  # USERFAULTFD_IOC_NEW
            statement(0x06, 0x7FFF0000),  # allow
            statement(0x06, 0x7FFF0000),
            statement(0x06, 0x00050000 | error),
        ])
        buffer = ctypes.create_string_buffer(program, len(program))
        filter = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
        assert libc.prctl(22, 2, filter) == 0, ctypes.get_errno()  # PR_SET_SECCOMP
    """


@pytest.mark.skipif(os.uname().machine not in ARCHITECTURES, reason="the filter is for x86-64 and ARM64")
@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
def test_forbidden_by_seccomp(shared_kernel, script, folder, error):
    (folder / "file").write_bytes(words(PAGE))
    code = f"""
        import errno
        client = vm.connect(sys.argv[1])
        forbid(*{ARCHITECTURES[os.uname().machine]}, errno.{error})
        for use in (lambda: client.open(sys.argv[2]), lambda: client.anonymous(1)):
            try:
                use()
            except vm.Unsupported as error:
                say(str(error).replace(chr(10), " "))
        say([c["regions"] for c in client.stat()["clients"] if c["pid"] == os.getpid()])
        """
    forbidden = script(textwrap.dedent(FILTER) + textwrap.dedent(code), shared_kernel.socket, folder / "file")
    for _ in range(2):
        message = forbidden.line()
        assert message.startswith("no permission for userfaultfd")
        for cure in ("CAP_SYS_PTRACE", "vm.unprivileged_userfaultfd=1", "/dev/userfaultfd", "seccomp"):
            assert cure in message
    assert forbidden.line() == "[0]"
    forbidden.good()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to give privileges up and to hide /dev/userfaultfd")
def test_user_mode_only(shared_kernel, script, folder):
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("vm.unprivileged_userfaultfd is set: everybody has the full mode here")
    content = words(50 * PAGE)
    (folder / "file").write_bytes(content)
    code = """
        import ctypes, struct, warnings
        libc = ctypes.CDLL(None, use_errno=True)
        wanted = open(sys.argv[2], "rb").read()
        if libc.unshare(0x20000) or libc.mount(b"none", b"/", None, 0x44000, None):  # a mount table of our own
            say("skip: cannot have a mount table of its own:", os.strerror(ctypes.get_errno()))
            sys.exit()
        if libc.mount(b"none", b"/dev", b"tmpfs", 0, None):
            say("skip: cannot hide /dev:", os.strerror(ctypes.get_errno()))
            sys.exit()
        header = struct.pack("II", 0x20080522, 0)
        data = ctypes.create_string_buffer(24)
        assert libc.capget(header, data) == 0
        sets = list(struct.unpack("6I", data.raw))
        for i in range(3):
            sets[i] &= ~(1 << 19)  # CAP_SYS_PTRACE
        assert libc.capset(header, struct.pack("6I", *sets)) == 0
        client = vm.connect(sys.argv[1])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mapping = client.open(sys.argv[2])
        say([w.category.__name__ for w in caught])
        say(str(caught[0].message).replace(chr(10), " "))
        say(bytes(mapping) == wanted)
        memory = client.anonymous(1 << 20)
        memory[5] = 1
        say(memory[:10] == bytes(5) + b"\\1" + bytes(4))
        with client.open(sys.argv[2], offset=4096) as fresh, open("/dev/out", "wb", buffering=0) as out:
            try:
                out.write(fresh)
            except OSError as error:
                say(error.strerror)
        """
    restricted = script(code, shared_kernel.socket, folder / "file")
    first = restricted.line()
    if first.startswith("skip"):
        pytest.skip(first)
    assert first == "['UserModeOnlyWarning']"
    message = restricted.line()
    assert "in user mode only" in message
    assert "CAP_SYS_PTRACE" in message
    assert restricted.line() == "True"
    assert restricted.line() == "True"
    assert restricted.line() == "Bad address"  # the system call fails; it never writes a wrong byte
    restricted.good()
