"""Whether a history is linearizable: whether each operation could have taken effect at one moment between its
invocation and its return, so that all results are those of one thread that makes the operations in that order.

The search is Wing and Gong's (Testing and verifying concurrent objects, 1993), with what made it practical:

- Configurations (which operations have taken effect, and the state that they led to) that were seen before are not
  searched again, and an operation takes effect no earlier than the return of some operation asks for it (Lowe,
  Testing for linearizability, 2017).
- What is a set of independent objects, such as a map by key, is searched part by part: it is linearizable when each
  part is (Herlihy and Wing, Linearizability, 1990; Horn and Kroening, Faster linearizability checking via
  P-compositionality, 2015).

How many configurations there are grows with the number of operations that overlap, not with the length of the history.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from k42.errors import Error
from k42.testing._history import History, Operation, outcome, table

_SHOWN = 16  # operations that a counter-example shows at least, if there are so many


class Blocked(Exception):
    """Raised by a specification: the operation waits in this state, and takes effect in another one."""


class NotLinearizable(Error, AssertionError):
    """A history that no order of its operations explains.

    Attributes:
        operations: those of the part (see `check`) that were invoked before the first return that no order explains.
        culprit: the operation whose return that is. Up to any earlier return the history can be explained.
    """

    def __init__(self, message: str, operations: tuple[Operation, ...], culprit: Operation) -> None:
        super().__init__(message)
        self.operations, self.culprit = operations, culprit


def check(
    history: History | Iterable[Operation],
    model: Callable[[], Any],
    *,
    key: Callable[[Operation], Hashable] | None = None,
    state: Callable[[Any], Hashable] | None = None,
) -> None:
    """Check that a history is linearizable.

    Args:
        history: what was recorded.
        model: makes a fresh specification of the object: plain Python, with a method for each operation, that need
            know nothing of threads. The class `dict` is one of a map. Where an operation of the object would wait,
            the method raises `Blocked`. A result agrees when it equals the method's (which may be
            `unittest.mock.ANY`), an error when it is an instance of the type that the method raises.
        key: names the part of the object that an operation uses; each part is checked by itself, with a
            specification of its own. By default there is one part.
        state: turns a specification into something hashable that is equal only where the specifications will
            always behave alike. By default that is made from all that it contains, in order. Where the order of a
            dict does not matter, `lambda d: frozenset(d.items())` makes the search shorter.

    Raises:
        NotLinearizable: it is not; the message shows why as a table.
        AttributeError: the specification has no method of an operation's name.

    >>> from k42.testing import Operation, check
    >>> put = Operation(0, "__setitem__", ("a", 1), invoked=0, returned=1)
    >>> check([put, Operation(1, "get", ("a",), result=1, invoked=2, returned=3)], dict)
    >>> check([put, Operation(1, "get", ("a",), result=None, invoked=2, returned=3)], dict)
    Traceback (most recent call last):
    k42.testing._linearizability.NotLinearizable: no order of these operations explains get('a') -> None
    thread 0                thread 1
    ┌ __setitem__('a', 1)
    └ -> None
                            ┌ get('a')
                            └ -> None
    get('a') of thread 1 should have been: -> 1
    """
    operations = history.operations() if isinstance(history, History) else tuple(history)
    parts: dict[Hashable, list[Operation]] = {}
    for op in operations:
        parts.setdefault(None if key is None else key(op), []).append(op)
    for part in parts.values():
        _Search(part, model, state).run()


class _Search:
    """The search for an order of the operations of one part."""

    def __init__(
        self, operations: list[Operation], model: Callable[[], Any], state: Callable[[Any], Hashable] | None
    ) -> None:
        self.operations = operations
        self.model = model
        self.state = state or self._freeze
        # At equal tickets operations overlap: an invocation comes first.
        self.events = sorted(
            [(op.invoked, False, i) for i, op in enumerate(operations)]
            + [(op.returned, True, i) for i, op in enumerate(operations) if op.returned is not None]
        )
        # What came in by arguments or went out as results is the same object in every copy of the specification.
        self.given = {
            id(value): value
            for op in operations
            for value in (*op.args, *op.kwargs.values(), op.result)
            if not isinstance(value, (int, str, bytes, float, type(None)))  # these are never copied
        }
        # By position among the events: which operations run there.
        self.running: list[tuple[int, ...]] = []
        now: dict[int, None] = {}
        for _, returns, i in self.events:
            self.running.append(tuple(now))
            if returns:
                del now[i]
            else:
                now[i] = None
        self.furthest = -1  # the last event that was reached and not passed
        self.instead: dict[int, set[str]] = {}  # by operation: what the specification said that it did not do

    def run(self) -> None:
        """Return when an order is found; raise when there is none."""
        # A configuration: the events up to `position` are explained, the operations in the bits of `done` have taken
        # effect and have not returned yet, and together they led to `spec`.
        stack: list[tuple[int, int, Any]] = [(0, 0, self.model())]
        seen: dict[tuple[int, int, Hashable], Any] = {}
        while stack:
            position, done, spec = stack.pop()
            position, done = self._pass_events(position, done)
            if position == len(self.events):
                return
            configuration = (position, done, self.state(spec))
            if configuration in seen:
                continue
            seen[configuration] = spec
            self.furthest = max(self.furthest, position)
            # This return needs its operation's effect: at once, which is tried first, or after that of others.
            returning = self.events[position][2]
            others = [i for i in self.running[position] if i != returning and not done >> i & 1]
            for i in (*others, returning):
                after = self._effect(i, spec)
                if after is not None:
                    stack.append((position, done | 1 << i, after))
        raise self._counter_example(seen)

    def _pass_events(self, position: int, done: int) -> tuple[int, int]:
        """Pass invocations, and returns of operations that have taken effect."""
        while position < len(self.events):
            _, returns, i = self.events[position]
            if returns:
                if not done >> i & 1:
                    break
                done ^= 1 << i
            position += 1
        return position, done

    def _effect(self, i: int, spec: Any) -> Any:
        """Return the specification after operation `i`, or None where that could not have had its outcome now."""
        op = self.operations[i]
        after = copy.deepcopy(spec, self.given.copy())
        method = getattr(after, op.name)
        result, error = None, None
        try:
            result = method(*op.args, **op.kwargs)
        except Blocked:
            self.instead.setdefault(i, set()).add("still waiting")
            return None
        except Exception as raised:
            error = raised
        if op.returned is None:
            return after
        if op.error is None:
            agrees = error is None and bool(result == op.result)
        else:
            agrees = error is not None and isinstance(op.error, type(error))
        if agrees:
            return after
        self.instead.setdefault(i, set()).add(outcome(result, error))
        return None

    def _freeze(self, value: Any) -> Hashable:
        """Make something hashable of all that a specification contains."""
        kind: Any = type(value)
        by_identity = kind.__hash__ is object.__hash__
        if callable(value) or (by_identity and id(value) in self.given):
            return value  # type: ignore[no-any-return]
        contents: Hashable = None
        if isinstance(value, dict):
            contents = tuple((key, self._freeze(item)) for key, item in value.items())
        elif isinstance(value, (list, tuple, deque)):
            contents = tuple(map(self._freeze, value))
        elif isinstance(value, (set, frozenset)):
            contents = frozenset(map(self._freeze, value))
        elif not by_identity and kind.__hash__ is not None:
            return value  # type: ignore[no-any-return] # it says itself what it equals
        attributes = value.__getstate__()
        if contents is None and attributes is None:
            hash(value)  # TypeError: only `state` can say what it is
            return value  # type: ignore[no-any-return]
        return kind, contents, None if attributes is None else self._freeze(attributes)

    def _counter_example(self, seen: dict[tuple[int, int, Hashable], Any]) -> NotLinearizable:
        at = self.events[self.furthest][2]
        culprit = self.operations[at]
        assert culprit.returned is not None
        operations = tuple(op for op in self.operations if op.invoked < culprit.returned)
        skipped, left = 0, ""
        # The table of a long history begins at a moment at which nothing ran: what was before is in the state.
        quiet = [p for p in range(self.furthest) if not self.running[p]]
        quiet = [p for p in quiet if sum(op.invoked >= self.events[p][0] for op in operations) >= _SHOWN]
        if len(operations) > _SHOWN and quiet:
            skipped = sum(op.invoked < self.events[quiet[-1]][0] for op in operations)
            first_return = next(p for p in range(quiet[-1], len(self.events)) if self.events[p][1])
            states = {_describe(spec) for (p, done, _), spec in seen.items() if p == first_return and not done}
            left = f"(after {skipped} operations before, which leave {' or '.join(sorted(states))})\n"
        rows = sorted(operations, key=lambda op: op.invoked)[skipped:]
        return NotLinearizable(
            f"no order of these operations explains {culprit}\n{left}{table(rows)}\n"
            f"{culprit.call()} of thread {culprit.thread} should have been: {' or '.join(sorted(self.instead[at]))}",
            operations,
            culprit,
        )


def _describe(spec: Any) -> str:
    """Return what a specification contains, to be read."""
    attributes = getattr(spec, "__dict__", None)
    return f"{type(spec).__name__}: {attributes}" if attributes else repr(spec)
