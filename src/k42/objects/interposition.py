"""Interposition: an arbiter gets the calls on an object instead of its representatives (section 2.2.1 of the paper)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Self

from k42 import _native
from k42.errors import Destroyed
from k42.objects.root import Root


class Call:
    """One call on an interposed object, as its arbiter gets it.

    Attributes:
        ref: the reference.
        name: of the method.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    __slots__ = ("_arbiters", "_root", "args", "kwargs", "name", "ref")

    def __init__(
        self,
        ref: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        arbiters: tuple[Arbiter, ...],
        root: Root,
    ) -> None:
        self.ref = ref
        self.name = name
        self.args = args
        self.kwargs = kwargs
        self._arbiters = arbiters
        self._root = root

    def proceed(self) -> Any:
        """Make the call, with the `args` and `kwargs` that it has now, and return its result.

        It goes to the arbiter below, or to the representative of the calling processor. An arbiter may proceed once,
        several times, or never; but not once the call has returned.
        """
        if self._arbiters:
            *below, last = self._arbiters
            return last(Call(self.ref, self.name, self.args, self.kwargs, tuple(below), self._root))
        rep = _rep(self._root)
        result = getattr(rep, self.name)(*self.args, **self.kwargs)
        return self.ref if result is rep else result

    def __repr__(self) -> str:
        return f"<call {self.name} on {self.ref!r}>"


Arbiter = Callable[[Call], Any]


class Interposition:
    """An arbiter at work, until its `release`; also a context manager that releases it at the end."""

    __slots__ = ("_arbiter", "_arbitration")

    def __init__(self, arbitration: _Arbitration, arbiter: Arbiter) -> None:
        self._arbitration = arbitration
        self._arbiter = arbiter

    def release(self) -> None:
        """Take the arbiter out: calls that begin from now on do not go to it.

        A second release does nothing, nor does one after the object has been destroyed.
        """
        self._arbitration.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __call__(self, call: Call) -> Any:
        """Give the arbiter a call."""
        return self._arbiter(call)


def interpose(ref: Any, arbiter: Arbiter) -> Interposition:
    """Have an arbiter get the calls on an object, from all who have a reference to it.

    Calls that run already go on as they are. Arbiters stack: the last one gets a call first, and passes it on with
    `call.proceed()`; it may change the arguments, the result, or not proceed at all. Calls that the object makes
    through its own reference go to the arbiters, too. Reading or setting an attribute is not a call.

    Args:
        ref: the reference.
        arbiter: gets each call, and returns its result.

    Returns:
        The interposition, whose `release()` ends it.

    Raises:
        Destroyed: the object has been destroyed.
        TypeError: `ref` is no reference, or `arbiter` cannot be called.

    >>> import k42
    >>> from k42.structures import Counter
    >>> hits, seen = Counter.create(), []
    >>> def arbiter(call):
    ...     seen.append(call.name)
    ...     return call.proceed()
    >>> with k42.interpose(hits, arbiter):
    ...     hits.add(2)
    >>> hits.value(), seen
    (2, ['add'])
    >>> k42.destroy(hits)
    True
    """
    if not callable(arbiter):
        raise TypeError(f"an arbiter is called with each call: {arbiter!r} cannot be called")
    with _lock:
        arbitration = _native.arbitration_of(ref)
        if arbitration is None:
            arbitration = _Arbitration(ref)
        interposition = Interposition(arbitration, arbiter)
        arbitration.arbiters = (*arbitration.arbiters, interposition)
        if len(arbitration.arbiters) == 1:
            _native.arbitrate(ref, arbitration, True)
    return interposition


# Protects which arbitration an object has, and its arbiters; before every lock of the core. Reentrant: a finaliser that
# runs under it may interpose.
_lock = threading.RLock()


class _Arbitration:
    """The arbiters of one object, and the generic representative that gives them the calls.

    It is made once for an object, and waits for the next arbiter when the last one has been released.
    """

    def __init__(self, ref: Any) -> None:
        self.ref = ref
        self.target = _Target(self)
        self.arbiters: tuple[Interposition, ...] = ()

    def handle_miss(self) -> _Target:
        """The runtime asks this instead of the root."""
        return self.target

    def remove(self, interposition: Interposition) -> None:
        """Takes one out; after the last one calls are direct again."""
        with _lock:
            if interposition not in self.arbiters:
                return
            self.arbiters = tuple(i for i in self.arbiters if i is not interposition)
            if not self.arbiters:
                with contextlib.suppress(Destroyed):
                    _native.arbitrate(self.ref, self, False)


class _Target:
    """The generic representative of an interposed object: whatever is called is given to the arbiters."""

    __slots__ = ("_arbitration",)

    def __init__(self, arbitration: _Arbitration) -> None:
        object.__setattr__(self, "_arbitration", arbitration)

    def __getattribute__(self, name: str) -> Any:
        arbitration: _Arbitration = object.__getattribute__(self, "_arbitration")
        ref = arbitration.ref
        root = _native.root_of(ref)
        if isinstance(type(ref).__dict__.get(name), _native.Attribute):
            return getattr(_rep(root), name)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return Call(ref, name, args, kwargs, arbitration.arbiters, root).proceed()

        return forward

    def __setattr__(self, name: str, value: Any) -> None:
        arbitration: _Arbitration = object.__getattribute__(self, "_arbitration")
        setattr(_rep(_native.root_of(arbitration.ref)), name, value)


def _rep(root: Root) -> Any:
    rep = root.handle_miss()
    return rep.rep if isinstance(rep, _native.uninstalled) else rep
