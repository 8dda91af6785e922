"""The kernel's side of its supervisor: tells it what the next kernel would need, and hears what the last one left.

See `k42.vm.supervisor` for the records. A kernel without a supervisor has a ledger too, in which nothing is written.

What must come first: a record is told before the client hears that its request is done, and before a client can have
bytes in what the record is about. So whatever a client relies on, the next kernel knows.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from k42.vm import supervisor
from k42.vm.errors import KernelUnavailable, ProtocolError


class Ledger:
    """What is told to the supervisor, if there is one.

    Attributes:
        supervised: whether there is one.
        deaths: how many kernels have died before this one.
        left: what they left, by key: value and descriptors, which belong to who takes them out.
    """

    def __init__(self) -> None:
        self.left: dict[str, tuple[Any, list[int]]] = {}
        self.deaths = 0
        self._lock = threading.Lock()  # keeps the messages of one key in order; a leaf
        self._connection: socket.socket | None = None
        number = os.environ.pop(supervisor.STATE, None)
        self.supervised = number is not None
        if number is None:
            return
        os.set_inheritable(int(number), False)
        self._connection = socket.socket(fileno=int(number))
        while True:
            message, descriptors = supervisor.receive(self._connection)
            if "deaths" in message:
                self.deaths = message["deaths"]
                return
            self.left[message["key"]] = (message["value"], descriptors)

    def fileno(self) -> int:
        """Becomes readable when the supervisor ends; -1: there is none."""
        return -1 if self._connection is None else self._connection.fileno()

    def tell(self, key: str, value: Any, descriptors: Iterable[int] = ()) -> None:
        """Has the supervisor keep this, and duplicates of the descriptors; without any it keeps those it has.

        Raises:
            ProtocolError: it is too long.
        """
        if self._connection is None:
            return
        try:
            self._send({"key": key, "value": value}, tuple(descriptors))
        except OverflowError as error:
            raise ProtocolError("a name too long") from error

    def end(self, key: str) -> None:
        """Has it forget this."""
        if self._connection is not None:
            self._send({"key": key, "value": None}, ())

    def serving(self) -> None:
        """Says that all that was left is taken over."""
        if self._connection is not None:
            self._send({"serving": True}, ())

    def _send(self, message: Any, descriptors: tuple[int, ...]) -> None:
        assert self._connection is not None
        with self._lock:
            while True:
                try:
                    supervisor.send(self._connection, message, descriptors)
                    return
                except OSError as error:
                    if error.errno in (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM):
                        time.sleep(0.001)  # it has not taken the last ones out yet
                        continue
                    if error.errno in (errno.EPIPE, errno.ECONNRESET):
                        return  # it has ended: the main thread will see it, and end us
                    raise


def new_records() -> int:
    """A memfd for what the engine has on record of threads."""
    return os.memfd_create("k42-held", os.MFD_CLOEXEC)


class Left:
    """What a kernel left, record by record. Each is taken out once, and its descriptors with it.

    Args:
        ledger: which has it.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def sockets(self, cpus: list[int]) -> tuple[int, socket.socket, int] | None:
        """The lock, the socket where it listened, and the records of threads that it held; None: there was none.

        Raises:
            KernelUnavailable: it served other CPUs.
        """
        if "kernel" not in self._ledger.left:
            return None
        record, (lock, listener, held) = self._ledger.left.pop("kernel")
        if record["cpus"] != cpus:
            raise KernelUnavailable(f"the kernel served the CPUs {record['cpus']} before it died, now there are {cpus}")
        return lock, socket.socket(fileno=listener), held

    def caches(self) -> Iterator[tuple[int, Any, list[int], int | None]]:
        """(number, record, descriptors, swap file) of each file cache, in the order in which they were made."""
        for (number,), record, descriptors in self._take("cache"):
            _, swap = self._ledger.left.pop(f"swap/{number}", (None, [None]))
            yield number, record, descriptors, swap[0]

    def clients(self) -> Iterator[tuple[int, Any, list[int]]]:
        """(id, record, descriptors of the connection, the status page and the commands) of each."""
        for (number,), record, descriptors in self._take("client"):
            yield number, record, descriptors

    def regions(self, client: int) -> Iterator[tuple[int, Any]]:
        """(base address, record) of each region of a client."""
        for (_, base), record, _ in self._take(f"region/{client}"):
            yield base, record

    def pins(self, client: int, base: int) -> Any:
        """What the pins of a region had told; None: nothing."""
        record, _ = self._ledger.left.pop(f"pins/{client}/{base}", (None, []))
        return record

    def userfaultfds(self, client: int) -> Iterator[tuple[int, int]]:
        """(index of the CPU, descriptor) of each userfaultfd of a client."""
        for (_, index), _, [descriptor] in self._take(f"uffd/{client}"):
            yield index, descriptor

    def forget_the_rest(self) -> None:
        """What is left now belonged to a client that was going."""
        for key, (_, descriptors) in self._ledger.left.items():
            self._ledger.end(key)
            for descriptor in descriptors:
                os.close(descriptor)
        self._ledger.left.clear()

    def _take(self, kind: str) -> Iterator[tuple[tuple[int, ...], Any, list[int]]]:
        for key in [key for key in self._ledger.left if key.startswith(kind + "/")]:
            record, descriptors = self._ledger.left.pop(key)
            yield tuple(map(int, key.split("/")[1:])), record, descriptors
