"""One searching process of the experiment `grep`; its argument says what to do, as an object in JSON."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from k42.errors import Error

if TYPE_CHECKING:
    from typing_extensions import Buffer

_CHUNK = 2**20  # bytes compared at a time


def search(job: dict[str, Any]) -> None:
    """Say that all is ready, wait for a line, search, and say how many seconds it took.

    Raises:
        Error: a mapping differs from the file, or the pattern was found.
    """
    os.sched_setaffinity(0, {job["cpu"]})
    with _mapper(job) as mapped:
        with mapped() as memory:
            _check(memory, job["path"])  # which also makes the file resident
        print(json.dumps({"ready": True}), flush=True)
        if not sys.stdin.readline():
            return
        start = time.perf_counter()
        with mapped() as memory:
            found = re.search(job["pattern"].encode(), memory)
            seconds = time.perf_counter() - start
            if found:
                raise Error(f"the pattern was found at byte {found.start()}, where it is not")
            _check(memory, job["path"])
    print(json.dumps({"seconds": seconds}), flush=True)


@contextlib.contextmanager
def _mapper(job: dict[str, Any]) -> Iterator[Callable[[], AbstractContextManager[Buffer]]]:
    """Yields what maps the file anew, as the job wants it."""
    if job["implementation"] == "linux":
        with open(job["path"], "rb") as file:
            yield lambda: mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    else:
        from k42 import vm

        with vm.connect(job["socket"]) as client:
            yield lambda: client.open(job["path"], page_size=job["page_size"])


def _check(memory: Buffer, path: str) -> None:
    """Compare a mapping with its file, byte for byte."""
    with open(path, "rb") as file, memoryview(memory) as view:
        if len(view) != (nbytes := os.fstat(file.fileno()).st_size):
            raise Error(f"the mapping of {path} has {len(view)} bytes, and the file has {nbytes}")
        for at in range(0, nbytes, _CHUNK):
            # Copied, as comparing views is slower.
            if bytes(view[at : at + _CHUNK]) != file.read(_CHUNK):
                raise Error(f"the mapping of {path} differs from the file in the MiB at byte {at}")


if __name__ == "__main__":
    try:
        search(json.loads(sys.argv[1]))
    except (Error, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
