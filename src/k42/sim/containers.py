"""Containers in simulated memory: what a list, deque, dict or set of a C program would touch at each operation.

A container has a header, with its length and where its elements are, and the elements: one after the other, in a ring,
or in a table by their hash. An operation touches each line once at most, and then happens at one moment, as a method of
a built-in type does under the lock of its object. What a method touches is charged before it runs.
"""

from __future__ import annotations

import itertools
import zlib
from array import array
from collections import deque
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from types import BuiltinFunctionType, ClassMethodDescriptorType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from k42.errors import Error
from k42.sim.processor import Processor, here

if TYPE_CHECKING:
    from k42.sim.attribution import Cell, Named
    from k42.sim.charging import Charger

# What has no parts, so that nothing of it is charged for.
ATOMS = frozenset(
    (
        *(type(None), bool, int, float, complex, str, bytes, range, type, type(...)),
        *(FunctionType, BuiltinFunctionType, ModuleType),
    )
)

_HEADER = 24  # bytes
_WORD = 8


class Record:
    """What is known of one object that is charged for.

    Args:
        charger: of the simulation.
        target: the object, which lives as long as this does: nothing else has its `id`.
        named: its name, or that of the object whose attribute it is.
        part: what it is of `named`: empty, or an attribute.
        padded: whether its memory is on lines of its own.
    """

    def __init__(self, charger: Charger, target: Any, named: Named, part: str, padded: bool) -> None:
        self.charger = charger
        self.target = target
        self.named = named
        self.part = part
        self.padded = padded
        self.cells: dict[str, Cell] = {}  # by attribute
        self._place = self._room = 0

    def attribute(self, name: str) -> Cell:
        """Return the cell of an attribute that has had none: it lies behind the others."""
        if self._room < _WORD:
            more = 8 * _WORD
            self._place, self._room = self.charger.allocate(more, padded=self.padded), more
        cell = self.cells[name] = self.charger.ledger.cell(self.named, self.within(name), self._place)
        self._place += _WORD
        self._room -= _WORD
        return cell

    def within(self, attribute: str) -> str:
        """What the ledger calls an attribute."""
        return f"{self.part}.{attribute}" if self.part else attribute

    def reserve(self, attributes: int) -> None:
        """Make room for the header and so many attributes."""
        size = 2 * _WORD + max(attributes, 2) * _WORD
        self._place = self.charger.allocate(size, padded=self.padded) + 2 * _WORD
        self._room = size - 2 * _WORD

    def adopt(self, value: Any) -> Any:
        """Charge for what is stored as an element from now on; returns what is to be stored."""
        if type(value) in ATOMS:
            return value
        return self.charger.adopt(value, self.named, f"{self.part}[]", self.padded)

    def adopt_key(self, key: Any) -> None:
        """Charge for what becomes a key, or an element of a set, from now on."""
        if self.adopt(key) is not key:
            raise Error("a lock in a key or a set cannot be simulated: keep it in an attribute, a list or a value")


class Sequence(Record):
    """A list or an array."""

    wraps = False

    def __init__(
        self, charger: Charger, target: Any, named: Named, part: str, padded: bool, base: type, unit: int
    ) -> None:
        super().__init__(charger, target, named, part, padded)
        self.length: Callable[[Any], int] = base.__len__  # type: ignore[attr-defined]
        self.iterate: Callable[[Any], Iterator[Any]] = base.__iter__  # type: ignore[attr-defined]
        header = charger.allocate(_HEADER, padded=padded)
        self.unit = unit  # bytes of an element
        self.header = charger.ledger.cell(named, f"{part}.length", header)
        self.elements = charger.ledger.cell(named, f"{part}[]", 0)
        self.capacity = 0
        self.base = 0
        self._grow(self.length(target))

    def _grow(self, count: int) -> None:
        self.capacity = self._capacity(count)
        self.base = self.charger.allocate(self.capacity * self.unit, padded=self.padded)

    def _capacity(self, count: int) -> int:
        return max(4, count + (count >> 3))

    def address(self, index: int) -> int:
        """Where an element is."""
        return self.base + index * self.unit

    def head(self, processor: Processor, write: bool = False) -> None:
        """Access the header."""
        processor.access(self.header.address, self.header, write, processor.instructions)

    def item(self, processor: Processor, index: int, write: bool = False) -> None:
        """Access one element."""
        processor.access(self.address(index), self.elements, write, processor.instructions)

    def scan(self, processor: Processor, indices: Iterable[int], write: bool = False) -> None:
        """Access elements, and each line once as long as they are neighbours."""
        line, before = processor.simulation.machine.line, -1
        addresses: Iterable[int] = map(self.address, indices)
        if indices and not self.wraps and isinstance(indices, range) and indices.step == 1:  # the short way
            first, last = self.address(indices[0]), self.address(indices[-1])
            addresses = (first, *range((first // line + 1) * line, last + 1, line))
        for address in addresses:
            if address // line != before:
                before = address // line
                processor.access(address, self.elements, write, processor.instructions)

    def fit(self, processor: Processor, count: int) -> None:
        """Have room for so many elements; where there is too little, they move."""
        if count > self.capacity:
            kept = self.capacity
            self.scan(processor, range(kept))
            self._grow(count)
            self.scan(processor, range(kept), write=True)

    def scanned(self, items: Iterator[Any], count: int) -> Iterator[Any]:
        """Yield the items; each line of them is accessed when it is needed, by who needs it."""
        before = None
        for index in itertools.count():
            processor = here.processor
            if processor is not None and index < count:
                address = self.position(index, count)
                line = address // processor.simulation.machine.line
                if line != before:
                    before = line
                    processor.access(address, self.elements, False, processor.instructions)
            try:
                item = next(items)
            except StopIteration:
                return
            yield item

    def position(self, index: int, count: int) -> int:
        """Where the element is that comes as the `index`'th of `count` when all are looked at."""
        return self.address(index)


class Ring(Sequence):
    """A deque: elements from `left` on, around the end."""

    wraps = True
    left = 0

    def _grow(self, count: int) -> None:
        super()._grow(count)
        self.left = 0

    def _capacity(self, count: int) -> int:
        return max(8, 1 << count.bit_length())

    def address(self, index: int) -> int:  # noqa: D102 - as above
        return self.base + (self.left + index) % self.capacity * self.unit


class Table(Sequence):
    """A dict or a set: buckets by the hash of their keys."""

    def _capacity(self, count: int) -> int:
        return 8 << max(0, (3 * count // 16).bit_length())

    def fit(self, processor: Processor, count: int) -> None:  # noqa: D102 - as above
        super().fit(processor, count * 3 // 2)

    def position(self, index: int, count: int) -> int:  # noqa: D102 - as above
        return self.base + index * self.capacity // max(count, 1) * self.unit

    def bucket(self, processor: Processor, key: Any, write: bool = False) -> int:
        """Access the bucket of a key; returns its address."""
        address = self.base + (self.charger.hash(key) & (self.capacity - 1)) * self.unit
        processor.access(address, self.elements, write, processor.instructions)
        return address


def steady_hash(key: Any, sights: dict[Any, int]) -> int:
    """Return a hash that is the same in every process; `sights` has the keys that are numbered as they come."""
    kind = type(key)
    if kind is int or kind is bool or kind is float:
        return hash(key)
    if kind is str or kind is bytes:
        known = sights.get(key)
        if known is None:
            known = sights[key] = zlib.crc32(key.encode("utf-8", "surrogatepass") if kind is str else key)
        return known
    if kind is tuple:
        mixed = 0x345678
        for each in key:
            mixed = (mixed ^ steady_hash(each, sights)) * 1000003 & 0xFFFFFFFFFFFF
        return mixed
    try:
        return sights.setdefault(key, len(sights))
    except TypeError:  # it has no hash: the operation itself will say so
        return 0


# How methods are made. Each takes what the class does by itself, and returns what does it after it has been paid for.

_Method = Callable[..., Any]
_Charge = Callable[..., "tuple[Any, ...] | None"]


def _reading(plain: _Method, charge: _Charge) -> _Method:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        processor = here.processor
        if processor is not None:
            record = processor.records.get(id(self))
            if record is not None:
                charge(processor, record, self, *args)
        return plain(self, *args, **kwargs)

    return method


def _changing(plain: _Method, charge: _Charge) -> _Method:
    """`charge` returns the arguments where others are to be stored."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        processor = here.processor
        record: Any = None if processor is None else processor.records.get(id(self))
        if processor is None or record is None:
            return plain(self, *args, **kwargs)
        changed = charge(processor, record, self, *args, **kwargs)
        if changed is not None:
            args, kwargs = changed, {}
        before = record.length(self)
        result = plain(self, *args, **kwargs)
        after = record.length(self)
        if after != before:
            record.head(processor, True)
            record.fit(processor, after)
        return result

    return method


def _keyed(plain: _Method, *, write: bool = False, stores: bool = False) -> _Method:
    """`write`: the bucket, in any case; `stores`: the key, if it is new, and the value."""

    def method(self: Any, key: Any, *rest: Any) -> Any:
        processor = here.processor
        record: Any = None if processor is None else processor.records.get(id(self))
        if processor is None or record is None:
            return plain(self, key, *rest)
        record.head(processor)
        address = record.bucket(processor, key, write)
        if stores:
            record.adopt_key(key)
            rest = tuple([record.adopt(each) for each in rest])
        before = record.length(self)
        result = plain(self, key, *rest)
        after = record.length(self)
        if after != before:
            if not write:
                processor.access(address, record.elements, True, processor.instructions)
            record.head(processor, True)
            record.fit(processor, after)
        return result

    return method


def _iterating(plain: _Method) -> _Method:
    def method(self: Any) -> Any:
        processor = here.processor
        record: Any = None if processor is None else processor.records.get(id(self))
        if processor is None or record is None:
            return plain(self)
        record.head(processor)
        return record.scanned(plain(self), record.length(self))

    return method


# What is charged: processor, record, container, arguments.


def _header(processor: Processor, record: Any, target: Any, *_: Any) -> None:
    record.head(processor)


def _all(processor: Processor, record: Any, target: Any, *args: Any) -> None:
    record.head(processor)
    record.scan(processor, range(record.capacity if isinstance(record, Table) else record.length(target)))
    for other in args:
        if isinstance(other, (set, dict)) and other is not target:  # they are read in C
            theirs = processor.records.get(id(other))
            if isinstance(theirs, Table):
                theirs.head(processor)
                theirs.scan(processor, range(theirs.capacity))


def _rewrite(processor: Processor, record: Any, target: Any, *args: Any, **_: Any) -> None:
    _all(processor, record, target, *args)
    record.scan(processor, range(record.capacity if isinstance(record, Table) else record.length(target)), write=True)


def _indices(index: Any, count: int) -> range:
    """The elements that an index or a slice means; none where the operation will fail."""
    try:
        if isinstance(index, slice):
            return range(*index.indices(count))
        index = index.__index__()
    except (AttributeError, TypeError, ValueError):
        return range(0)
    if index < 0:
        index += count
    return range(index, index + 1) if 0 <= index < count else range(0)


def _at(processor: Processor, record: Any, target: Any, *args: Any) -> None:
    header = record.header
    processor.access(header.address, header, False, processor.instructions)
    if len(args) == 1 and type(args[0]) is int and 0 <= args[0] < record.length(target):  # the short way
        processor.access(record.address(args[0]), record.elements, False, processor.instructions)
        return
    record.scan(processor, _indices(args[0], record.length(target)) if args else ())


def _set_at(processor: Processor, record: Any, target: Any, *args: Any) -> tuple[Any, ...] | None:
    record.head(processor)
    if len(args) != 2:
        return None
    index, value = args
    count = record.length(target)
    if type(index) is int and 0 <= index < count:  # the short way
        record.item(processor, index, True)
        return index, record.adopt(value)
    if not isinstance(index, slice):
        record.scan(processor, _indices(index, count), write=True)
        return index, record.adopt(value)
    if not isinstance(target, list):
        record.scan(processor, range(count), write=True)
        return None
    value = [record.adopt(each) for each in value] if isinstance(value, Iterable) else value
    indices = _indices(index, count)
    moved = isinstance(value, list) and indices.step == 1 and len(indices) != len(value)
    if moved:
        record.fit(processor, count + max(0, len(value) - len(indices)))
        indices = range(indices.start, max(count, count + len(value) - len(indices)))
    record.scan(processor, indices, write=True)
    return index, value


def _delete_at(processor: Processor, record: Any, target: Any, *args: Any) -> None:
    record.head(processor)
    count = record.length(target)
    indices = _indices(args[0], count) if args else range(0)
    if indices:
        record.scan(processor, range(min(indices[0], indices[-1]), count), write=True)


def _append(processor: Processor, record: Any, target: Any, *args: Any) -> tuple[Any, ...]:
    record.head(processor)
    count = record.length(target)
    record.fit(processor, count + 1)
    record.item(processor, count, True)
    return tuple(record.adopt(each) for each in args)


def _extend(processor: Processor, record: Any, target: Any, *args: Any) -> tuple[Any, ...] | None:
    record.head(processor)
    if len(args) != 1 or not isinstance(args[0], Iterable):
        return None
    items: Any = args[0] if isinstance(args[0], array) else [record.adopt(each) for each in args[0]]
    count = record.length(target)
    record.fit(processor, count + len(items))
    record.scan(processor, range(count, count + len(items)), write=True)
    return (items,)


def _insert(processor: Processor, record: Any, target: Any, *args: Any) -> tuple[Any, ...] | None:
    record.head(processor)
    if len(args) != 2:
        return None
    count = record.length(target)
    record.fit(processor, count + 1)
    start = slice(args[0], None).indices(count)[0] if isinstance(args[0], int) else 0
    record.scan(processor, range(start, count + 1), write=True)
    return args[0], record.adopt(args[1])


def _pop(processor: Processor, record: Any, target: Any, *args: Any) -> None:
    record.head(processor)
    count = record.length(target)
    indices = _indices(args[0] if args else -1, count)
    record.scan(processor, indices)
    if indices:
        record.scan(processor, range(indices[0] + 1, count), write=True)


def _append_left(processor: Processor, record: Any, target: Any, *args: Any) -> tuple[Any, ...]:
    record.head(processor)
    record.fit(processor, record.length(target) + 1)
    record.left -= 1
    record.item(processor, 0, True)
    return tuple(record.adopt(each) for each in args)


def _extend_left(processor: Processor, record: Any, target: Any, *args: Any) -> tuple[Any, ...] | None:
    record.head(processor)
    if len(args) != 1 or not isinstance(args[0], Iterable):
        return None
    items = [record.adopt(each) for each in args[0]]
    record.fit(processor, record.length(target) + len(items))
    record.left -= len(items)
    record.scan(processor, range(len(items)), write=True)
    return (items,)


def _pop_left(processor: Processor, record: Any, target: Any) -> None:
    record.head(processor)
    if record.length(target):
        record.item(processor, 0)
        record.left += 1


def _pop_any(processor: Processor, record: Any, target: Any, *args: Any) -> None:
    record.head(processor)
    count = record.length(target)
    if count:
        processor.access(record.position(count - 1, count), record.elements, True, processor.instructions)


def _update(processor: Processor, record: Any, target: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    record.head(processor)
    if len(args) > 1:
        return args
    items: dict[Any, Any] = dict(*args, **kwargs)
    record.fit(processor, record.length(target) + len(items))
    for key, value in items.items():
        record.adopt_key(key)
        items[key] = record.adopt(value)
        record.bucket(processor, key, True)
    return (items,)


def _add_all(processor: Processor, record: Any, target: Any, *args: Any) -> tuple[Any, ...]:
    record.head(processor)
    others = [other if isinstance(other, (set, frozenset, dict)) else list(other) for other in args]
    record.fit(processor, record.length(target) + sum(map(len, others)))
    for key in itertools.chain(*others):
        record.adopt_key(key)
        record.bucket(processor, key, True)
    return tuple(others)


def _unite(processor: Processor, record: Any, target: Any, *args: Any) -> tuple[Any, ...]:
    """As `update`, but of sets alone."""
    if len(args) == 1 and isinstance(args[0], (set, frozenset, KeysView, ItemsView)):
        _add_all(processor, record, target, *args)
    return args


def _containing(plain: _Method) -> _Method:
    def method(self: Any, item: Any) -> bool:
        processor = here.processor
        record: Any = None if processor is None else processor.records.get(id(self))
        if processor is None or record is None:
            return plain(self, item)  # type: ignore[no-any-return]
        record.head(processor)
        items = list(record.iterate(self))
        position = next((i for i, each in enumerate(items) if each is item or each == item), len(items))
        record.scan(processor, range(min(position + 1, len(items))))
        return position < len(items)

    return method


class _View:
    """What the views of a dict have in common; as they print and turn round."""

    _name: str

    def __init__(self, mapping: Any, plain: _Method) -> None:
        self._mapping = mapping
        self._plain = plain

    def __iter__(self) -> Iterator[Any]:
        return _iterating(lambda mapping: iter(self._plain(mapping)))(self._mapping)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"{self._name}({list(self)!r})"

    def __reversed__(self) -> Iterator[Any]:
        return iter(list(self)[::-1])


class _Keys(_View, KeysView[Any]):
    _name = "dict_keys"


class _Values(_View, ValuesView[Any]):
    _name = "dict_values"


class _Items(_View, ItemsView[Any, Any]):
    _name = "dict_items"


def _viewing(plain: _Method, view: Callable[[Any, _Method], Any]) -> _Method:
    def method(self: Any) -> Any:
        processor = here.processor
        if processor is None or processor.records.get(id(self)) is None:
            return plain(self)
        return view(self, plain)

    return method


_SEQUENCE: dict[str, Callable[[_Method], _Method]] = {
    "__len__": lambda plain: _reading(plain, _header),
    "__getitem__": lambda plain: _reading(plain, _at),
    "__setitem__": lambda plain: _changing(plain, _set_at),
    "__delitem__": lambda plain: _changing(plain, _delete_at),
    "__iter__": _iterating,
    "__contains__": _containing,
    "__iadd__": lambda plain: _changing(plain, _extend),
    "__imul__": lambda plain: _changing(plain, _rewrite),
    "append": lambda plain: _changing(plain, _append),
    "extend": lambda plain: _changing(plain, _extend),
    "insert": lambda plain: _changing(plain, _insert),
    "pop": lambda plain: _changing(plain, _pop),
    "remove": lambda plain: _changing(plain, _rewrite),
    "clear": lambda plain: _changing(plain, _header),
    "reverse": lambda plain: _changing(plain, _rewrite),
    "sort": lambda plain: _changing(plain, _rewrite),
    "byteswap": lambda plain: _changing(plain, _rewrite),
    "frombytes": lambda plain: _changing(plain, _rewrite),
    "fromlist": lambda plain: _changing(plain, _rewrite),
    "fromfile": lambda plain: _changing(plain, _rewrite),
}
_DEQUE = _SEQUENCE | {
    "appendleft": lambda plain: _changing(plain, _append_left),
    "extendleft": lambda plain: _changing(plain, _extend_left),
    "popleft": lambda plain: _changing(plain, _pop_left),
    "rotate": lambda plain: _changing(plain, _rewrite),
}
_DICT: dict[str, Callable[[_Method], _Method]] = {
    "__len__": lambda plain: _reading(plain, _header),
    "__getitem__": _keyed,
    "__setitem__": lambda plain: _keyed(plain, write=True, stores=True),
    "__delitem__": _keyed,
    "__contains__": _keyed,
    "__iter__": _iterating,
    "__ior__": lambda plain: _changing(plain, _update),
    "get": _keyed,
    "setdefault": lambda plain: _keyed(plain, stores=True),
    "pop": _keyed,
    "popitem": lambda plain: _changing(plain, _pop_any),
    "clear": lambda plain: _changing(plain, _header),
    "update": lambda plain: _changing(plain, _update),
    "keys": lambda plain: _viewing(plain, _Keys),
    "values": lambda plain: _viewing(plain, _Values),
    "items": lambda plain: _viewing(plain, _Items),
}
_SET: dict[str, Callable[[_Method], _Method]] = {
    "__len__": lambda plain: _reading(plain, _header),
    "__contains__": _keyed,
    "__iter__": _iterating,
    "__ior__": lambda plain: _changing(plain, _unite),
    "__iand__": lambda plain: _changing(plain, _rewrite),
    "__isub__": lambda plain: _changing(plain, _rewrite),
    "__ixor__": lambda plain: _changing(plain, _rewrite),
    "add": lambda plain: _keyed(plain, stores=True),
    "discard": _keyed,
    "remove": _keyed,
    "pop": lambda plain: _changing(plain, _pop_any),
    "clear": lambda plain: _changing(plain, _header),
    "update": lambda plain: _changing(plain, _add_all),
    "difference_update": lambda plain: _changing(plain, _rewrite),
    "intersection_update": lambda plain: _changing(plain, _rewrite),
    "symmetric_difference_update": lambda plain: _changing(plain, _rewrite),
}

# Which operators look at all that is there.
_OPERATORS = (
    *("eq", "ne", "lt", "le", "gt", "ge", "add", "mul", "rmul", "mod", "or", "ror", "and", "rand", "sub", "rsub"),
    *("xor", "rxor", "repr", "reversed", "copy"),
)


class Family:
    """One of the kinds of containers that are charged for.

    Args:
        base: the built-in type.
        record: how its memory is laid out.
        methods: how its methods are made; all others look at all that is there.
        unit: bytes of an element; 0: as the container says.
    """

    def __init__(
        self, base: type, record: type[Sequence], methods: dict[str, Callable[[_Method], _Method]], unit: int
    ) -> None:
        self.base = base
        self._record = record
        self._methods = methods
        self._unit = unit

    def methods(self, cls: type) -> dict[str, Any]:
        """Return methods that charge, for a subclass of `cls`: of those that `cls` has in C and not from the base."""
        made: dict[str, Any] = {}
        for name in dir(self.base):
            plain = getattr(cls, name)
            inherited = cls is not self.base and plain is getattr(self.base, name)
            special = isinstance(vars(self.base).get(name), (ClassMethodDescriptorType, staticmethod))
            if inherited or special or not callable(plain) or isinstance(plain, FunctionType):
                continue
            if name in self._methods:
                made[name] = self._methods[name](plain)
            elif (name.strip("_") in _OPERATORS or not name.startswith("__")) and plain is not getattr(
                object, name, None
            ):
                made[name] = _reading(plain, _all)
        if cls is set:
            made["__repr__"] = _reading(_show_set, _all)
        return made

    def record(self, charger: Charger, target: Any, named: Named, part: str, padded: bool) -> Record:
        """Give a container its memory."""
        return self._record(charger, target, named, part, padded, self.base, self._unit or target.itemsize)


def _show_set(target: set[Any]) -> str:
    # Only of a set itself does Python leave the name out.
    if target and type(target).__mro__[1] is set:
        return f"{{{', '.join(map(repr, set.__iter__(target)))}}}"
    return set.__repr__(target)


FAMILIES = (
    Family(list, Sequence, _SEQUENCE, 8),
    Family(dict, Table, _DICT, 24),
    Family(set, Table, _SET, 16),
    Family(deque, Ring, _DEQUE, 8),
    Family(array, Sequence, _SEQUENCE, 0),
)


def family(cls: type) -> Family | None:
    """Return the kind of container that instances of `cls` are."""
    for each in FAMILIES:
        if issubclass(cls, each.base):
            return each
    return None
