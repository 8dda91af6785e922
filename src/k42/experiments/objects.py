"""objects: who uses the objects of the kernel, as in table I of the paper, and how many live on one processor.

Table I: two programs scan files of 16 MiB, of which each page is a fault, in three ways.

- `multi-user`: two programs, one that searches and one that sums up, scan a file each: entirely independent.
- `single-user`: two processes of the same program scan the same file: partially independent.
- `multi-threaded`: two threads of one process scan the same file: not independent. Each has a window of its own on it
  (`Mapping.local`), as each processor has its page tables in K42.

Each row is one object, with its share of all accesses; those that account for 80% of the accesses are shown. An access
is a call on the object by its reference, or a step of the native fault engine through it.

`benchmark` and `benchmark faults` (section 2.2: "99.4% were created, accessed, and destroyed on the same processor"):
users, one a processor, run programs one after the other, which search, check, copy and sort files of their own and one
that all share. What is counted are the objects that were created and destroyed on the way; for `benchmark faults`, of
these, the objects that served faults, by the processors of these faults alone.

Where this differs from the paper: the kernel is a process, whose requests (to map, to unmap, to connect) one thread
answers, on any CPU, so that it is there that objects are created and destroyed; there are no segments in a HAT, and no
programs and libraries among the files; one user has all the processes; and file representatives are not counted.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from k42.errors import Error
from k42.experiments._record import PAGE, Record
from k42.experiments._runner import Options, Report, first_cpus, python
from k42.experiments.grep import write_corpus

NBYTES = 4096 * PAGE  # the paper's scans take about so many faults
QUICK_NBYTES = 256 * PAGE
ROUNDS = 5  # these are counts, and vary little
SMALL = 16 * PAGE  # bytes of each file of a user of the benchmark
FILES = 8  # of each user
PROGRAMS = ("search", "copy", "check", "sort")  # which a user runs, one after the other
TURNS = 2  # how often a user runs them all
QUICK_TURNS = 1
BUDGET = 256 * 2**20  # bytes of each kernel; no page is ever reclaimed
ACCOUNTED = 0.8  # of the accesses, by the objects shown

_NAMES = {
    "DistributedProcess": "Process",
    "UffdHat": "HAT",
    "DistributedRegion": "Region",
    "SharedFCM": "FCM",
    "DistributedGlobalPM": "GlobalPM",
    "ProcessPM": "PM",
}
_ONE = "created, used and destroyed on one"
_USED = "used on one, created or destroyed on another"
_SEVERAL = "used on several"


@dataclasses.dataclass(frozen=True)
class Counted:
    """What is known of one object; see `k42.experiments._census`.

    Attributes:
        name: what it is, in the paper's words.
        owners: numbers of the processes that it serves; empty: all of them.
        created: the CPU where it was made.
        destroyed: the CPU where it was destroyed; None: not as long as the kernel ran.
        faults: how often it was used on each CPU to serve a fault.
        requests: how often it was used there for a request.
    """

    name: str
    owners: tuple[int, ...]
    created: int
    destroyed: int | None
    faults: Mapping[int, int]
    requests: Mapping[int, int]

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Counted:
        """From what the kernel said."""
        name = _NAMES.get(said["kind"], said["kind"])
        if name in ("FCM", "Region"):
            name += " of memory" if said["anonymous"] else " of the file"
        faults, requests = ({int(cpu): n for cpu, n in said[key].items()} for key in ("faults", "requests"))
        return cls(name, tuple(said["owners"]), said["created"], said["destroyed"], faults, requests)

    @property
    def label(self) -> str:
        """Its name, and the processes that it serves, as the paper's table has it."""
        return f"{self.name} ({','.join(f'P{owner}' for owner in self.owners)})" if self.owners else self.name

    @property
    def accesses(self) -> int:
        """How often it was used."""
        return sum(self.faults.values()) + sum(self.requests.values())

    @property
    def locality(self) -> str:
        """On which processors it was created, used and destroyed."""
        used = {*self.faults, *self.requests}
        if len(used) > 1:
            return _SEVERAL
        return _ONE if used <= {self.created} and self.created == self.destroyed else _USED


@dataclasses.dataclass
class _Kernel:
    """A kernel that is counted; its objects, once it has ended."""

    socket: str
    objects: list[Counted] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def counted_kernel(processors: int) -> Iterator[_Kernel]:
    """Start a kernel on so many processors, and count its objects until it is stopped at the end.

    Raises:
        Error: there are fewer processors, or the kernel failed.
    """
    with tempfile.TemporaryDirectory(prefix="k42-") as folder:
        made = _Kernel(str(Path(folder) / "kernel.socket"))
        job = {"socket": made.socket, "budget": BUDGET, "cpus": first_cpus(processors)}
        process = python("_census", json.dumps(job))
        try:
            _expect(process, "ready")
            yield made
            process.terminate()
            output, _ = process.communicate()
            if process.returncode:
                raise Error(f"objects: the kernel ended with status {process.returncode}; what it wrote says why")
            made.objects = [Counted.of(each) for each in json.loads(output)]
        finally:
            process.kill()
            process.communicate()


def _expect(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout
    if process.stdout.readline().strip() != word:
        raise Error("objects: a process ended early; what it wrote above says why")


@dataclasses.dataclass(frozen=True)
class Program:
    """A process to run: a program of `k42.experiments._objects`, on each of these CPUs, for these files."""

    program: str
    cpus: Sequence[int]
    paths: Sequence[Path]

    def start(self, socket: str, *, waits: bool) -> subprocess.Popen[str]:
        """Start it; it has connected when this returns, and waits for a line where that is wanted."""
        paths = [str(path) for path in self.paths]
        job = {"socket": socket, "program": self.program, "cpus": self.cpus, "paths": paths, "waits": waits}
        process = python("_objects", json.dumps(job))
        try:
            _expect(process, "ready")
        except BaseException:
            process.kill()
            process.communicate()
            raise
        return process


def scan(processors: int, programs: Sequence[Program]) -> list[Counted]:
    """Run programs at the same time on a kernel of their own; its objects.

    Args:
        processors: of the kernel.
        programs: P1, P2 …
    """
    running: list[subprocess.Popen[str]] = []
    with counted_kernel(processors) as kernel:
        try:
            for program in programs:
                running.append(program.start(kernel.socket, waits=True))
            for process in running:
                assert process.stdin
                process.stdin.write("go\n")
                process.stdin.flush()
            for process in running:
                _expect(process, "done")
                process.wait()
        finally:
            for process in running:
                process.kill()
                process.communicate()
    return kernel.objects


def scenarios(folder: Path, nbytes: int, processors: int) -> dict[str, list[Program]]:
    """The three of table I; their files are made."""
    one, other = folder / "one", folder / "other"
    for path in (one, other):
        if not path.exists():
            write_corpus(path, nbytes)
    here, there = (first_cpus(processors) * 2)[:2]
    return {
        "multi-user": [Program("search", [here], [one]), Program("check", [there], [other])],
        "single-user": [Program("search", [here], [one]), Program("search", [there], [one])],
        "multi-threaded": [Program("search", [here, there], [one])],
    }


def benchmark(folder: Path, turns: int, processors: int) -> list[Counted]:
    """One user a processor, each running programs one after the other; the kernel's objects."""
    common = folder / "common"
    write_corpus(common, SMALL)

    def user(cpu: int, socket: str) -> None:
        own = [folder / f"{cpu}-{number}" for number in range(FILES)]
        for path in own:
            write_corpus(path, SMALL)
        for _ in range(turns):
            for program in PROGRAMS:
                process = Program(program, [cpu], [common, *own]).start(socket, waits=False)
                try:
                    _expect(process, "done")
                    process.wait()
                finally:
                    process.kill()
                    process.communicate()

    with counted_kernel(processors) as kernel, ThreadPoolExecutor(processors) as pool:
        for future in [pool.submit(user, cpu, kernel.socket) for cpu in first_cpus(processors)]:
            future.result()
    return kernel.objects


def accesses(objects: Sequence[Counted]) -> dict[str, int]:
    """The accesses to each object, by its label; those of one label are numbered in the order of their creation."""
    seen: collections.Counter[str] = collections.Counter()
    found = {}
    for each in objects:
        seen[each.label] += 1
        found[each.label if seen[each.label] == 1 else f"{each.label} {seen[each.label]}"] = each.accesses
    return found


def localities(objects: Sequence[Counted]) -> dict[str, int]:
    """How many objects of those that were created and destroyed are of which locality."""
    found = collections.Counter(each.locality for each in objects if each.destroyed is not None)
    return {locality: found[locality] for locality in (_ONE, _USED, _SEVERAL)}


def fault_localities(objects: Sequence[Counted]) -> dict[str, int]:
    """The same of those that served faults, by the processors of the faults."""
    served = [each for each in objects if each.destroyed is not None and each.faults]
    several = sum(len(each.faults) > 1 for each in served)
    return {"served on one": len(served) - several, "served on several": several}


def main_objects(rounds: Sequence[Mapping[str, int]]) -> list[str]:
    """The objects that account for 80% of the accesses, by their medians over the rounds, the most used first."""
    medians = _medians(rounds)
    wanted, shown = ACCOUNTED * sum(medians.values()), list[str]()
    for label in sorted(medians, key=lambda label: -medians[label]):
        if wanted <= 0:
            break
        shown.append(label)
        wanted -= medians[label]
    return shown


def _medians(rounds: Sequence[Mapping[str, int]]) -> dict[str, float]:
    labels = dict.fromkeys(label for each in rounds for label in each)
    return {label: statistics.median(each.get(label, 0) for each in rounds) for label in labels}


_Counts = dict[tuple[str, int], list[dict[str, int]]]  # by what was run, and processors; a dictionary a round


def measure(options: Options) -> _Counts:
    """Run all in each round, on each number of processors."""
    nbytes, turns = (QUICK_NBYTES, QUICK_TURNS) if options.quick else (NBYTES, TURNS)
    counts: _Counts = {}
    console = Console(stderr=True)
    rounds = track(range(ROUNDS), "", console=console, transient=True, disable=not sys.stderr.isatty())
    with tempfile.TemporaryDirectory(prefix="k42-objects-") as name:
        folder = Path(name)
        for _ in rounds:
            for processors in options.processors:
                for scenario, programs in scenarios(folder, nbytes, processors).items():
                    counts.setdefault((scenario, processors), []).append(accesses(scan(processors, programs)))
                objects = benchmark(folder, turns, processors)
                counts.setdefault(("benchmark", processors), []).append(localities(objects))
                counts.setdefault(("benchmark faults", processors), []).append(fault_localities(objects))
    return counts


def records(counts: _Counts) -> list[Record]:
    """The shares in %, of those objects that are shown for some number of processors."""
    shown: dict[str, dict[str, None]] = {}
    for (name, _), rounds in counts.items():
        wanted = list(rounds[0]) if name.startswith("benchmark") else main_objects(rounds)
        shown.setdefault(name, {}).update(dict.fromkeys(wanted))
    found = []
    for name, labels in shown.items():
        for label in labels:
            for (other, processors), rounds in counts.items():
                if other == name:
                    found.append(_record(f"{name}/{label}", processors, label, rounds))
    return found


def _shares(label: str, rounds: Sequence[Mapping[str, int]]) -> list[float]:
    return [100 * each.get(label, 0) / sum(each.values()) for each in rounds]


def _record(implementation: str, processors: int, label: str, rounds: Sequence[Mapping[str, int]]) -> Record:
    return Record.of(
        _shares(label, rounds),
        experiment="objects",
        implementation=implementation,
        processors=processors,
        metric="share",
        unit="%",
        parameters={"count": int(_medians(rounds).get(label, 0))},
    )


def findings(counts: _Counts) -> list[str]:
    """The last row of table I, and the share of the objects that live on one processor, a line each."""
    lines = []
    for (name, processors), rounds in counts.items():
        medians = _medians(rounds)
        total = sum(medians.values())
        if not name.startswith("benchmark"):
            shown = main_objects(rounds)
            lines.append(f"{name}, {processors} proc.: {len(shown)} objects for 80% of {total:.0f} accesses")
        else:
            first = next(iter(medians))
            share = statistics.median(_shares(first, rounds))
            lines.append(f"{name}, {processors} proc.: of {total:.0f} objects {share:.1f}% {first}")
    return lines


def run(options: Options) -> Report:
    """Count; `share` is in % of all accesses in a scenario, or of all objects of the benchmark."""
    counts = measure(options)
    return Report("objects: who uses which (table I), and where they live", records(counts), findings(counts))
