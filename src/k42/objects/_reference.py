"""The type of the references to the objects of a class: generated once, at the first `create`.

It has a native descriptor for each method of the class, which swaps `self` for the local representative, and
for each other attribute of the class one that reads it there. Methods are taken as they are at that moment.

Where a class has taken the methods of an interface of native representatives over (`add = _native.CounterRep.add`),
the reference type gets that C function itself, which finds the representative: the cheapest call that the interpreter
has; and it gets the interface's slots.
"""

from __future__ import annotations

import threading
from types import GetSetDescriptorType, MemberDescriptorType, MethodDescriptorType
from typing import Any

from k42 import _native
from k42.objects._suspended import suspend, suspends

_KEY = "_k42_reference_type"
# Protects the setting of _KEY; innermost. Reentrant: a finaliser that the collector runs under it may create.
_lock = threading.RLock()

# What a reference has of its own (identity, pickling, life), and what belongs to the class as a class.
_NOT_FORWARDED = (frozenset(dir(object)) - {"__str__", "__format__", "__lt__", "__le__", "__gt__", "__ge__"}) | {
    *(
        "__abstractmethods__",
        "__annotate__",
        "__annotations__",
        "__class_getitem__",
        "__copy__",
        "__deepcopy__",
    ),
    *("__del__", "__dict__", "__firstlineno__", "__getattr__", "__getnewargs__", "__getnewargs_ex__"),
    *("__match_args__", "__module__", "__orig_bases__", "__parameters__", "__qualname__", "__set_name__"),
    *("__setstate__", "__slots__", "__static_attributes__", "__type_params__", "__weakref__"),
    *("__final__", "_abc_impl", "_default", "export_state", "import_state", "on_release", "transfers", _KEY),
}


# What a generated type has besides.
_OWN = frozenset(("__slots__", "__doc__", "__module__", "__qualname__", "__class__"))


def reference_type(cls: type, base: type) -> type:
    """Return the type of references to `cls`, of which `base` and its bases contribute nothing."""
    made = cls.__dict__.get(_KEY)
    if made is None:
        generated = _generate(cls, base)
        with _lock:
            made = cls.__dict__.get(_KEY)
            if made is None:
                made = generated
                setattr(cls, _KEY, made)
    assert isinstance(made, type)
    return made


def interface_of(references: type) -> frozenset[str]:
    """Return the names that whoever takes the place of the class must have: of its methods and other attributes.

    Those that begin with an underscore are its own business, but for special methods.
    """
    names = frozenset(references.__dict__) - _OWN
    return frozenset(name for name in names if not name.startswith("_") or name.startswith("__"))


_REFUSED = object()


def _generate(cls: type, base: type) -> type:
    attributes: dict[str, Any] = {}
    for ancestor in reversed(cls.__mro__):
        if ancestor in base.__mro__:
            continue
        for name, value in ancestor.__dict__.items():
            # What Python knows about a class, such as __final__, is no part of its interface, unless it does something.
            plain = name.startswith("__") and not hasattr(type(value), "__get__") and value is not None
            if name not in _NOT_FORWARDED and not plain:
                attributes[name] = value
    namespace = {
        name: None if made is _REFUSED else made
        for name, value in attributes.items()
        if (made := _descriptor(cls, name, value)) is not None
    }
    namespace |= {
        "__slots__": (),
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        # Type checkers see the class itself: so does isinstance(), and after a swap what the object is now.
        "__class__": property(lambda ref: _native.class_of(ref, cls)),
    }
    made = type(cls.__name__, (_native.Reference,), namespace)
    interfaces = set()
    for name, value in attributes.items():
        # A method of an interface is one of the references, too: the interpreter's own descriptor.
        if isinstance(value, MethodDescriptorType) and issubclass(value.__objclass__, _native.NativeRep):
            setattr(made, name, _native.native_method(made, value))
            interfaces.add(value.__objclass__)
    for interface in interfaces:
        _native.native_slots(made, interface)
    return made


def _descriptor(cls: type, name: str, value: Any) -> Any:
    if value is None and name.startswith("__"):
        return _REFUSED  # a special method that the class says it has not
    if isinstance(value, (MemberDescriptorType, GetSetDescriptorType)):
        return None  # state of a representative, like the attributes that its __init__ sets
    if isinstance(value, (staticmethod, classmethod)):
        return staticmethod(getattr(cls, name))
    if isinstance(value, type):
        return value
    if callable(value) and hasattr(type(value), "__get__"):
        return _native.Method(name, value, cls, suspends(value), suspend)
    settable = hasattr(type(value), "__set__") and (not isinstance(value, property) or value.fset is not None)
    return _native.Attribute(name, settable)
