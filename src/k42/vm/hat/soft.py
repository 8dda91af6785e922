"""The HAT in memory: records what is mapped."""

from __future__ import annotations

import k42
from k42 import _native
from k42.vm.hat.interface import Hat


class SoftHat(Hat):
    """Keeps the mappings in a table.

    Args of ``create``:
        id: names the process.
        region_map: the process's.
        cpus: how many CPUs there are.
    """

    class Root(k42.SharedRoot):
        """Holds the native half."""

        def __init__(self, id: int, region_map: _native.RegionMap, cpus: int) -> None:
            self.hat = _native.SoftHat(id, region_map, cpus)

    root: Root

    def native(self) -> _native.SoftHat:
        """The native half."""
        return self.root.hat
