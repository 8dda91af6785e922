"""Which implementations a kernel makes its objects of: ``k42 serve --objects shared|distributed``.

Each object can be given another one later, by `k42.swap`, while it serves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from k42.vm.fcm import PartitionedFCM, ReplicatedFCM, SharedFCM
from k42.vm.pm.global_pm import DistributedGlobalPM, SharedGlobalPM
from k42.vm.process import DistributedProcess, SharedProcess
from k42.vm.region import DistributedRegion, SharedRegion


@dataclass(frozen=True)
class Variants:
    """The class of each object of the fault path that has several."""

    process: type[SharedProcess] | type[DistributedProcess] = DistributedProcess
    region: type[SharedRegion] | type[DistributedRegion] = DistributedRegion
    fcm: type[SharedFCM] = ReplicatedFCM
    global_pm: type[SharedGlobalPM] | type[DistributedGlobalPM] = DistributedGlobalPM

    @classmethod
    def named(cls, text: str) -> Variants:
        """The variants that a user names.

        Args:
            text: ``shared`` or ``distributed``, for all objects; then, with commas, others for single ones, such as
                ``distributed,region=shared``.

        Raises:
            ValueError: there is no such object or implementation.
        """
        chosen = cls()
        for part in text.split(","):
            name, equals, implementation = part.partition("=")
            objects = (name,) if equals else tuple(_CLASSES)
            for name in objects:
                try:
                    chosen = replace(chosen, **{name: _CLASSES[name][implementation if equals else part]})
                except KeyError:
                    known = ", ".join(f"{key}={'|'.join(_CLASSES[key])}" for key in _CLASSES)
                    raise ValueError(f"{part!r}: say shared or distributed, or {known}") from None
        return chosen


_CLASSES: dict[str, dict[str, type]] = {
    "process": {"shared": SharedProcess, "distributed": DistributedProcess},
    "region": {"shared": SharedRegion, "distributed": DistributedRegion},
    "fcm": {
        "shared": SharedFCM,
        "distributed": ReplicatedFCM,
        "replicated": ReplicatedFCM,
        "partitioned": PartitionedFCM,
    },
    "global_pm": {"shared": SharedGlobalPM, "distributed": DistributedGlobalPM},
}
