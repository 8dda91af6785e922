"""The HAT of a real process: one userfaultfd a CPU, made by the client, used by the kernel."""

from __future__ import annotations

import k42
from k42 import _native
from k42.vm.hat.interface import Hat


class UffdHat(Hat):
    """Maps pages of memfds into a client process.

    Args of ``create``:
        id: names the client to the engine's hand-ups.
        region_map: the process's.
        cpus: how many CPUs the kernel serves.
        most_spans: of 2 MiB; where the client's windows have page tables for more, those of idle ones are freed.
        left: descriptors of the status page and of the commands that a kernel left which has gone; taken over. None:
            new ones are made.
    """

    class Root(k42.SharedRoot):
        """Holds the native half."""

        def __init__(
            self,
            id: int,
            region_map: _native.RegionMap,
            cpus: int,
            most_spans: int,
            left: tuple[int, int] | None = None,
        ) -> None:
            self.hat = _native.UffdHat(id, region_map, cpus, most_spans, *(left or (-1, -1)))

    root: Root

    def native(self) -> _native.UffdHat:
        """The native half."""
        return self.root.hat
