"""survival: the kernel is killed again and again, at any instant, while clients read and write.

Two clients with two threads each write to files and to anonymous memory, read, flush, map and unmap, with a kernel that
runs under a supervisor and has a budget for all of what they use, or for an eighth. Every value that they read is
compared with what must be there, and every page that a flush has returned for with the file. The experiment fails at
the first wrong byte, and at the first death that a client notices.

What is measured is the outage: from the kill until the next kernel has answered a request of a client that was
connected before.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from k42.errors import Error
from k42.experiments._record import PAGE, Case, Samples
from k42.experiments._runner import Options, Report, interleave, python

BUDGETS = (256, 48)  # pages, of which the clients use about 800
CLIENTS = 2
THREADS = 2  # of each client
PAGES = 96  # of each thread, in each kind of memory
NBYTES = THREADS * PAGES * PAGE  # of a client's file
OPERATIONS = ("writes", "reads", "flushes", "maps")
ROUNDS = 200
QUICK_ROUNDS = 10
UNCHANGED = 100  # pages of the file that is only read
PAUSE = 0.4  # seconds from one kill to the next, at most


def kernel_of(supervisor: int) -> int:
    """The process of the kernel that this supervisor has at the moment; where there is none just now, the next.

    Raises:
        Error: the supervisor has ended.
    """
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children")
    while True:
        try:
            found = [int(pid) for pid in children.read_text().split()]
        except OSError as error:
            raise Error("the supervisor has ended; its log says why") from error
        if found and not has_ended(found[0]):
            return found[0]
        time.sleep(0.002)


def has_ended(pid: int) -> bool:
    """Gone, or a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] in "ZX"
    except OSError:
        return True


def kill(supervisor: int) -> None:
    """kill -9 of the kernel; returns when it is dead."""
    pid = kernel_of(supervisor)
    os.kill(pid, signal.SIGKILL)
    while not has_ended(pid):
        time.sleep(0.002)


class Survivors:
    """A supervised kernel and the clients that must not notice its deaths.

    Args:
        folder: for its files; empty.
        budget: bytes, of the kernel.
        seed: of all that is chosen.
    """

    def __init__(self, folder: Path, budget: int, seed: int) -> None:
        from k42 import vm

        self._chosen = random.Random(seed)
        self._seed = seed
        other = folder / "other"
        other.write_bytes(array.array("Q", range(UNCHANGED * PAGE // 8)).tobytes())
        self._clients: list[subprocess.Popen[str]] = []
        with contextlib.ExitStack() as stack:
            self._kernel = stack.enter_context(vm.launch(folder / "kernel.socket", budget, supervise=True))
            self._watcher = stack.enter_context(vm.connect(self._kernel.socket, grace=60))
            stack.callback(self._end_clients)
            for number in range(CLIENTS):
                path = folder / f"file{number}"
                path.write_bytes(bytes(NBYTES))
                arguments = map(str, (self._kernel.socket, path, other, f"{seed} {number}"))
                client = python("_survival", *arguments)
                self._clients.append(client)
                self._answer(client)
            self._stack = stack.pop_all()

    def kill(self) -> float:
        """Kills the kernel after a while; returns the outage in ms.

        Raises:
            Error: a client has ended.
        """
        time.sleep(self._chosen.random() * PAUSE)
        if self._chosen.random() < 0.8:
            self._watcher.stat()  # it serves; else it may be just taking over
        start = time.perf_counter()
        kill(self._kernel.pid)
        self._watcher.stat()
        outage = time.perf_counter() - start
        for client in self._clients:
            if client.poll() is not None:
                self._answer(client)
        return outage * 1000

    def deaths(self) -> int:
        """How many kernels have died."""
        return int(self._watcher.stat()["deaths"])

    def finish(self) -> dict[str, int]:
        """Has the clients look at everything once more; how often they did each of `OPERATIONS`, together.

        Raises:
            Error: a byte was wrong.
        """
        answers = []
        for client in self._clients:
            assert client.stdin
            with contextlib.suppress(BrokenPipeError):  # it has ended; its answer says why
                client.stdin.write("\n")
                client.stdin.flush()
            answers.append(self._answer(client))
        return {name: sum(answer[name] for answer in answers) for name in OPERATIONS}

    def _answer(self, client: subprocess.Popen[str]) -> dict[str, Any]:
        assert client.stdout
        line = client.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"wrong": f"a client ended with {client.wait()}"}
        if "wrong" in answer:
            raise Error(f"survival: {answer['wrong']} (seed {self._seed})")
        return answer

    def _end_clients(self) -> None:
        for client in self._clients:
            client.kill()
            client.wait()
            for stream in (client.stdin, client.stdout):
                assert stream
                with contextlib.suppress(OSError):
                    stream.close()

    def __enter__(self) -> Survivors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def measure(options: Options) -> tuple[list[Samples], dict[int, dict[str, int]]]:
    """Kill the kernels of both budgets in turn; the outages, and what the clients did by budget."""
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    with contextlib.ExitStack() as stack:
        made = {}
        for pages in BUDGETS:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="k42-survival-")))
            made[pages] = stack.enter_context(Survivors(folder, pages * PAGE, random.randrange(1 << 32)))
        samples = interleave(
            [Case(f"k42, {pages} pages", 1, {"budget": pages * PAGE}, each.kill) for pages, each in made.items()],
            rounds,
        )
        return samples, {pages: each.finish() for pages, each in made.items()}


def findings(samples: Sequence[Samples], counts: dict[int, dict[str, int]]) -> list[str]:
    """What was survived, a line for each budget."""
    return [
        f"a budget of {pages} pages: {len(each.values)} kills while clients did {count['writes']} writes, "
        f"{count['reads']} reads, {count['flushes']} flushes and {count['maps']} mappings; no byte was wrong"
        for each, (pages, count) in zip(samples, counts.items(), strict=True)
    ]


def run(options: Options) -> Report:
    """Measure survival; `outage` is in ms."""
    samples, counts = measure(options)
    return Report(
        "survival: kill -9 of the kernel while clients read and write",
        [each.record("survival", "outage", "ms") for each in samples],
        findings(samples, counts),
    )
