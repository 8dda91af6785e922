"""Generators and coroutines of Clustered Objects: each is a request that lasts until it has ended.

A request belongs to the thread that runs it, and a generator may be resumed by any, or by none for hours. So between
two resumptions what keeps the object is a hold, which names what it waits for; and each resumption is a request of
the thread that makes it.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any

from k42 import _native


class _Suspended:
    """What all kinds have in common: the generator or coroutine itself, and its hold."""

    __slots__ = ("__weakref__", "_hold", "_inner")

    def __init__(self, inner: Any, hold: _native.Hold) -> None:
        self._inner = inner
        self._hold = hold

    def __repr__(self) -> str:
        return f"<{self._hold.name} of {self._hold.reference!r}: {self._inner!r}>"

    def __getattr__(self, name: str) -> Any:
        if name in ("_hold", "_inner"):
            raise AttributeError(name)  # of an instance that was never initialised
        return getattr(self._inner, name)  # gi_frame, cr_await and the like


class _Stepped(_Suspended):
    """A generator or a coroutine: it goes on step by step."""

    __slots__ = ()

    def _step(self, step: Callable[..., Any], *args: Any) -> Any:
        try:
            with self._hold:
                return step(*args)
        except BaseException:
            self._hold.end()  # it returned or raised: either way it has ended
            raise

    def send(self, value: Any) -> Any:
        return self._step(self._inner.send, value)

    def throw(self, kind: Any, value: BaseException | None = None, traceback: TracebackType | None = None, /) -> Any:
        error = kind if value is None and traceback is None else value if isinstance(value, BaseException) else kind
        return self._step(self._inner.throw, error if traceback is None else error.with_traceback(traceback))

    def close(self) -> None:
        with self._hold:
            self._inner.close()  # raises where the body goes on instead: then it has not ended
        self._hold.end()

    def __del__(self) -> None:
        if hasattr(self, "_hold"):
            with self._hold:
                del self._inner  # closes it
            self._hold.end()


class SuspendedGenerator(_Stepped, Generator[Any, Any, Any]):
    """A generator of a Clustered Object."""

    __slots__ = ()


class SuspendedCoroutine(_Stepped, Coroutine[Any, Any, Any]):
    """A coroutine of a Clustered Object."""

    __slots__ = ()

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

    def close(self) -> None:
        self._coroutine.close()


class SuspendedAsyncGenerator(_Suspended, AsyncGenerator[Any, Any]):
    """An asynchronous generator of a Clustered Object."""

    __slots__ = ()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def _step(self, awaitable: Any) -> Any:
        try:
            return await _Stepwise(awaitable, self._hold)
        except GeneratorExit:
            raise
        except BaseException:
            self._hold.end()
            raise

    def __anext__(self) -> Coroutine[Any, Any, Any]:
        return self._step(self._inner.__anext__())

    def asend(self, value: Any) -> Coroutine[Any, Any, Any]:
        return self._step(self._inner.asend(value))

    def athrow(self, *error: Any) -> Coroutine[Any, Any, Any]:
        return self._step(self._inner.athrow(*error))

    async def aclose(self) -> None:
        await _Stepwise(self._inner.aclose(), self._hold)
        self._hold.end()


class _Stepwise:
    """Awaits what is not a coroutine, each step of it a request."""

    __slots__ = ("_hold", "_iterator")

    def __init__(self, awaitable: Any, hold: _native.Hold) -> None:
        self._iterator = awaitable.__await__()
        self._hold = hold

    def __await__(self) -> Generator[Any, Any, Any]:
        return _StepwiseIterator(self._iterator, self._hold)


class _StepwiseIterator(Generator[Any, Any, Any]):
    __slots__ = ("_hold", "_iterator")

    def __init__(self, iterator: Any, hold: _native.Hold) -> None:
        self._iterator = iterator
        self._hold = hold

    def send(self, value: Any) -> Any:
        with self._hold:
            return self._iterator.send(value)

    def throw(self, *error: Any) -> Any:
        with self._hold:
            return self._iterator.throw(*error)

    def close(self) -> None:
        with self._hold:
            self._iterator.close()


def suspended(function: Any) -> type[_Suspended] | None:
    """Return what the caller of this method gets in place of its result, or None where that is an ordinary value."""
    if inspect.isasyncgenfunction(function):
        return SuspendedAsyncGenerator
    if inspect.iscoroutinefunction(function):
        return SuspendedCoroutine
    return SuspendedGenerator if inspect.isgeneratorfunction(function) else None
