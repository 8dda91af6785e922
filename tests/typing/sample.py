"""What type checkers make of k42: mypy and pyright check this file, and the tests run it.

A line whose comment ignores an error must have one: both checkers say so if it has none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any, Generic, Self, TypeVar, assert_type

import k42
from k42.structures import (
    Counter,
    DistributedCounter,
    DistributedGate,
    Gate,
    Interval,
    IntervalMap,
    Map,
    Pool,
    ReplicatedMap,
    SharedCounter,
)

T = TypeVar("T")


class Box(k42.Object, Generic[T]):
    """An object of the user's own, with everything that a class may have."""

    LIMIT: int = 3
    transfers = ("items",)

    class Root(k42.SharedRoot):
        def __init__(self, name: str = "") -> None:
            self.name = name

    root: Root

    def __init__(self) -> None:
        self.items: list[T] = []

    def put(self, item: T, *, times: int = 1) -> int:
        self.items.extend([item] * times)
        return len(self.items)

    def get(self, i: int = 0) -> T:
        return self.items[i]

    def me(self) -> Self:
        return self

    @property
    def size(self) -> int:
        return len(self.items)

    @property
    def label(self) -> str:
        return self.root.name

    @label.setter
    def label(self, value: str) -> None:
        self.root.name = value

    @staticmethod
    def double(x: int) -> int:
        return 2 * x

    def each(self) -> Iterator[T]:
        yield from self.items

    async def later(self) -> list[T]:
        return self.items

    async def stream(self) -> AsyncIterator[T]:
        for item in self.items:
            yield item

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> T:
        return self.items[i]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @k42.global_method
    def cleared(self) -> bool:
        self.items.clear()
        return True

    def export_state(self, form: str) -> list[T]:
        return self.items

    def import_state(self, form: str, states: list[list[T]]) -> None:
        self.items = [item for state in states for item in state]


class SharedBox(Box[int]):
    """Another implementation."""


def an_object() -> None:
    box = Box[int].create("name")
    assert_type(box, Box[int])
    assert_type(box.put(1, times=2), int)
    assert_type(box.get(), int)
    assert_type(box.me(), Box[int])
    assert_type(box.size, int)
    assert_type(box.label, str)
    box.label = "other"
    assert_type(box.LIMIT, int)
    assert_type(box.double(2), int)
    assert_type(len(box), int)
    assert_type(box[0], int)
    assert_type(list(box.each()), list[int])
    assert_type(asyncio.run(box.later()), list[int])
    with box as entered:
        assert_type(entered, Box[int])
    assert_type(k42.local(box), Box[int])
    assert_type(box.cleared(), bool)
    assert_type(k42.destroy(box), bool)


def refused(box: Box[int], counter: Counter, names: Map[str, int]) -> None:
    """Never called: what checkers find wrong."""
    box.put("x")  # type: ignore[arg-type]
    box.put(1, 2)  # type: ignore[call-arg]
    box.nothing()  # type: ignore[attr-defined]
    box.size = 3  # type: ignore[misc]
    box.label = 3  # type: ignore[assignment]
    k42.interpose(box, 3)  # type: ignore[arg-type]
    k42.swap(box, int)  # type: ignore[arg-type]
    k42.swap(box, SharedBox, timeout="soon")  # type: ignore[arg-type]
    counter.add("x")  # type: ignore[arg-type]
    names[1] = 1  # type: ignore[index]


async def streamed() -> None:
    box = Box[str].create()
    box.put("a")
    async for item in box.stream():
        assert_type(item, str)
    k42.destroy(box)


def the_rest() -> None:
    box = SharedBox.create()
    assert_type(box, SharedBox)
    with k42.request():
        box.put(1)

    def arbiter(call: k42.Call) -> Any:
        assert_type(call.name, str)
        assert_type(call.args, tuple[Any, ...])
        return call.proceed()

    with k42.interpose(box, arbiter) as interposition:
        assert_type(interposition, k42.Interposition)
        box.put(2)
    k42.swap(box, SharedBox, timeout=1)
    topology = k42.processors.topology()
    assert_type(topology.cpus, tuple[int, ...])
    assert_type(topology.nodes, dict[int, tuple[int, ...]])
    assert_type(k42.processors.current(), int)
    assert_type(k42.processors.count(), int)
    assert_type(k42.processors.pin(topology.cpus[0]), int)
    k42.destroy(box)


def roots() -> None:
    root = Box.Root("x")
    root.rep_class = Box
    assert_type(root.gather(lambda rep: str(rep)), list[str])
    with root.locked_reps() as reps:
        assert_type(reps, tuple[Any, ...])


def structures() -> None:
    counter = Counter.create(start=1)
    assert_type(counter, Counter)
    assert_type(DistributedCounter.create(), DistributedCounter)
    assert_type(counter.value(), int)
    k42.swap(counter, SharedCounter)

    gate = Gate.create()
    assert_type(DistributedGate.create(), DistributedGate)
    with gate:
        pass

    names: Map[str, int] = Map.create()
    names["a"] = 1
    assert_type(names["a"], int)
    assert_type(names.get("b"), int | None)
    assert_type(list(names.items()), list[tuple[str, int]])
    assert_type(ReplicatedMap[str, int].create(), ReplicatedMap[str, int])

    pool: Pool[bytearray] = Pool.create(bytearray)
    assert_type(pool.take(), bytearray)

    ranges: IntervalMap[str] = IntervalMap.create()
    ranges.insert(0, 10, "a")
    assert_type(ranges[3], str)
    assert_type(ranges.find(3), Interval[str] | None)
    for ref in (counter, gate, names, pool, ranges):
        k42.destroy(ref)


def main() -> None:
    an_object()
    asyncio.run(streamed())
    the_rest()
    roots()
    structures()
