"""Histories: which operations threads made on an object, what came of them, and which were over before others began.

A history is one list, to which a thread appends an entry when it invokes an operation and again when that returns:
the places in the list are the tickets. Appending is atomic on every build of Python, and whoever appends knows of all
that was done before the entries that are there. So an operation that returned before another was invoked also
*happened before* it, in the sense of memory models; a clock would not promise that. The price: recording orders
threads a little more than they would be by themselves, and cannot show what depends on their being unordered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False, slots=True)
class Operation:
    """One operation of a history.

    Attributes:
        thread: who made it, a small number.
        name: of the method, as the specification calls it.
        args, kwargs: what it was called with.
        result: what it returned, unless it raised.
        error: what it raised, else None.
        invoked: its ticket at the beginning.
        returned: its ticket at the end, larger; None when it had not ended: then it may have taken effect or not.
    """

    thread: int
    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    result: Any = None
    error: BaseException | None = None
    invoked: int = 0
    returned: int | None = None

    def __str__(self) -> str:
        return f"{self.call()} {self.outcome()}"

    def call(self) -> str:
        """Return the call as Python writes it."""
        named = [f"{name}={value!r}" for name, value in self.kwargs.items()]
        return f"{self.name}({', '.join([*map(repr, self.args), *named])})"

    def outcome(self) -> str:
        """Return what came of it, in a few words."""
        return "has not returned" if self.returned is None else outcome(self.result, self.error)


def outcome(result: Any, error: BaseException | None) -> str:
    """Return the result or the error of an operation, in a few words."""
    return f"-> {result!r}" if error is None else f"raised {error!r}"


class _Call:
    """An operation while it runs; written by its thread alone, complete when its second entry is in the log."""

    __slots__ = ("args", "error", "kwargs", "name", "result", "thread")

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.thread = threading.get_ident()
        self.name, self.args, self.kwargs = name, args, kwargs
        self.result: Any = None
        self.error: BaseException | None = None


class History:
    """A recorder of operations, for any number of threads.

    Arguments and results are kept, not copied: they must not change afterwards.

    >>> from k42.testing import History
    >>> history = History()
    >>> d = history.record({})
    >>> d["a"] = 1
    >>> d.pop("a")
    1
    >>> d["a"]
    Traceback (most recent call last):
    KeyError: 'a'
    >>> for operation in history.operations():
    ...     print(operation)
    __setitem__('a', 1) -> None
    pop('a') -> 1
    __getitem__('a') raised KeyError('a')
    """

    def __init__(self) -> None:
        self._log: list[_Call] = []  # two entries a call

    def call(self, name: str, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call `function` with the arguments, record that as the operation `name`, and return its result.

        Raises what `function` raises; that is recorded, too.
        """
        call = _Call(name, args, kwargs)
        self._log.append(call)
        try:
            result = call.result = function(*args, **kwargs)
        except BaseException as error:
            call.error = error
            raise
        finally:
            self._log.append(call)
        return result

    def record(self, obj: _T) -> _T:
        """Return a stand-in for `obj` whose methods call those of `obj` and are recorded.

        Besides the methods that are called by name, `obj[key]`, `obj[key] = value`, `del obj[key]`, `key in obj`
        and `len(obj)` are recorded, under the names `__getitem__` and so on. Attributes that cannot be called are
        read from `obj`, unrecorded.
        """
        return cast(_T, _Recorded(self, obj))

    def operations(self) -> tuple[Operation, ...]:
        """Return the operations in the order of their invocations; while threads go on, those of one moment."""
        log = self._log.copy()
        invoked: dict[_Call, int] = {}
        returned: dict[_Call, int] = {}
        for ticket, call in enumerate(log):
            (returned if call in invoked else invoked)[call] = ticket
        threads: dict[int, int] = {}
        return tuple(
            Operation(
                thread=threads.setdefault(call.thread, len(threads)),
                name=call.name,
                args=call.args,
                kwargs=call.kwargs,
                result=call.result if call in returned else None,
                error=call.error if call in returned else None,
                invoked=ticket,
                returned=returned.get(call),
            )
            for call, ticket in invoked.items()
        )


class _Recorded:
    """The stand-in that `History.record` returns."""

    __slots__ = ("_history", "_obj")

    def __init__(self, history: History, obj: Any) -> None:
        self._history, self._obj = history, obj

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._obj, name)
        return partial(self._history.call, name, attribute) if callable(attribute) else attribute

    def __getitem__(self, key: Any) -> Any:
        return self._history.call("__getitem__", self._obj.__getitem__, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._history.call("__setitem__", self._obj.__setitem__, key, value)

    def __delitem__(self, key: Any) -> None:
        self._history.call("__delitem__", self._obj.__delitem__, key)

    def __contains__(self, key: Any) -> bool:
        return cast(bool, self._history.call("__contains__", self._obj.__contains__, key))

    def __len__(self) -> int:
        return cast(int, self._history.call("__len__", self._obj.__len__))


def table(operations: Iterable[Operation]) -> str:
    """Draw operations as a table: a column for each thread, time runs down, a line for each ticket.

    >>> from k42.testing import Operation
    >>> print(table([
    ...     Operation(0, "add", (1,), invoked=0, returned=2),
    ...     Operation(1, "value", result=0, invoked=1, returned=3),
    ... ]))
    thread 0    thread 1
    ┌ add(1)
    │           ┌ value()
    └ -> None   │
                └ -> 0
    """
    operations = list(operations)
    events = sorted(
        [(op.invoked, 0, op) for op in operations]
        + [(op.returned, 1, op) for op in operations if op.returned is not None],
        key=lambda event: event[:2],
    )
    columns = {thread: i for i, thread in enumerate(sorted({op.thread for op in operations}))}
    rows = [[f"thread {thread}" for thread in columns]]
    inside = [0] * len(columns)  # calls of each thread that run: more than one where they are nested
    for _, ends, op in events:
        column = columns[op.thread]
        cells = ["│ " * depth for depth in inside]
        inside[column] -= ends
        cells[column] = "│ " * inside[column] + (f"└ {op.outcome()}" if ends else f"┌ {op.call()}")
        inside[column] += 1 - ends
        rows.append(cells)
    widths = [max(map(len, column)) + 3 for column in zip(*rows, strict=True)]
    return "\n".join(
        "".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
