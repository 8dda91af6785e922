"""The command `k42`: experiments, simulations, the kernel process, compressed files, and a demo."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
import typer.core
from rich.console import Console
from rich.markup import escape

from k42.errors import Error

if TYPE_CHECKING:
    from k42.experiments._record import Record

_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS |= {_prefix: 1024**_power, f"{_prefix}IB": 1024**_power, f"{_prefix}B": 1000**_power}


class _Commands(typer.core.TyperGroup):
    """Ends a command as a shell expects it: 2 and one line for an error that k42 knows, 130 for Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Error as error:
            Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]k42:[/] {escape(str(error))}")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Software that scales because it is local: Clustered Objects, and virtual memory in user space.",
)


def parse_size(text: str) -> int:
    """A number of bytes from text such as `512M`, `2GiB` or `1.5 GB`.

    K, M, G and T, also as KiB and so on, are powers of 1024; KB and so on are powers of 1000.

    Raises:
        typer.BadParameter: it is not a size of at least one byte.

    >>> parse_size("64K"), parse_size("2GiB"), parse_size("1.5 MB")
    (65536, 2147483648, 1500000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE | re.ASCII)
    if not match or match[2].upper() not in _UNITS:
        raise typer.BadParameter(f"{text!r} is not a size; write one such as 512M, 2GiB or 1.5GB")
    nbytes = int(float(match[1]) * _UNITS[match[2].upper()])
    if nbytes < 1:
        raise typer.BadParameter(f"{text!r} is less than one byte")
    return nbytes


def parse_processors(text: str) -> tuple[int, ...]:
    """Numbers of processors from text such as `1,2`, ascending and each once.

    Raises:
        typer.BadParameter: it is not a list of positive numbers.

    >>> parse_processors("4,1,2,2")
    (1, 2, 4)
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list of numbers of processors, such as 1,2")
    return tuple(sorted({int(part) for part in parts}))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"k42 {importlib.metadata.version('k42')}")
        raise typer.Exit


@contextlib.contextmanager
def _records(records: Sequence[Record], json: Path | None) -> Iterator[TextIO]:
    """Write the records where ``--json`` says, before or after the text for people; yields where that goes."""
    from k42.experiments import _record

    if json == Path("-"):
        yield sys.stderr
        for record in records:
            print(record.to_json())
        return
    if json:
        _record.write_json(records, json)
    yield sys.stdout


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def experiment(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="One of: attach, counter, fault-rate, faults, grep, memclone, memclone-shared, objects, paging, "
            "remote, structures, survival.",
        ),
    ],
    machine: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Where to run it: real; sim, which is s85, the paper's machine, simulated; manycore; or FILE.toml.",
        ),
    ] = "real",
    processors: Annotated[
        Any,
        typer.Option(
            parser=parse_processors,
            metavar="N,...",
            help="How many work at the same time.",
            show_default="1 and all; of a simulated machine more in between",
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the records here, one a line; - for stdout.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the records into a file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less data and fewer rounds.")] = False,
    dask: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Have the workers of this Dask scheduler simulate, such as tcp://10.0.0.1:8786.",
            show_default="processes here",
        ),
    ] = None,
) -> None:
    """Run an experiment of the paper, and show what it found as a table."""
    # Only here, so that `k42 --help` answers at once.
    from k42.experiments import EXPERIMENTS, Options, _show, simulated
    from k42.experiments._runner import default_processors

    if name not in EXPERIMENTS:
        raise Error(f"there is no experiment {name!r}; there are: {', '.join(sorted(EXPERIMENTS))}")
    if machine == "real":
        if dask is not None:
            raise Error("--dask is for simulated machines: add --machine sim")
        report = EXPERIMENTS[name](Options(processors or default_processors(), quick))
    elif name in simulated.EXPERIMENTS:
        from k42 import sim

        model = sim.load("s85" if machine == "sim" else machine)
        report = simulated.run(name, model, Options(processors or simulated.default_processors(model), quick, dask))
    else:
        known = ", ".join(sorted(simulated.EXPERIMENTS))
        raise Error(f"{name} does not run on a simulated machine, those that do: {known}; run it with --machine real")
    # The files first: whoever reads the terminal may have had enough after some lines.
    with _records(report.records, json) as text:
        if plot:
            _show.plot(report.records, plot)
        console = Console(file=text)
        console.print(_show.table(report.title, report.records))
        for finding in report.findings:
            console.print(f"  {finding}", highlight=False, soft_wrap=True)


@app.command()
def sim(
    function: Annotated[
        str,
        typer.Argument(
            metavar="FILE:FUNCTION",
            help="What runs on each processor, called with the number of its processor. What processors share is in "
            "the globals of the file, which is run anew for each number of processors.",
        ),
    ],
    processors: Annotated[
        Any,
        typer.Option(
            parser=parse_processors,
            metavar="N,...",
            help="How many there are, beside one alone.",
            show_default="powers of two, and all that the machine has",
        ),
    ] = None,
    machine: Annotated[
        str, typer.Option(metavar="NAME|FILE.toml", help="Where to run it: a machine's name or description.")
    ] = "s85",
    padded: Annotated[
        bool,
        typer.Option("--padded", help="Put each object on cache lines of its own: is it only lines that are shared?"),
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw time and speed-up into a file.")] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the records here, one a line; - for stdout.")
    ] = None,
) -> None:
    """Run a function on simulated processors: does it scale, and which attribute do they wait for if it does not?"""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from k42.sim.machine import load
    from k42.sim.scale import powers, scale_file

    file, _, name = function.rpartition(":")
    if not file or not name:
        raise typer.BadParameter(f"{function!r} is not a file and a function of it, such as work.py:work")
    where = load(machine)
    counts = sorted({1, *(processors or powers(where.processors))})
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(escape(name), total=len(counts))
        result = scale_file(
            Path(file),
            name,
            processors=counts,
            machine=where,
            padded=padded,
            progress=lambda _: progress.advance(task),
        )
    with _records(result.records(), json) as text:
        if plot:
            result.plot(plot)
        print(result, file=text)


@app.command()
def serve(
    budget: Annotated[
        Any,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="Memory for pages, such as 512M or 2GiB.",
            show_default="a quarter of the machine's",
        ),
    ] = None,
    socket: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Where clients connect; by default the user's own.")
    ] = None,
    linger: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", min=0.1, help="End when there has been no client for so long.", show_default="never"
        ),
    ] = None,
    all_cpus: Annotated[
        bool, typer.Option("--all-cpus", help="Serve every CPU, not only those that this process may use.")
    ] = False,
    objects: Annotated[
        str,
        typer.Option(
            metavar="VARIANT",
            help="What objects are made of: default, shared, distributed; or single ones: default,region=shared.",
        ),
    ] = "default",
    adapt: Annotated[
        bool, typer.Option("--adapt", help="Make objects distributed or shared while they serve, by who uses them.")
    ] = False,
    homing: Annotated[
        bool,
        typer.Option(
            "--homing/--no-homing",
            help="Serve each 2 MiB of a mapping on the CPU of the threads that fault there, wherever it was mapped.",
        ),
    ] = True,
    sticky: Annotated[
        bool,
        typer.Option(
            "--sticky/--no-sticky",
            help="Keep a thread on one CPU, of those that its program allows, as long as its faults follow each other.",
        ),
    ] = True,
    swap: Annotated[
        bool,
        typer.Option(
            "--swap/--no-swap",
            help="When frames run out, write memory made with overcommit to a file in K42_SWAP_DIR or /var/tmp.",
        ),
    ] = True,
    policy: Annotated[
        str, typer.Option(metavar="NAME", help="Which pages are given back first: fifo, clock or s3fifo.")
    ] = "fifo",
    client_limit: Annotated[
        Any,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="Memory that the pages of one client may take.",
            show_default="none but its share when memory is short",
        ),
    ] = None,
    supervise: Annotated[
        bool, typer.Option("--supervise", help="If it dies, start another that goes on with its clients.")
    ] = False,
) -> None:
    """Run the kernel process, which serves the page faults of its clients, until it is ended."""
    from k42.vm import kernel
    from k42.vm.fcm import Policy
    from k42.vm.launch import supervisor_command
    from k42.vm.variants import Variants

    try:
        Variants.named(objects)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--objects") from None
    try:
        Policy.named(policy)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--policy") from None
    if supervise:
        # This process becomes the supervisor, which starts the kernel with the other arguments, as they were given.
        command = [*supervisor_command(), *(argument for argument in sys.argv[2:] if argument != "--supervise")]
        os.execv(command[0], command)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    kernel.serve(
        socket=str(socket) if socket else None,
        budget=budget,
        linger=linger,
        all_cpus=all_cpus,
        homing=homing,
        sticky=sticky,
        objects=objects,
        adapt=adapt,
        swap=swap,
        policy=policy,
        client_limit=client_limit,
    )


@app.command()
def compress(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What to compress; it stays as it is.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write.", show_default="FILE.zst")
    ] = None,
    level: Annotated[int, typer.Option(min=1, max=19, help="Of zstd, from fast to small.")] = 3,
    group: Annotated[
        Any,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="What is compressed together, and later read together: whole pages of 4K, at most 64M.",
        ),
    ] = "128K",
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace what is at the output.")] = False,
) -> None:
    """Compress a file so that it can be mapped: `zstd+file:///path/FILE.zst`. `zstd -d` unpacks it, too."""
    from rich.filesize import decimal
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from k42.vm.fr.compressed import MAX_GROUP
    from k42.vm.fr.compressed import compress as write
    from k42.vm.protocol import PAGE

    if group % PAGE or group > MAX_GROUP * PAGE:
        raise typer.BadParameter(f"whole pages of 4K, at most 64M, not {group} bytes", param_hint="--group")
    target = output or file.with_name(f"{file.name}.zst")
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    try:
        if target.exists() and (target.samefile(file) or not force):
            # Now, not after minutes of work.
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task(escape(file.name), total=file.stat().st_size)
            read, written = write(
                file,
                target,
                group=group // PAGE,
                level=level,
                overwrite=force,
                progress=lambda count: progress.advance(task, count),
            )
    except FileExistsError as error:
        cure = "choose another --output" if force else "--force replaces it, --output writes elsewhere"
        raise Error(f"{target} is there already: {cure}") from error
    except OSError as error:
        raise error if isinstance(error, Error) else Error(f"{error.filename or file}: {error.strerror}") from error
    Console().print(f"{escape(str(target))}: {decimal(read)} in {decimal(written)}", highlight=False, soft_wrap=True)


@app.command()
def stat(
    socket: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Where the kernel listens; by default the user's own.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Have it look whether all its frames are accounted for; 1 if not.")
    ] = False,
) -> None:
    """Show what a running kernel counts: its frames, its clients and the files they map."""
    from k42.vm import _show, connect, protocol

    with connect(socket or protocol.default_socket()) as client:
        if not check:
            Console(soft_wrap=True).print(_show.tables(client.stat()))
            return
        good, bad = client.check()
    for text in good:
        print(f"ok: {text}")
    for text in bad:
        print(f"VIOLATED: {text}")
    if bad:
        raise typer.Exit(1)


@app.command()
def demo() -> None:
    """Search a file and touch new memory on Linux and on k42: a table, and a plot in out/demo.png."""
    from k42.experiments import demo as demonstration

    Console().print(demonstration.run(Path("out/demo.png")))


def main() -> None:
    """The entry point of the command."""
    app()
