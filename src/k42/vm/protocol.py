"""The connection between a client and the kernel: one JSON object a message, descriptors beside it.

A sequenced-packet Unix socket keeps messages apart. Each request has exactly one reply, either
``{"ok": true, ...}`` or ``{"error": kind, "message": text}``, which carries the ``id`` of the request if that had one.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

from k42.vm.errors import KernelUnavailable, OutOfFrames, ProtocolError, StoreError, Unsupported

VERSION = 2
PAGE = 4096
"""The unit of budget and of page descriptors, in bytes."""
MAX_GROUP = 512
"""The largest page size of a region, in pages of 4 KiB."""
MAX_MESSAGE = 65536
MAX_DESCRIPTORS = 4
_MAX_REASON = 2500  # characters, each up to 12 bytes in JSON: an error quotes what it was given, which may be long

Message = dict[str, Any]


def text_of(pages: int) -> str:
    """So many pages of 4 KiB, in bytes as people write them.

    >>> text_of(3), text_of(256)
    ('12 KiB', '1 MiB')
    """
    number = float(pages * PAGE // 1024)
    for unit in ("KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} TiB"


def pages_of(nbytes: int) -> int:
    """How many pages of 4 KiB hold so many bytes."""
    return -(-nbytes // PAGE)


_ERRORS: dict[str, type[Exception]] = {
    "kernel": KernelUnavailable,
    "frames": OutOfFrames,
    "store": StoreError,
    "unsupported": Unsupported,
    "protocol": ProtocolError,
    "value": ValueError,
}


def to_error(message: Message) -> Exception:
    """The exception that an error reply stands for."""
    kind = _ERRORS.get(str(message.get("error")), ProtocolError)
    reason = str(message.get("message", "no reason given"))
    if kind is not StoreError:
        return kind(reason)
    offset, number = (value if type(value := message.get(key)) is int else None for key in ("offset", "errno"))
    return StoreError(reason, url=str(message.get("url", "")), offset=offset, errno=number)


def to_reply(error: Exception) -> Message:
    """The error reply for an exception; `ProtocolError` for one that has no kind of its own."""
    if isinstance(error, StoreError):
        place = {"url": error.url[:_MAX_REASON], "offset": error.offset, "errno": error.errno}
        return {"error": "store", "message": error.reason[:_MAX_REASON], **place}
    for kind, type_ in _ERRORS.items():
        if isinstance(error, type_):
            return {"error": kind, "message": str(error)[:_MAX_REASON]}
    return {"error": "protocol", "message": f"{type(error).__name__}: {error}"[:_MAX_REASON]}


def send(connection: socket.socket, message: Message, descriptors: tuple[int, ...] = (), flags: int = 0) -> None:
    """Sends one message and its descriptors."""
    data = json.dumps(message).encode()
    # Not socket.send_fds(), which ignores its flags.
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    connection.sendmsg([data], rights, flags)


def receive(connection: socket.socket, flags: int = 0) -> tuple[Message, list[int]]:
    """One message and its descriptors, which are the caller's to close.

    Raises:
        EOFError: the other side has closed.
        ProtocolError: what came is not a message.
    """
    ancillary = socket.CMSG_SPACE(MAX_DESCRIPTORS * struct.calcsize("i"))
    flags |= socket.MSG_CMSG_CLOEXEC
    data, controls, received, _ = connection.recvmsg(MAX_MESSAGE, ancillary, flags)
    descriptors = array.array("i")
    for level, kind, content in controls:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    try:
        if not data:
            raise EOFError
        if received & socket.MSG_TRUNC:
            raise ProtocolError("a message too long")
        if received & socket.MSG_CTRUNC:
            raise ProtocolError(
                "too many descriptors in a message, or no room for them in the process that received it"
            )
        try:
            message = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ProtocolError("a message that is not JSON") from error
        if not isinstance(message, dict):
            raise ProtocolError("a message that is not an object")
    except (EOFError, ProtocolError):
        close_all(descriptors)
        raise
    return message, list(descriptors)


def close_all(descriptors: Any) -> None:
    """Closes descriptors that nobody took over."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def peer(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process at the other end, as Linux says."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    return pid, uid


def runtime_folder() -> Path:
    """The user's own folder for the socket and the log, made if need be (mode 0700).

    Raises:
        KernelUnavailable: it exists but belongs to somebody else, or others may enter it.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base) / "k42" if base else Path(f"/tmp/k42-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or not folder.is_dir():
        raise KernelUnavailable(f"{folder} must be a folder of yours that only you may enter (chmod 700)")
    return folder


def default_socket() -> Path:
    """Where the user's own kernel listens unless told otherwise."""
    return runtime_folder() / "kernel.sock"
