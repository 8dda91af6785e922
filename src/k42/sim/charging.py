"""Charging for accesses to objects whose code says nothing of it: `Simulation.share`.

An object that is shared gets the class of a subclass of its own class, which adds nothing to it but this: where a
processor of a simulation accesses an attribute, an element or the length, it pays for the line first. So the object
stays itself to all who have it, and whatever is done to it in C works as ever.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import functools
import io
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

from k42._native import Reference, retype
from k42.errors import Error
from k42.sim.containers import ATOMS, Record, family, steady_hash
from k42.sim.locks import StandIn
from k42.sim.processor import here

if TYPE_CHECKING:
    from k42.sim.attribution import Ledger, Named
    from k42.sim.simulation import Simulation

_T = TypeVar("_T")

_LOCK, _RLOCK = type(threading.Lock()), type(threading.RLock())
_HEAP, _BASE, _IMMUTABLE = 1 << 9, 1 << 10, 1 << 8  # flags of types; without the second there are no subclasses

# What would wait outside of the simulation, by the module of a class; and what to do instead.
_REFUSED = {
    "threading": "of threading, Lock and RLock can be simulated: use them, or k42.sim's locks and Simulation.spin",
    "queue": "use a deque or a list, with a threading.Lock",
    "_queue": "use a deque or a list, with a threading.Lock",
    "socket": "take what it would bring from memory, and say with k42.sim.work what it costs",
    "_socket": "take what it would bring from memory, and say with k42.sim.work what it costs",
    "ssl": "take what it would bring from memory, and say with k42.sim.work what it costs",
    "asyncio": "write what it does as a function that runs on each processor",
    "_asyncio": "write what it does as a function that runs on each processor",
    "concurrent": "the simulation runs the function on each processor itself",
    "multiprocessing": "the simulation runs the function on each processor itself",
}
# What simulates is not simulated.
_SIMULATING = frozenset(f"k42.sim.{name}" for name in ("coherence", "locks", "machine", "processor", "simulation"))
_FILE = "read it before, and say with k42.sim.work what it costs"


def refuse(value: object) -> None:
    """Do nothing, unless a run would wait for it outside of the simulation.

    Raises:
        Error: it would.
    """
    kind = type(value)
    if isinstance(value, io.IOBase) and not isinstance(value, (io.BytesIO, io.StringIO)):
        raise Error(f"a file ({kind.__qualname__}) cannot be simulated: {_FILE}")
    if isinstance(value, Reference):
        raise Error(
            f"{kind.__qualname__}, a Clustered Object, cannot be simulated, as its representatives are of real "
            "processors: share a model of it, such as those of k42.sim.models"
        )
    for cls in kind.__mro__:
        advice = _REFUSED.get(cls.__module__.partition(".")[0])
        if advice is not None:
            raise Error(f"{cls.__module__}.{cls.__qualname__} cannot be simulated: {advice}")


class _Refusals:
    """While runs last, their processors neither start threads nor sleep."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of all here
        self._runs = 0
        self._kept: tuple[Any, Any] = (None, None)

    def enter(self) -> None:
        with self._lock:
            self._runs += 1
            if self._runs > 1:
                return
            self._kept = start, sleep = threading.Thread.start, time.sleep

            def refuse_start(self: threading.Thread) -> None:
                if here.processor is not None:
                    raise Error(f"a thread cannot be started on a simulated processor: {_REFUSED['concurrent']}")
                start(self)

            def refuse_sleep(seconds: Any) -> None:
                if here.processor is not None:
                    raise Error("time.sleep cannot be simulated: say with k42.sim.work how many cycles pass")
                sleep(seconds)

            threading.Thread.start = refuse_start  # type: ignore[method-assign]
            time.sleep = refuse_sleep

    def leave(self) -> None:
        with self._lock:
            self._runs -= 1
            if not self._runs:
                threading.Thread.start, time.sleep = self._kept  # type: ignore[method-assign]


_refusals = _Refusals()


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Refuse, to processors, what would wait outside of the simulation."""
    _refusals.enter()
    try:
        yield
    finally:
        _refusals.leave()


# Classes that charge.

_charged: dict[type, type] = {}  # a class: what its instances are while they are shared
_plain: dict[type, type] = {}  # the other way round
_set_class: Callable[[object, type], None] = vars(object)["__class__"].__set__


def plain_class(value: object) -> type:
    """The class of an object, as it would be if it were not shared."""
    kind = type(value)
    return _plain.get(kind, kind)


def _charged_class(cls: type) -> type:
    known = _charged.get(cls)
    if known is not None:
        return known
    kind = family(cls)
    made: dict[str, Any] = {} if kind is None else kind.methods(cls)
    bases: tuple[type, ...] = (cls,)
    if kind is not None and cls is not kind.base:
        bases = (cls, _charged_class(kind.base))
    if _of_user(cls):
        made |= _attribute_methods(cls)
    made |= {
        "__slots__": (),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__hash__": cls.__hash__,
        "__reduce_ex__": _reducing(cls),
        "__class__": property(lambda self: cls, _change_class),
    }
    try:
        result = type(cls)(cls.__name__, bases, made)
    except Exception as error:
        raise Error(
            f"{cls.__module__}.{cls.__qualname__} has no subclasses, so it cannot be charged: {error}"
        ) from error
    _plain[result] = cls
    return _charged.setdefault(cls, result)


def _change_class(self: Any, to: type) -> None:
    _set_class(self, _charged_class(to))


def _reducing(cls: type) -> Callable[..., Any]:
    # Copies and pickles are of the class itself.
    reduce: Any = cls.__reduce_ex__

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        reduced = reduce(self, protocol)
        if isinstance(reduced, str):
            return reduced
        function, arguments, *rest = reduced
        own = [_plain.get(each, each) if isinstance(each, type) else each for each in (function, *arguments)]
        return (own[0], tuple(own[1:]), *rest)

    return __reduce_ex__


def _attribute_methods(cls: type) -> dict[str, Any]:
    get: Any = cls.__getattribute__
    put: Any = cls.__setattr__
    remove: Any = cls.__delattr__

    def __getattribute__(self: Any, name: str, /) -> Any:
        processor = here.processor
        if processor is not None:
            record = processor.records.get(id(self))
            if record is not None:
                cell = record.cells.get(name)
                if cell is not None:
                    processor.access(cell.address, cell, False, processor.instructions)
                elif record.charger.is_data(self, name):
                    processor.charge(record.charger.discover(record, name))
        return get(self, name)

    def __setattr__(self: Any, name: str, value: Any, /) -> None:
        processor = here.processor
        if processor is not None:
            record = processor.records.get(id(self))
            if record is not None:
                if type(value) not in ATOMS:
                    value = record.charger.adopt(value, record.named, record.within(name), record.padded)
                cell = record.cells.get(name)
                if cell is None and not _has_setter(cls, name):
                    cell = record.attribute(name)
                if cell is not None:
                    processor.access(cell.address, cell, True, processor.instructions)
        put(self, name, value)

    def __delattr__(self: Any, name: str, /) -> None:
        processor = here.processor
        if processor is not None:
            record = processor.records.get(id(self))
            cell = None if record is None else record.cells.pop(name, None)
            if cell is not None:
                processor.charge(cell, True)
        remove(self, name)

    return {"__getattribute__": __getattribute__, "__setattr__": __setattr__, "__delattr__": __delattr__}


def _has_setter(cls: type, name: str) -> bool:
    """Whether storing the attribute runs code: then what that stores is data, and this is not."""
    for each in cls.__mro__:
        if name in vars(each):
            found = vars(each)[name]
            return hasattr(type(found), "__set__") and not isinstance(found, types.MemberDescriptorType)
    return False


def _slots(cls: type) -> dict[str, Any]:
    """The descriptors of the slots, in the order of their definition."""
    return {
        name: member
        for each in reversed(cls.__mro__)
        if "__slots__" in vars(each)
        for name, member in vars(each).items()
        if isinstance(member, types.MemberDescriptorType)
    }


def _instance_dict(target: object) -> dict[str, Any]:
    """The attributes of an instance that are not in slots."""
    try:
        return cast(dict[str, Any], object.__getattribute__(target, "__dict__"))
    except AttributeError:
        return {}


def _of_user(cls: type) -> bool:
    """Whether it is an ordinary class, written in Python, and not of the standard library."""
    flags = cls.__flags__
    if not flags & _HEAP or not flags & _BASE or flags & _IMMUTABLE:
        return False
    module = cls.__module__
    if module in _SIMULATING:
        return False
    return module == "__main__" or module.partition(".")[0] not in sys.stdlib_module_names


def _class_name(cls: type) -> str:
    return cls.__qualname__.rpartition("<locals>.")[2]


def _exchange(target: Any, cls: type) -> None:
    """Give an object the class that charges, or its own one."""
    if _of_user(plain_class(target)):
        _set_class(target, cls)
    else:
        retype(target, cls)  # of a class in C: there is nothing that its instances have beside


class Charger:
    """What one simulation charges for.

    Args:
        simulation: which.
        ledger: of the costs.
    """

    def __init__(self, simulation: Simulation, ledger: Ledger) -> None:
        self._simulation = simulation
        self.ledger = ledger
        self.records: dict[int, Record] = {}
        self._stand_ins: dict[int, StandIn] = {}  # by the id of the lock, which they hold
        self._sights: dict[Any, int] = {}
        self._slots: dict[type, dict[str, Any]] = {}
        self._undo: list[Callable[[], object]] = []

    def allocate(self, size: int, *, padded: bool) -> int:
        """Return the address of memory, in multiples of 16 bytes as an allocator gives it."""
        return self._simulation._allocate(-(-size // 16) * 16, None, padded=padded)

    def hash(self, key: Any) -> int:
        """Return a hash of a key, at no cost."""
        kept, here.processor = here.processor, None
        try:
            return steady_hash(key, self._sights)
        finally:
            here.processor = kept

    def share(self, value: _T, *, padded: bool, name: str | None) -> _T:
        """As `Simulation.share`."""
        named = self.ledger.name(name or _class_name(plain_class(value)))
        return cast(_T, self._walk(value, named, "", padded, new=False))

    def adopt(self, value: Any, named: Named, part: str, padded: bool) -> Any:
        """Share what is stored into something shared; returns what is to be stored.

        Args:
            value: the value.
            named: of the object that it is stored into.
            part: of that.
            padded: as that is.
        """
        kept, here.processor = here.processor, None
        try:
            return self._walk(value, named, part, padded, new=True)
        finally:
            here.processor = kept

    def classes(self) -> list[type]:
        """Return the classes of users whose instances are shared."""
        kinds = dict.fromkeys(plain_class(record.target) for record in self.records.values())
        return [kind for kind in kinds if _of_user(kind)]

    def refresh(self) -> None:
        """Share what was stored into something shared while nobody looked."""
        for record in list(self.records.values()):
            self._drain(collections.deque([record]))

    def unshare(self) -> None:
        """As `Simulation.unshare`."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        for record in self.records.values():
            target, kind = record.target, type(record.target)
            if kind in _plain:
                _exchange(target, _plain[kind])
        self.records.clear()
        self._stand_ins.clear()

    def is_data(self, target: Any, name: str) -> bool:
        """Whether an attribute is in the instance."""
        slot = self._slots_of(target).get(name)
        return slot is None and name in _instance_dict(target)

    def discover(self, record: Record, name: str) -> Any:
        """Return the cell of an attribute that the instance got without `__setattr__`."""
        cell = record.attribute(name)
        held = _instance_dict(record.target)
        held[name] = self.adopt(held[name], record.named, record.within(name), record.padded)
        return cell

    def _slots_of(self, target: Any) -> dict[str, Any]:
        kind = plain_class(target)
        known = self._slots.get(kind)
        if known is None:
            known = self._slots[kind] = _slots(kind)
        return known

    # The walk: all that can be reached from a value, in the order in which it is there.

    def _walk(self, value: Any, named: Named, part: str, padded: bool, *, new: bool) -> Any:
        pending: collections.deque[Record] = collections.deque()
        result = self._enter(value, named, part, padded, pending, new=new)
        self._drain(pending)
        return result

    def _drain(self, pending: collections.deque[Record]) -> None:
        while pending:
            self._enter_parts(pending.popleft(), pending)

    def _enter(
        self, value: Any, named: Named, part: str, padded: bool, pending: collections.deque[Record], *, new: bool = True
    ) -> Any:
        """Share one value; its parts are pending then. `new`: an instance of a class of its own name."""
        kind = plain_class(value)
        if kind in ATOMS or isinstance(value, (type, enum.Enum)) or id(value) in self.records:
            return value
        if kind in (_LOCK, _RLOCK):
            return self._stand_in(value, named, part, padded)
        if isinstance(value, (tuple, frozenset)):
            return self._enter_tuple(value, named, part, padded, pending)
        if isinstance(value, types.MethodType):
            self._enter(value.__self__, named, part, padded, pending)
            return value
        container = family(kind)
        if not _of_user(kind) and (container is None or kind.__module__ not in ("builtins", "collections", "array")):
            if not isinstance(value, threading.local):
                refuse(value)
            return value
        if isinstance(value, (int, float, str, bytes)):
            return value
        refuse(value)
        if container is None and new:
            named, part = self.ledger.name(_class_name(kind)), ""
        if kind is type(value):
            _exchange(value, _charged_class(kind))
        if container is None:
            record = Record(self, value, named, part, padded)
        else:
            record = container.record(self, value, named, part, padded)
        self.records[id(value)] = record
        if _of_user(kind):
            record.reserve(len(self._slots_of(value)) + len(_instance_dict(value)))
        pending.append(record)
        return value

    def _enter_tuple(
        self, value: Any, named: Named, part: str, padded: bool, pending: collections.deque[Record]
    ) -> Any:
        kept = [*value] if isinstance(value, tuple) else list(value)
        entered = [self._enter(each, named, f"{part}[]", padded, pending) for each in kept]
        if all(one is other for one, other in zip(kept, entered, strict=True)):
            return value
        if type(value) is not tuple:
            raise Error(
                f"a lock in a {type(value).__qualname__} cannot be simulated: keep it in an attribute or a list"
            )
        return tuple(entered)

    def _enter_parts(self, record: Record, pending: collections.deque[Record]) -> None:
        target = record.target
        for name, slot in self._slots_of(target).items():
            with contextlib.suppress(AttributeError):  # not set yet
                value = slot.__get__(target)
                self._replace(record, name, value, functools.partial(slot.__set__, target), pending)
        if _of_user(plain_class(target)):
            held = _instance_dict(target)
            for name, value in list(held.items()):
                self._replace(record, name, value, functools.partial(held.__setitem__, name), pending)
        if isinstance(target, (list, collections.deque)):
            self._enter_items(record, target, pending)
        if isinstance(target, dict):
            self._enter_values(record, target, pending)
        if isinstance(target, (set, dict)):
            keys = set.__iter__(target) if isinstance(target, set) else dict.__iter__(target)
            for key in list(keys):
                if self._enter(key, record.named, f"{record.part}[]", record.padded, pending) is not key:
                    raise Error(
                        "a lock in a key or a set cannot be simulated: keep it in an attribute, a list or a value"
                    )

    def _replace(
        self, record: Record, name: str, value: Any, put: Callable[[Any], object], pending: collections.deque[Record]
    ) -> None:
        if name not in record.cells:
            record.attribute(name)
        new = self._enter(value, record.named, record.within(name), record.padded, pending)
        if new is not value:
            put(new)
            self._undo.append(functools.partial(put, value))

    def _enter_items(self, record: Record, target: Any, pending: collections.deque[Record]) -> None:
        base: Any = list if isinstance(target, list) else collections.deque
        for index, value in enumerate(list(base.__iter__(target))):
            new = self._enter(value, record.named, f"{record.part}[]", record.padded, pending)
            if new is not value:
                base.__setitem__(target, index, new)
                self._undo.append(functools.partial(base.__setitem__, target, index, value))

    def _enter_values(self, record: Record, target: Any, pending: collections.deque[Record]) -> None:
        for key, value in list(dict.items(target)):
            new = self._enter(value, record.named, f"{record.part}[]", record.padded, pending)
            if new is not value:
                dict.__setitem__(target, key, new)
                self._undo.append(functools.partial(dict.__setitem__, target, key, value))

    def _stand_in(self, lock: Any, named: Named, part: str, padded: bool) -> StandIn:
        known = self._stand_ins.get(id(lock))
        if known is None:
            word = self._simulation._allocate(16, self.ledger.cell(named, part, 0), padded=padded)
            known = self._stand_ins[id(lock)] = StandIn(self._simulation, lock, word, again=type(lock) is _RLOCK)
        return known
