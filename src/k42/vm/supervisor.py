"""The supervisor: a small process that starts the kernel, holds what it would leave, and starts another if it dies.

It runs this file alone (``python -I supervisor.py [k42 serve's arguments]``) and needs nothing of k42, so that there is
little in it that can fail. It never reads a client's memory, a file, or a request.

The kernel tells it what there is over a socket, in *records*: a key, a value, and descriptors, which are duplicated by
the passing. A record replaces the one of the same key; a message without a value ends it. What a record means is the
kernel's business (`k42.vm.takeover`). Nothing that was sent is lost with the kernel: it lies in the socket. When the
kernel has died, the next one is given all records in the order in which they were first told, over a socket of its own.

A kernel that exits by itself has ended (status 0) or refused to start (others than a crash's): the supervisor ends
with its status. The end of the supervisor closes the socket, at which the kernel ends.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterable
from typing import Any

STATE = "K42_STATE"
"""The environment variable with the number of the kernel's end of the socket."""
MAX_RECORD = 1 << 17
"""Bytes of a message, at most."""
MAX_DESCRIPTORS = 4
"""Descriptors of a message, at most."""
_CRASHED = 1  # the exit status of Python after an exception that nobody expected; kernels that refuse have 2
_SETTLED = 2.0  # seconds that a kernel has to serve: then its death is none of a row
_MOST_DEATHS = 5  # in a row


class Records:
    """What the kernel has told."""

    def __init__(self) -> None:
        self.all: dict[str, tuple[object, list[int]]] = {}
        self.serving = False
        """Whether the kernel of the present socket has begun to serve."""
        self.whole = True
        """Whether all that came could be kept."""

    def hear(self, connection: socket.socket) -> bool:
        """Takes one message; False at the end of the socket."""
        try:
            message, descriptors = receive(connection)
        except EOFError:
            return False
        except OverflowError:
            self.whole = False
            return True
        if message.get("serving"):
            self.serving = True
            return True
        _, before = self.all.get(message["key"], (None, []))
        if message["value"] is None:
            self.all.pop(message["key"], None)
            _close([*before, *descriptors])
        elif descriptors:
            self.all[message["key"]] = (message["value"], list(descriptors))
            _close(before)
        else:
            self.all[message["key"]] = (message["value"], before)
        return True

    def tell(self, connection: socket.socket, deaths: int) -> None:
        """Gives all of them to a new kernel; how many kernels have died comes last."""
        for key, (value, descriptors) in self.all.items():
            send(connection, {"key": key, "value": value}, descriptors)
        send(connection, {"deaths": deaths})


def send(connection: socket.socket, message: object, descriptors: Iterable[int] = ()) -> None:
    """Sends one message, with descriptors; waits for room.

    Raises:
        OverflowError: it is too long.
    """
    data = json.dumps(message).encode()
    if len(data) > MAX_RECORD:
        raise OverflowError
    rights = array.array("i", descriptors)
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
    connection.sendmsg([data], control)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Waits for one message, with descriptors.

    Raises:
        EOFError: the other end is closed.
        OverflowError: there was no room for its descriptors in this process.
    """
    room = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
    data, controls, received, _ = connection.recvmsg(MAX_RECORD, room, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, content in controls:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    if not data:
        raise EOFError
    if received & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        _close(descriptors)
        raise OverflowError
    return json.loads(data), list(descriptors)


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{time.strftime('%F %T')} k42 supervisor: {text}\n".encode())


def _start(arguments: list[str], theirs: socket.socket) -> int:
    """Starts a kernel; its process."""
    environment = os.environ | {STATE: str(theirs.fileno())}
    pid = os.fork()
    if pid:
        return pid
    try:
        os.set_inheritable(theirs.fileno(), True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        os.execve(sys.executable, [sys.executable, "-m", "k42", "serve", *arguments], environment)
    finally:
        os._exit(127)


def supervise(arguments: list[str]) -> int:
    """Runs kernels until one ends by itself; its exit status."""
    records = Records()
    child = 0
    ending = False
    asked = False  # the child, to end; once, for at its own end a second time would kill it

    def end(_: int, __: object) -> None:
        nonlocal ending, asked
        ending = True
        if child and not asked:
            asked = True
            os.kill(child, signal.SIGTERM)  # a zombie at worst: nobody else has waited for it

    endings = {signal.SIGTERM, signal.SIGINT}
    for number in endings:
        signal.signal(number, end)
    deaths = in_a_row = 0
    while True:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        signal.pthread_sigmask(signal.SIG_BLOCK, endings)
        if ending and not deaths:
            return 0
        # To end where one has died takes another: it has what clients wrote, and writes it back.
        started = time.monotonic()
        asked = False
        child = _start(arguments, theirs)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, endings)
        theirs.close()
        records.serving = False
        with contextlib.suppress(OSError):  # it may be dead already
            records.tell(ours, deaths)
        heard = True
        while heard:
            with contextlib.suppress(ConnectionError):  # once, where it died before it had read all; the rest follows
                heard = records.hear(ours)
            if ending and records.serving and not asked:
                asked = True
                os.kill(child, signal.SIGTERM)
        _, waited = os.waitpid(child, 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, endings)
        child = 0
        signal.pthread_sigmask(signal.SIG_UNBLOCK, endings)
        ours.close()
        status = os.waitstatus_to_exitcode(waited)
        if status >= 0 and status != _CRASHED:
            return status
        if ending and -status in endings and not deaths:
            return 0  # it had not begun yet
        deaths += 1
        # SIGKILL comes from outside: who kills a kernel that serves can do so as often as they like.
        settled = records.serving and (status == -signal.SIGKILL or time.monotonic() - started > _SETTLED)
        in_a_row = 0 if settled else in_a_row + 1
        what = signal.Signals(-status).name if status < 0 else f"status {status}"
        if in_a_row == _MOST_DEATHS or not records.whole:
            reason = "" if records.whole else ", and not all that it told could be kept: too few descriptors"
            _say(f"the kernel died ({what}){reason}: giving up after {deaths} deaths")
            return _CRASHED
        _say(f"the kernel died ({what}): starting another")


def main() -> None:
    """Runs as a program."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sys.exit(supervise(sys.argv[1:]))


if __name__ == "__main__":
    main()
