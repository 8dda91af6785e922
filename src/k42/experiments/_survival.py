"""A client of the experiment `survival`: reads and writes, and knows at any time what must be where.

Each thread has a part of the file, and of anonymous memory, in which it alone writes. What a flush has returned for
must be in the file; what it has not may be, too, but not older than that.
"""

from __future__ import annotations

import json
import os
import random
import struct
import sys
import threading
from pathlib import Path
from typing import NoReturn

from k42 import vm
from k42.experiments._record import PAGE
from k42.experiments.survival import NBYTES, OPERATIONS, PAGES, THREADS


def content(thread: int, page: int, generation: int) -> bytes:
    """What a page has after so many of the thread's writes; before the first: zeros."""
    if generation == 0:
        return bytes(PAGE)
    return struct.pack("<QQ", thread << 48 | page << 32 | generation, 0xFEED) * (PAGE // 16)


def wrong(*what: object) -> NoReturn:
    """Ends the process: the worst has happened."""
    os.write(1, (json.dumps({"wrong": repr(what)}) + "\n").encode())
    os._exit(1)


class Work:
    """What one client does until it is stopped.

    Args:
        socket: of the kernel.
        path: a file of `NBYTES` zeros that is this client's alone.
        other: a file that nobody writes to.
        seed: of all that is chosen.
    """

    def __init__(self, socket: str, path: str, other: str, seed: str) -> None:
        self.counts = dict.fromkeys(OPERATIONS, 0)  # a lost increment of two threads does no harm
        self._path, self._other, self._seed = Path(path), other, seed
        self._unchanged = Path(other).read_bytes()
        self._stop = threading.Event()
        self._client = vm.connect(socket, grace=60)
        self._file = self._client.open(path, "r+")
        self._memory = self._client.anonymous(NBYTES, overcommit=True)
        self._reserved = self._client.anonymous(THREADS * PAGE)
        self._descriptor = os.open(path, os.O_RDONLY)
        self._written = [[0] * PAGES for _ in range(THREADS)]  # generations, of the file
        self._threads = [threading.Thread(target=self._guarded, args=(thread,)) for thread in range(THREADS)]
        for thread in range(THREADS):
            self._reserved[thread * PAGE] = thread + 1
        for each in self._threads:
            each.start()

    def finish(self) -> None:
        """Stops, and looks at all that must be there."""
        self._stop.set()
        for each in self._threads:
            each.join()
        self._file.flush()
        stored = self._path.read_bytes()
        for thread, generations in enumerate(self._written):
            for page, generation in enumerate(generations):
                at = (thread * PAGES + page) * PAGE
                if stored[at : at + PAGE] != content(thread, page, generation):
                    wrong("the file at the end", thread, page, generation)
        self._client.close()

    def _guarded(self, thread: int) -> None:
        try:
            self._work(thread)
        except BaseException as error:
            wrong("an exception", repr(error))

    def _work(self, thread: int) -> None:
        chosen = random.Random(f"{self._seed} {thread}")
        start = thread * PAGES
        known = self._written[thread], [0] * PAGES
        with memoryview(self._file) as file, memoryview(self._memory) as memory:
            views = file, memory

            def check(which: int, page: int) -> None:
                at = (start + page) * PAGE
                if bytes(views[which][at : at + PAGE]) != content(thread, page, known[which][page]):
                    wrong(("file", "memory")[which], thread, page, known[which][page])
                self.counts["reads"] += 1

            generation = 0
            while not self._stop.is_set():
                what, which, page = chosen.random(), chosen.randrange(2), chosen.randrange(PAGES)
                if what < 0.45:
                    generation += 1
                    at = (start + page) * PAGE
                    views[which][at : at + PAGE] = content(thread, page, generation)
                    known[which][page] = generation
                    self.counts["writes"] += 1
                elif what < 0.9:
                    check(which, page)
                elif what < 0.94:
                    count = chosen.randrange(1, 9)
                    page = min(page, PAGES - count)
                    self._file.flush((start + page) * PAGE, count * PAGE)
                    for each in range(page, page + count):
                        stored = os.pread(self._descriptor, PAGE, (start + each) * PAGE)
                        if stored != content(thread, each, known[0][each]):
                            wrong("what was flushed", thread, each, known[0][each])
                    self.counts["flushes"] += 1
                else:
                    self._map(chosen)
                if self._reserved[thread * PAGE] != thread + 1:
                    wrong("reserved memory", thread)
            for page in range(PAGES):
                check(0, page)
                check(1, page)

    def _map(self, chosen: random.Random) -> None:
        """Maps something for a moment."""
        if chosen.random() < 0.5:
            at = chosen.randrange(len(self._unchanged) // PAGE - 4) * PAGE
            with self._client.open(self._other, offset=at, length=4 * PAGE) as mapping:
                if bytes(mapping) != self._unchanged[at : at + 4 * PAGE]:
                    wrong("a file that is only read", at)
        else:
            with self._client.anonymous(PAGE) as fresh:
                if bytes(fresh) != bytes(PAGE):
                    wrong("fresh memory")
                fresh[:5] = b"fresh"
                if fresh[:6] != b"fresh\0":
                    wrong("fresh memory, written")
        self.counts["maps"] += 1


def main() -> None:
    """Says that it works, works until there is a line to read, and says what it did."""
    work = Work(*sys.argv[1:])
    print(json.dumps({"working": True}), flush=True)
    sys.stdin.readline()
    work.finish()
    print(json.dumps(work.counts), flush=True)


if __name__ == "__main__":
    main()
