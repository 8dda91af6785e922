"""grep, as in section 4.4 and figure 12 of the paper: processes search one file for what is not in it.

One process a processor maps a common file of 111 MB and searches all of it with a regular expression. The
file is resident, in Linux's page cache or in k42's, and each process maps it anew: so a search is a fault for
every page that it comes to, on pages that all the processes share. Scalable is what takes the same time on
any number of processors.

- `linux`: mmap.mmap. Linux maps up to 16 resident neighbours in one fault.
- `k42`: k42.vm, with pages of 4 KiB or of 64 KiB.
- `k42-fcm-shared` and so on: the same, with pages of 4 KiB, in a kernel with that implementation of the FCM: what
  figure 12 compares.

Before and after the search, outside its time, every byte of the mapping is compared with the file.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import statistics
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k42.errors import Error
from k42.experiments._record import PAGE, PAGE_SIZES, Case, Samples, compared, find
from k42.experiments._runner import Options, Report, first_cpus, interleave, own_kernel, python
from k42.vm.variants import choices

NBYTES = 111_000_000  # the paper's file
QUICK_NBYTES = 16_000_000
ROUNDS = 7
QUICK_ROUNDS = 5
PATTERN = r"locality \+ policy"  # Python's authors wrote the text, and do not use these words

BUDGET = 512 * 2**20  # bytes; the whole file fits


def write_corpus(path: Path, nbytes: int) -> None:
    """Fill a file with real text: the sources of Python's standard library, again and again.

    Args:
        path: the file to make.
        nbytes: its size.
    """
    sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    text = b"".join(source.read_bytes() for source in sources if "site-packages" not in source.parts)
    if re.search(PATTERN.encode(), text):
        raise Error("grep: the pattern does occur in the text")
    with path.open("wb") as file:
        for start in range(0, nbytes, len(text)):
            file.write(text[: nbytes - start])


def time_per_process(implementation: str, processors: int, path: Path, page_size: int, socket: str | None) -> float:
    """The mean of the times that the processes take to map and search the file, in s.

    Args:
        implementation: `linux`, or one of k42's.
        processors: how many processes, each pinned to a CPU.
        path: the file.
        page_size: bytes; for k42.
        socket: of the kernel; for k42.

    Raises:
        Error: a process failed, or the mapping is not what the file is.
    """
    chosen = first_cpus(processors)
    searchers: list[subprocess.Popen[str]] = []
    try:
        for cpu in chosen:
            job = {
                "cpu": cpu,
                "implementation": implementation,
                "path": str(path),
                "pattern": PATTERN,
                "page_size": page_size,
                "socket": socket,
            }
            searchers.append(python("_grep", json.dumps(job)))
        for searcher in searchers:
            _answer(searcher)
        for searcher in searchers:
            assert searcher.stdin
            searcher.stdin.write("go\n")
            searcher.stdin.flush()
        return statistics.mean(float(_answer(searcher)["seconds"]) for searcher in searchers)
    finally:
        for searcher in searchers:
            searcher.kill()
            searcher.communicate()


def _answer(searcher: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line that a process says, which is an object in JSON."""
    assert searcher.stdout
    line = searcher.stdout.readline()
    if not line:
        raise Error("grep: a searching process ended early; what it wrote above says why")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise Error(f"grep: {answer['error']}")
    return answer


def measure(options: Options) -> list[Samples]:
    """Measure Linux and k42 with both page sizes, on each number of processors, interleaved."""
    nbytes, rounds = (QUICK_NBYTES, QUICK_ROUNDS) if options.quick else (NBYTES, ROUNDS)
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="k42-grep-"))) / "text"
        write_corpus(path, nbytes)
        socket = stack.enter_context(own_kernel(BUDGET))
        implementations: list[tuple[str, int, str | None]] = [
            ("linux", PAGE, None),
            *(("k42", page_size, socket) for page_size in PAGE_SIZES),
        ]
        for fcm in choices().get("fcm", ()):
            socket = stack.enter_context(own_kernel(BUDGET, f"fcm={fcm}"))
            implementations.append((f"k42-fcm-{fcm}", PAGE, socket))
        return interleave(
            [
                Case(
                    name,
                    processors,
                    {"page_size": page_size, "bytes": nbytes},
                    functools.partial(time_per_process, name, processors, path, page_size, socket),
                )
                for processors in options.processors
                for name, page_size, socket in implementations
            ],
            rounds,
        )


def findings(samples: Sequence[Samples]) -> list[str]:
    """The ratios to Linux, and those of the implementations of the FCM, a line each."""
    lines = compared(samples)
    for processors in sorted({each.case.processors for each in samples}):
        shared = find(samples, "k42-fcm-shared", processors, PAGE)
        for fcm in choices().get("fcm", ()):
            other = find(samples, f"k42-fcm-{fcm}", processors, PAGE)
            if shared and other and fcm != "shared":
                wanted = "at most 1.05" if processors == 1 else "below 1"
                ratio = other.ratio(shared)
                lines.append(f"k42, {fcm} / shared FCM (4 KiB, {processors} proc.) = {ratio:.2f}, wanted: {wanted}")
    return lines


def run(options: Options) -> Report:
    """Measure grep; `time_per_process` is in s for mapping the file and searching all of it."""
    samples = measure(options)
    return Report(
        "grep: one file searched by each process; every byte checked",
        [each.record("grep", "time_per_process", "s") for each in samples],
        findings(samples),
    )
