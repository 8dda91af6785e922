"""How a class of `k42.structures` says that its representatives are native."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodDescriptorType
from typing import TypeVar

from k42 import _native

_C = TypeVar("_C", bound=type)


def represented_by(interface: type[_native.NativeRep]) -> Callable[[_C], _C]:
    """Let the methods of a class be those of an interface of native representatives, which its root then makes."""

    def implement(cls: _C) -> _C:
        for name, method in vars(interface).items():
            if isinstance(method, MethodDescriptorType) and hasattr(cls, name):
                setattr(cls, name, method)
        return cls

    return implement
