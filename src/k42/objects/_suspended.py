"""Generators and coroutines of Clustered Objects: each is a request that lasts until it has ended.

A request belongs to the thread that runs it, and a generator may be resumed by any, or by none for hours. So between
two resumptions what keeps the object is a hold, which names what it waits for; and each resumption is a request of
the thread that makes it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any

from k42 import _native


class _Suspended:
    """What all kinds have in common: the generator or coroutine itself, and its hold."""

    __slots__ = ("__weakref__", "_hold", "_inner")

    _frame: str  # the name of the attribute of `_inner` that is None once it has ended
    _hold: _native.Hold
    _inner: Any

    def __init__(self, inner: Any, hold: _native.Hold) -> None:
        self._inner = inner
        self._hold = hold

    def __repr__(self) -> str:
        return f"<{self._hold.name} of {self._hold.reference!r}: {self._inner!r}>"

    def __getattr__(self, name: str) -> Any:
        if name in ("_hold", "_inner"):
            raise AttributeError(name)  # of an instance that was never initialised
        return getattr(self._inner, name)  # gi_frame, cr_await and the like

    def _end_if_ended(self) -> None:
        if getattr(self._inner, self._frame) is None:
            self._hold.end()


class _Stepped(_Suspended):
    """A generator or a coroutine: it goes on step by step."""

    __slots__ = ()

    def _step(self, step: Callable[..., Any], *args: Any) -> Any:
        try:
            with self._hold:
                return step(*args)
        finally:
            self._end_if_ended()

    def send(self, value: Any) -> Any:
        return self._step(self._inner.send, value)

    def throw(self, *error: Any) -> Any:
        return self._step(self._inner.throw, *_one(error))

    def close(self) -> Any:
        return self._step(self._inner.close)

    def __del__(self) -> None:
        if hasattr(self, "_hold"):
            with self._hold:
                del self._inner  # closes it
            self._hold.end()


class SuspendedGenerator(_Stepped, Generator[Any, Any, Any]):
    """A generator of a Clustered Object."""

    __slots__ = ()
    _frame = "gi_frame"


class SuspendedCoroutine(_Stepped, Coroutine[Any, Any, Any]):
    """A coroutine of a Clustered Object."""

    __slots__ = ()
    _frame = "cr_frame"

    def __await__(self) -> Generator[Any, Any, Any]:
        return _Awaited(self)


class _Awaited(Generator[Any, Any, Any]):
    """What `await` iterates over."""

    __slots__ = ("_coroutine",)

    def __init__(self, coroutine: Any) -> None:
        self._coroutine = coroutine

    def send(self, value: Any) -> Any:
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        return self._coroutine.throw(*error)

    def close(self) -> Any:
        return self._coroutine.close()


class SuspendedAsyncGenerator(_Suspended, AsyncGenerator[Any, Any]):
    """An asynchronous generator of a Clustered Object.

    For the event loop it takes the place of the one in it: the loop closes this one, when nobody has it any more or at
    the loop's end, so that what runs then is a request, too.
    """

    __slots__ = ("_finalizer",)
    _frame = "ag_frame"

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    def __anext__(self) -> Coroutine[Any, Any, Any]:
        return self._begin(self._inner.__anext__)

    def asend(self, value: Any) -> Coroutine[Any, Any, Any]:
        return self._begin(self._inner.asend, value)

    def athrow(self, *error: Any) -> Coroutine[Any, Any, Any]:
        return self._begin(self._inner.athrow, *_one(error))

    def aclose(self) -> Coroutine[Any, Any, None]:
        return self._begin(self._inner.aclose)

    def _begin(self, step: Callable[..., Any], *args: Any) -> Coroutine[Any, Any, Any]:
        if hasattr(self, "_finalizer"):
            return _AsyncStep(step(*args), self)
        hooks = sys.get_asyncgen_hooks()
        if hooks.firstiter is not None:
            hooks.firstiter(self)
        self._finalizer = hooks.finalizer
        sys.set_asyncgen_hooks(None, None)  # those of the calling thread, which this step would give to `_inner`
        try:
            return _AsyncStep(step(*args), self)
        finally:
            sys.set_asyncgen_hooks(*hooks)

    def __del__(self) -> None:
        finalizer = getattr(self, "_finalizer", None)
        if finalizer is not None and self._inner.ag_frame is not None:
            finalizer(self)
        elif hasattr(self, "_hold"):
            with self._hold:
                del self._inner
            self._hold.end()


class _AsyncStep(Coroutine[Any, Any, Any], Generator[Any, Any, Any]):
    """One step of an asynchronous generator, to be awaited: each of its own steps is a request."""

    __slots__ = ("_generator", "_inner")

    def __init__(self, inner: Any, generator: SuspendedAsyncGenerator) -> None:
        self._inner = inner
        self._generator = generator

    def __await__(self) -> Generator[Any, Any, Any]:
        return self

    def _step(self, step: Callable[..., Any], *args: Any) -> Any:
        try:
            with self._generator._hold:
                return step(*args)
        finally:
            self._generator._end_if_ended()

    def send(self, value: Any) -> Any:
        return self._step(self._inner.send, value)

    def throw(self, *error: Any) -> Any:
        return self._step(self._inner.throw, *_one(error))

    def close(self) -> Any:
        return self._step(self._inner.close)


def _one(error: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of throw() as one exception: those of old, a type, a value and a traceback, are deprecated."""
    if len(error) == 1:
        return error
    kind, value, *traceback = error
    if isinstance(kind, BaseException):
        value = kind
    elif not isinstance(value, BaseException):
        value = kind() if value is None else kind(*value) if isinstance(value, tuple) else kind(value)
    return (value.with_traceback(*traceback) if traceback else value,)


_KINDS: dict[type, type[_Suspended]] = {
    GeneratorType: SuspendedGenerator,
    CoroutineType: SuspendedCoroutine,
    AsyncGeneratorType: SuspendedAsyncGenerator,
}
_CODES = {GeneratorType: "gi_code", CoroutineType: "cr_code", AsyncGeneratorType: "ag_code"}


def suspends(function: Any) -> bool:
    """Return whether a call of this method makes a generator or a coroutine."""
    kinds = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    return any(is_kind(function) for is_kind in kinds)


def suspend(inner: Any, hold: _native.Hold, own: bool) -> Any:
    """Return what the caller of a method gets in place of the generator or coroutine that it returned.

    Where it is not known to be the method's own, it is one only if the method of the object's class made it now, after
    a swap perhaps; else it is a value like others.
    """
    if not own:
        function = getattr(_native.class_of(hold.reference, object), hold.name, None)
        own = getattr(function, "__code__", None) is getattr(inner, _CODES[type(inner)])
    if not own:
        hold.end()
        return inner
    return _KINDS[type(inner)](inner, hold)
