"""Objects that many processors use are made distributed while they serve, and shared again when one uses them.

What is looked at is counted on the way (``native/core/structures/traffic.hpp``): how often a shared object was used by
another processor than the time before, since that is when its line moves; and which processors use one that is
distributed.

K42's swaps were triggered by any failed attempt to take a lock. Here it takes two looks in a row that find the same,
and ten for the way back, and an object that is hardly used is left alone: so that nothing swings to and fro.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import k42

LOOK = 1.0
"""Seconds between two looks of the kernel."""
_USED = 200  # uses between two looks, of an object that is worth a swap
_MOVES = 0.05  # share of the uses that came from another processor than the use before
_SECONDARY = 0.02  # share of the uses that makes a processor more than a passer-by
_TO_DISTRIBUTED = 2  # looks in a row
_TO_SHARED = 10

Traffic = tuple[bool, tuple[int, ...], int]


class Watched(NamedTuple):
    """An object that can be either."""

    ref: Any
    traffic: Callable[[], Traffic]
    shared: type[k42.Object]
    distributed: type[k42.Object]


@dataclass
class _Seen:
    """Of one object, what was seen at the last look."""

    traffic: Traffic
    in_a_row: int = 0  # looks that said that it should be the other


class Adapter:
    """The policy. It is called by one thread."""

    def __init__(self) -> None:
        self._seen: dict[Any, _Seen] = {}

    def look(self, objects: Iterable[Watched]) -> int:
        """Looks at all objects there are, and swaps those for which it is time; the number swapped."""
        seen, swapped = self._seen, 0
        self._seen = {}
        for watched in objects:
            with contextlib.suppress(k42.Destroyed):
                traffic = watched.traffic()
                before = seen.get(watched.ref)
                if before is None or before.traffic[0] != traffic[0]:
                    before = _Seen((traffic[0], (), 0))
                wrong = _is_wrong(before.traffic, traffic)
                now = self._seen[watched.ref] = _Seen(traffic, before.in_a_row + 1 if wrong else 0)
                if wrong is None:
                    now.in_a_row = before.in_a_row  # hardly used: it says nothing
                if now.in_a_row >= (_TO_SHARED if traffic[0] else _TO_DISTRIBUTED):
                    now.in_a_row = 0
                    # Who is inside for long now is not so at the next look.
                    with contextlib.suppress(k42.SwapRefused):
                        k42.swap(watched.ref, watched.shared if traffic[0] else watched.distributed, timeout=0.2)
                        swapped += 1
        return swapped


def _is_wrong(before: Traffic, now: Traffic) -> bool | None:
    """Whether it should be the other; None: too little was seen."""
    distributed, uses, moves = now
    # A part that is new counts from 0; parts stand by the number of their processor, and none goes.
    earlier = before[1] if len(before[1]) == len(uses) else (0,) * len(uses)
    fresh = [n - n_before for n, n_before in zip(uses, earlier, strict=True)]
    total = sum(fresh)
    if total < _USED:
        return None
    if not distributed:
        return moves - before[2] >= _MOVES * total
    return sum(n >= _SECONDARY * total for n in fresh) <= 1
