"""Does it scale, and if not, why not? A function runs on each of ever more simulated processors."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k42.errors import Error
from k42.sim.attribution import Stall
from k42.sim.charging import plain_class
from k42.sim.containers import ATOMS, family
from k42.sim.machine import Machine, load
from k42.sim.simulation import Simulation

if TYPE_CHECKING:
    from k42.experiments._record import Record

_ROWS = 8  # of the table of stalls that is printed
_MATTERS = 0.1  # the share of all stalls from which on one is spoken of


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How the time of a function changes with the number of processors that run it.

    Attributes:
        name: of the function.
        machine: where it ran.
        cycles: of each processor, by the number of processors.
        stalls: with the most processors, what the accesses to each attribute cost; the most expensive first.
    """

    name: str
    machine: Machine
    cycles: dict[int, list[int]]
    stalls: list[Stall]

    def time(self, processors: int) -> float:
        """Return the mean time of a processor, in µs."""
        cycles = self.cycles[processors]
        return sum(cycles) / len(cycles) / self.machine.mhz

    def speed_up(self, processors: int) -> float:
        """Return how much more is done in the same time: n × t(1) / t(n)."""
        return processors * self.time(1) / self.time(processors)

    @property
    def stalled(self) -> float:
        """The share of stalls in the time of the most processors, from 0 to 1."""
        return sum(row.stalled for row in self.stalls) / sum(self.cycles[max(self.cycles)])

    def findings(self) -> list[str]:
        """Return sentences that say what the most processors wait for."""
        said = [f"With {_counted(max(self.cycles))}, {self.stalled:.0%} of the time is stalls."]
        alike: dict[str, list[Stall]] = {}
        for row in self.stalls:
            alike.setdefault(row.common_label, []).append(row)
        shares = {label: sum(row.share for row in rows) for label, rows in alike.items()}
        for label, rows in sorted(alike.items(), key=lambda item: -shares[item[0]])[:3]:
            if shares[label] >= _MATTERS:
                writers = max(row.writers for row in rows)
                by = f"written by {_counted(writers)}" if writers else "written by none, but maybe what is on its line"
                objects = f" of {len(rows)} objects" if len(rows) > 1 else ""
                said.append(f"{label}{objects}: {shares[label]:.0%} of stalls, {'each ' if objects else ''}{by}.")
        return said

    def records(self) -> list[Record]:
        """Return the times, the speed-ups and the stalls in the form in which experiments have theirs."""
        from k42.experiments._record import Record

        def record(what: str, processors: int, metric: str, unit: str, value: float, **parameters: int) -> Record:
            return Record(self.name, self.machine.name, what, processors, metric, unit, value, 1, 0.0, parameters)

        most = max(self.cycles)
        times = [record(f"time/{self.name}", n, "time", "us", self.time(n)) for n in self.cycles]
        ratios = [record(f"speed-up/{self.name}", n, "speed_up", "times", self.speed_up(n)) for n in self.cycles]
        stalls = [
            record(f"stalls/{s.label}", most, "stalled", "cycles", s.stalled, accesses=s.accesses, writers=s.writers)
            for s in self.stalls
        ]
        return times + ratios + stalls

    def plot(self, path: Path | str) -> None:
        """Draw time and speed-up against processors into a file of the kind that its name ends with.

        Raises:
            Error: matplotlib is missing, or the file cannot be written.
        """
        from k42.experiments import _show

        drawn = [record for record in self.records() if record.metric != "stalled"]
        drawn += [
            dataclasses.replace(record, implementation="speed-up/ideal", value=float(record.processors))
            for record in drawn
            if record.metric == "speed_up"
        ]
        _show.plot(drawn, Path(path))

    def __str__(self) -> str:
        lines = [f"{self.name} on {self.machine.name}", f"{'processors':>10}  {'µs':>12}  {'speed-up':>8}"]
        lines += [f"{n:>10}  {self.time(n):>12.2f}  {self.speed_up(n):>8.2f}" for n in self.cycles]
        shown = self.stalls[:_ROWS]
        if shown:
            width = max(9, *(len(row.label) for row in shown))
            lines.append(f"{'attribute':<{width}}  {'accesses':>10}  {'stalled':>12}  {'share':>6}  {'writers':>7}")
            lines += [
                f"{row.label:<{width}}  {row.accesses:>10}  {row.stalled:>12}  {row.share:>6.1%}  {row.writers:>7}"
                for row in shown
            ]
        return "\n".join(lines + self.findings())


def scale(
    work: Callable[..., object],
    make: Callable[[], Any] | None = None,
    *,
    processors: Sequence[int] | None = None,
    machine: str | Path | Machine = "s85",
    padded: bool = False,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Scaling:
    """Run a function on ever more simulated processors; see how long it takes, and what it waits for.

    What processors share is charged for as `Simulation.share` says, while the function runs: what `make` returns, and
    what the function, the functions and classes of its module that it uses, and the classes of what is shared name in
    their closures, in the globals of their module, and in the classes themselves. Afterwards all of it is as it was,
    apart from what the function did to it.

    Each access stands alone. An update without a lock, such as ``registry.hits += 1``, is a load and a store, and what
    others stored in between is lost, as on a free-threaded interpreter; but the same seed loses the same.

    Args:
        work: called once on each processor: ``work(shared, processor)`` if there is `make`, else ``work(processor)``.
        make: makes what is shared, anew for each number of processors; None: `work` keeps what it finds from one to
            the next.
        processors: how many, beside one alone; None: powers of two, and all that the machine has.
        machine: on what: its name, the TOML file that describes it, or itself.
        padded: put each object and container on lines of its own: what is slow no more shared only lines.
        seed: of what varies by chance.
        progress: called with each number of processors when it is done.

    Raises:
        Error: there is no such machine, it does not have so many processors, or something cannot be simulated.
        BaseException: what `work` or `make` raised.

    >>> class Registry:
    ...     hits = 0
    >>> def work(registry, processor):
    ...     for _ in range(50):
    ...         registry.hits += 1
    >>> result = scale(work, Registry, processors=[1, 4])
    >>> result.speed_up(4) < 1
    True
    >>> result.stalls[0].label, result.stalls[0].writers
    ('Registry.hits', 4)
    """

    def prepare() -> Callable[..., object]:
        return work

    return _scale(prepare, make, _name(work), processors, machine, padded, seed, progress)


def scale_file(
    path: Path,
    function: str,
    *,
    processors: Sequence[int] | None = None,
    machine: str | Path | Machine = "s85",
    padded: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Scaling:
    """As `scale`, of a function in a file, which is run anew for each number of processors.

    Args:
        path: of the file.
        function: its name; called once on each processor, with the processor's number.
        processors: as in `scale`.
        machine: as in `scale`.
        padded: as in `scale`.
        progress: as in `scale`.

    Raises:
        Error: there is no such file or function, it fails, or it cannot be simulated.
    """
    from k42.sim import _files

    try:
        return _scale(lambda: _files.function(path, function), None, function, processors, machine, padded, 0, progress)
    except Error:
        raise
    except Exception as error:
        raise Error(f"{function} fails on a simulated processor: {_files.describe(error, path)}") from error


def _scale(
    prepare: Callable[[], Callable[..., object]],
    make: Callable[[], Any] | None,
    name: str,
    processors: Sequence[int] | None,
    machine: str | Path | Machine,
    padded: bool,
    seed: int,
    progress: Callable[[int], object] | None,
) -> Scaling:
    where = machine if isinstance(machine, Machine) else load(machine)
    counts = sorted({1, *(processors or powers(where.processors))})
    for count in counts:
        Simulation(where, count)  # before any of them has run: whether it has so many
    cycles: dict[int, list[int]] = {}
    stalls: list[Stall] = []
    for count in counts:
        sim = Simulation(where, count, seed=seed)
        work = prepare()
        shared = () if make is None else (sim.share(make(), padded=padded),)
        with _sharing(sim, work, padded):
            cycles[count] = sim.run(functools.partial(work, *shared))
        if not any(cycles[count]):
            raise Error(
                f"{name} takes no time: it accesses nothing that it is known to share, and calls no k42.sim.work"
            )
        stalls = sim.stalls()
        if progress is not None:
            progress(count)
    return Scaling(name, where, cycles, stalls)


def powers(most: int) -> list[int]:
    """Return the powers of two up to a number, and it."""
    return [1 << i for i in range(most.bit_length()) if 1 << i < most] + [most]


def _name(work: Callable[..., object]) -> str:
    return str(getattr(work, "__qualname__", type(work).__qualname__)).rpartition(".")[2]


def _counted(processors: int) -> str:
    return f"{processors} processor{'s' if processors != 1 else ''}"


@contextlib.contextmanager
def _sharing(sim: Simulation, work: Callable[..., object], padded: bool) -> Iterator[None]:
    """For a while, charge for what a function finds by itself."""
    put_back: list[Callable[[], object]] = []
    try:
        for name, value, put in _found(sim, work):
            known = family(plain_class(value)) is not None or type(value).__module__ == "_thread"
            new = sim.share(value, padded=padded, name=name if known else None)
            if new is not value:
                put(new)
                put_back.append(functools.partial(put, value))
        yield
    finally:
        sim.unshare()
        for undo in put_back:
            undo()


_Place = tuple[str, Any, Callable[[Any], object]]  # name, value, what stores another one there


def _found(sim: Simulation, work: Callable[..., object]) -> Iterator[_Place]:
    """What a function, and the classes of what is shared, lead to by themselves; each once."""
    function: Any = work
    if isinstance(work, types.MethodType):
        yield _name(work), work.__self__, lambda _: None
        function = work.__func__
    elif not isinstance(work, types.FunctionType):
        yield _name(work), work, lambda _: None
        function = type(work).__call__
    if not isinstance(function, types.FunctionType):
        raise Error(f"{type(work).__name__} is not a function that is written in Python: write one that calls it")
    modules = {function.__module__}
    seen = {id(function)}
    pending: list[Any] = [function]
    while pending:
        value = pending.pop(0)
        for place in _of_class(value) if isinstance(value, type) else _of_function(value):
            held = place[1]
            if id(held) in seen:
                continue
            seen.add(id(held))
            if isinstance(held, (types.FunctionType, type)):
                if held.__module__ in modules and not isinstance(held, enum.EnumMeta):
                    pending.append(held)
            elif plain_class(held) not in ATOMS:
                yield place
        for cls in sim._charger.classes() if not pending else ():
            modules.add(cls.__module__)
            if id(cls) not in seen:
                seen.add(id(cls))
                pending.append(cls)


def _of_function(function: types.FunctionType) -> Iterator[_Place]:
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # empty yet
            yield name, cell.cell_contents, functools.partial(setattr, cell, "cell_contents")
    space = function.__globals__
    for name in _names(function.__code__):
        if name in space:
            yield name, space[name], functools.partial(space.__setitem__, name)


def _of_class(cls: type) -> Iterator[_Place]:
    for base in cls.__mro__[1:-1]:
        yield base.__name__, base, lambda _: None
    for name, value in list(vars(cls).items()):
        if isinstance(value, (staticmethod, classmethod)):
            yield name, value.__func__, lambda _: None
        elif isinstance(value, property):
            for each in (value.fget, value.fset, value.fdel):
                yield name, each, lambda _: None
        elif isinstance(value, functools.cached_property):
            yield name, value.func, lambda _: None
            if hasattr(value, "lock"):  # before Python 3.12, one for all instances
                yield name, value.lock, functools.partial(setattr, value, "lock")
        elif callable(value) or not name.startswith("__"):
            yield name, value, functools.partial(setattr, cls, name)


def _names(code: types.CodeType) -> list[str]:
    """The globals and attributes that code names, in their order."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names(constant)
    return names
