"""The process of one implementation in the experiment `paging`, inside a control group with a limit of memory.

Its argument is an object in JSON: the group to join, the file, the budget and the policy of the kernel that it then
starts and that is inside the same limit; without a policy the file is mapped by Linux. It answers with a line for each
line that comes: a pattern to run, and how many seconds that took.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from k42 import _native
from k42.errors import Error

PAGE = 4096  # bytes


def serve(job: dict[str, Any]) -> None:
    """Answer requests until there are no more.

    Raises:
        Error: a page does not hold what it must.
    """
    (Path(job["group"]) / "cgroup.procs").write_text(str(os.getpid()))
    with _opener(job) as opener:
        print(json.dumps({"used": _used(job["group"])}), flush=True)
        for line in sys.stdin:
            print(json.dumps(_run(opener, job["path"], **json.loads(line))), flush=True)


def _used(group: str) -> int:
    """Bytes of memory that the processes of the group have by now."""
    folder = Path(group)
    v1 = folder / "memory.usage_in_bytes"
    return int((v1 if v1.exists() else folder / "memory.current").read_text())


@contextlib.contextmanager
def _opener(job: dict[str, Any]) -> Iterator[Callable[[bool, bool], AbstractContextManager[Any]]]:
    """Yields what maps the file: for writing or not, at random or not."""
    path = job["path"]
    if job["policy"] is None:

        @contextlib.contextmanager
        def linux(write: bool, random: bool) -> Iterator[mmap.mmap]:
            access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
            with open(path, "r+b" if write else "rb") as file, mmap.mmap(file.fileno(), 0, access=access) as memory:
                memory.madvise(mmap.MADV_RANDOM if random else mmap.MADV_NORMAL)
                yield memory

        yield linux
        return

    from k42 import vm

    @contextlib.contextmanager
    def own(write: bool, random: bool) -> Iterator[vm.Mapping]:
        with client.open(path, "r+" if write else "r") as memory:
            memory.madvise(mmap.MADV_RANDOM if random else mmap.MADV_NORMAL)
            yield memory
            memory.madvise(mmap.MADV_DONTNEED)  # the kernel would keep the pages for the next run

    with tempfile.TemporaryDirectory(prefix="k42-") as folder:
        socket = str(Path(folder) / "kernel.socket")
        with (
            vm.launch(socket, budget=job["budget"], policy=job["policy"]),
            vm.connect(socket) as client,
        ):
            yield own


def _run(
    opener: Callable[[bool, bool], AbstractContextManager[Any]],
    path: str,
    *,
    count: int,
    seed: int,
    stamp: int,
) -> dict[str, float]:
    """Visit pages, and with a stamp write them back; nothing of the file is cached before and after."""
    _forget(path)
    with opener(stamp != 0, seed != 0) as memory:
        seconds, wrong = _native.visit_pages(memory, count, seed, stamp)
        start = time.perf_counter()
        if stamp:
            memory.flush()
        seconds += time.perf_counter() - start
    if wrong:
        raise Error(f"paging: {wrong} pages of {path} did not hold their numbers")
    _forget(path)
    return {"seconds": seconds}


def _forget(path: str) -> None:
    """Have Linux drop what it caches of the file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    try:
        serve(json.loads(sys.argv[1]))
    except (Error, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
