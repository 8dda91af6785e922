"""The maps of `k42.structures`: a dictionary, and which processors have a replica of which key (section 4.4)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from k42.errors import Error


class Map:
    """A dictionary that processors use; look-ups leave nothing behind."""

    def __init__(self) -> None:
        self.values: dict[Hashable, Any] = {}
        self.making: set[Hashable] = set()

    def get(self, processor: int, key: Hashable, default: Any = None) -> Any:
        """Return the value of `key`, or `default`."""
        if key not in self.values:
            return default
        self._looked_up(processor, key)
        return self.values[key]

    def set(self, processor: int, key: Hashable, value: Any) -> None:
        """Set the value of `key`; whoever had another one must not find it any more."""
        self._changed(key)
        self.values[key] = value

    def pop(self, processor: int, key: Hashable) -> Any:
        """Remove `key` and return its value; KeyError when there is none."""
        self._changed(key)
        return self.values.pop(key)

    def setdefault(self, processor: int, key: Hashable, default: Any = None) -> Any:
        """Return the value of `key`; set it to `default` first, if there is none."""
        if key not in self.values:
            self.set(processor, key, default)
            return default
        return self.get(processor, key)

    def find_or_allocate(self, processor: int, key: Hashable, factory: Callable[[], Any]) -> tuple[Any, bool]:
        """Return the value of `key` and whether the factory made it."""
        if key in self.values:
            return self.get(processor, key), False
        if key in self.making:
            raise Error(key)
        self.making.add(key)
        try:
            value = factory()
        finally:
            self.making.remove(key)
        if key in self.values:  # set meanwhile: by the factory, or by another processor
            return self.values[key], False
        self.set(processor, key, value)
        return value, True

    def scatter(self, processor: int, key: Hashable, fn: Callable[[Any], Any]) -> Any:
        """Replace the value of `key` by `fn(value)`, in the replicas, too."""
        self.values[key] = fn(self.values[key])
        return self.values[key]

    def gather(self, processor: int, key: Hashable) -> tuple[Any, dict[int, Any]]:
        """Return the value of `key`, and by processor those of the replicas."""
        return self.values[key], {}

    def empty(self, processor: int) -> None:
        """Remove all keys."""
        self.values.clear()

    def _looked_up(self, processor: int, key: Hashable) -> None:
        """The processor has found the value."""

    def _changed(self, key: Hashable) -> None:
        """What was found of `key` holds no longer."""


class SharedMap(Map):
    """One table."""


class PartitionedMap(Map):
    """The same: which partition a key is in is not the model's business."""


class ReplicatedMap(Map):
    """A processor that has looked a key up has a replica of it until the key is set, removed or emptied."""

    def __init__(self) -> None:
        super().__init__()
        self.replicas: dict[Hashable, set[int]] = {}

    def gather(self, processor: int, key: Hashable) -> tuple[Any, dict[int, Any]]:  # noqa: D102 - as in Map
        value = self.values[key]
        return value, dict.fromkeys(self.replicas.get(key, ()), value)

    def empty(self, processor: int) -> None:  # noqa: D102
        super().empty(processor)
        self.replicas.clear()

    def _looked_up(self, processor: int, key: Hashable) -> None:
        self.replicas.setdefault(key, set()).add(processor)

    def _changed(self, key: Hashable) -> None:
        self.replicas.pop(key, None)
