"""Starting a kernel process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from k42.vm import protocol, supervisor
from k42.vm.errors import KernelUnavailable

_START_LIMIT = 30.0  # seconds


class KernelProcess:
    """A kernel started by this process.

    It is in a process group of its own, so that Ctrl-C in the terminal is the client's alone, but in the client's
    session: where Linux schedules each session as a group (``sched_autogroup``), a hand-off to another session lets
    every other runnable process in between.

    Attributes:
        socket: where it listens.
        pid: its process.
        log: the file that it logs to.
    """

    def __init__(self, process: subprocess.Popen[bytes], socket_path: Path, log: Path) -> None:
        self._process = process
        self.socket = socket_path
        self.pid = process.pid
        self.log = log

    def stop(self) -> int:
        """Ends it cleanly; its exit status (0: clean)."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self._process.wait()

    def kill(self) -> None:
        """Ends it at once, as ``kill -9`` does."""
        self._process.kill()
        self._process.wait()

    def leave(self) -> None:
        """Lets it go on without this process, which only takes note of its end."""
        threading.Thread(target=self._process.wait, name="k42-kernel-end", daemon=True).start()

    def __enter__(self) -> KernelProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def launch(
    socket: str | os.PathLike[str],
    budget: int | None = None,
    linger: float | None = None,
    *,
    all_cpus: bool = False,
    objects: str | None = None,
    adapt: bool = False,
    homing: bool = True,
    sticky: bool = True,
    swap: bool = True,
    policy: str | None = None,
    client_limit: int | None = None,
    supervise: bool = False,
) -> KernelProcess:
    """Starts ``k42 serve`` and returns when it answers.

    Args:
        socket: where it shall listen; its log stands beside it (``.log``).
        budget: bytes of memory for pages; None: a quarter of the machine's.
        linger: seconds without a client after which it ends by itself; None: never.
        all_cpus: serve every CPU of the machine, not only those that this thread may use.
        objects: what to make its objects of, as ``k42 serve --objects`` has it; None: its default.
        adapt: swap them by who uses them; see `k42.vm.adapt`.
        homing: move spans of a mapping to the CPUs of the threads that fault there.
        sticky: keep a thread on its CPU while it faults.
        swap: write anonymous memory that was made with overcommit to a swap file when frames run out.
        policy: which pages are given back first, as ``k42 serve --policy`` has it; None: its default.
        client_limit: bytes of memory that the pages of one client may take; None: no limit but the budget.
        supervise: if the kernel dies, another takes over from it, and clients notice nothing but the time it takes. The
            process is then the supervisor (`k42.vm.supervisor`), of which the kernel is a child.

    Raises:
        KernelUnavailable: it ended at once, or does not answer; the message says where its log is.
    """
    path = Path(socket)
    log = path.with_suffix(".log")
    command = [*(supervisor_command() if supervise else kernel_command()), "--socket", str(path)]
    if budget is not None:
        command += ["--budget", str(budget)]
    if linger is not None:
        command += ["--linger", str(linger)]
    if all_cpus:
        command += ["--all-cpus"]
    if objects is not None:
        command += ["--objects", objects]
    if adapt:
        command += ["--adapt"]
    if not homing:
        command += ["--no-homing"]
    if not sticky:
        command += ["--no-sticky"]
    if not swap:
        command += ["--no-swap"]
    if policy is not None:
        command += ["--policy", policy]
    if client_limit is not None:
        command += ["--client-limit", str(client_limit)]
    with open(log, "ab", opener=_private) as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0, close_fds=True
        )
    deadline = time.monotonic() + _START_LIMIT
    while not _answers(path, process.pid):
        if process.poll() is not None:
            raise KernelUnavailable(f"the kernel ended with status {process.returncode}; its log: {log}\n{_tail(log)}")
        if time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise KernelUnavailable(
                f"the kernel did not answer within {_START_LIMIT:g} s; its log: {log}\n{_tail(log)}"
            )
        time.sleep(0.01)
    return KernelProcess(process, path, log)


def kernel_command() -> list[str]:
    """What runs a kernel; its arguments follow."""
    return [sys.executable, "-m", "k42", "serve"]


def supervisor_command() -> list[str]:
    """What runs a kernel under a supervisor, whose file needs nothing of k42: the kernel's arguments follow."""
    return [sys.executable, "-I", supervisor.__file__]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _answers(path: Path, pid: int) -> bool:
    """Whether it is this process that listens: another kernel may be there already."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe, contextlib.suppress(OSError):
        probe.connect(str(path))
        there = protocol.peer(probe)[0]
        return there == pid or Path(f"/proc/{there}/stat").read_text().rsplit(") ", 1)[1].split()[1] == str(pid)
    return False


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-8:])
    return ""
