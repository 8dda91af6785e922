"""One program of the experiment `objects`; its argument says what to do, as an object in JSON."""

from __future__ import annotations

import array
import json
import os
import re
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from k42 import vm
from k42.errors import Error
from k42.experiments._record import PAGE

_WORD = re.compile(rb"\bself\b")
_LINE = 64  # bytes


def _open(client: vm.Client, path: str) -> vm.Mapping:
    """For reading; resident, and with a fault for each page that is touched, as in the paper."""
    text = client.open(path, fault_around=PAGE)
    text.prefetch()
    return text


def _keep(client: vm.Client, numbers: array.array[int]) -> None:
    """Has the results in memory of the kernel's."""
    data = numbers.tobytes()
    with client.anonymous(max(len(data), 1)) as results:
        results[: len(data)] = data


def search(client: vm.Client, text: vm.Mapping) -> int:
    """Where a word stands."""
    found = array.array("Q", (match.start() for match in _WORD.finditer(text)))
    _keep(client, found)
    return len(found)


def check(client: vm.Client, text: vm.Mapping) -> int:
    """A checksum of each line."""
    with memoryview(text) as view:
        sums = array.array("I", (zlib.crc32(view[at : at + _LINE]) for at in range(0, len(view), _LINE)))
    _keep(client, sums)
    return len(sums)


def sort(client: vm.Client, text: vm.Mapping) -> int:
    """The lines in order."""
    lines = sorted(text[:].splitlines(keepends=True))
    with client.anonymous(len(text)) as results:
        results[:] = b"".join(lines)
        with results.snapshot() as before:
            results[0:1] = b"\n"
            if before[:1] != lines[0][:1]:
                raise Error("objects: a snapshot changed")
    return len(lines)


def copy(client: vm.Client, text: vm.Mapping) -> int:
    """A copy of the file, beside it."""
    with client.open(f"{text.name}.{os.getpid()}", "w+", length=len(text)) as target:
        target[:] = text[:]
    os.unlink(target.name)
    return len(target.name)


PROGRAMS: dict[str, Callable[[vm.Client, vm.Mapping], int]] = {
    "search": search,
    "check": check,
    "sort": sort,
    "copy": copy,
}


def main(job: dict[str, Any]) -> None:
    """Connect, say so, wait for a line where that is wanted, and run the program on each file, then say so."""
    cpus: list[int] = job["cpus"]
    program = PROGRAMS[job["program"]]
    os.sched_setaffinity(0, {cpus[0]})
    with vm.connect(job["socket"]) as client:
        print("ready", flush=True)
        if job["waits"]:
            sys.stdin.readline()
        for path in job["paths"]:
            with _open(client, path) as text, ThreadPoolExecutor(len(cpus)) as pool:
                done = list(pool.map(lambda cpu: _on(cpu, program, client, text), cpus))
            if min(done) < 1:
                raise Error(f"objects: {job['program']} found nothing in {path}")
    print("done", flush=True)


def _on(cpu: int, program: Callable[[vm.Client, vm.Mapping], int], client: vm.Client, text: vm.Mapping) -> int:
    """Run it on a CPU, through the window of that CPU: page tables of its own, as a thread has in K42."""
    os.sched_setaffinity(0, {cpu})  # of this thread
    return program(client, text.local())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
