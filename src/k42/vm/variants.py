"""Which implementations a kernel makes its objects of: ``k42 serve --objects shared|distributed``.

Each object can be given another one later, by `k42.swap`, while it serves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from k42.vm.adapt import Watched
from k42.vm.fcm import PartitionedFCM, ReplicatedFCM, SharedFCM
from k42.vm.pm.global_pm import DistributedGlobalPM, GlobalPageManager, SharedGlobalPM
from k42.vm.process import DistributedProcess, SharedProcess
from k42.vm.region import DistributedRegion, SharedRegion

if TYPE_CHECKING:
    from k42.vm.kernel import _Client


@dataclass(frozen=True)
class Variants:
    """The class of each object of the fault path that has several."""

    process: type[SharedProcess] | type[DistributedProcess] = DistributedProcess
    region: type[SharedRegion] | type[DistributedRegion] = DistributedRegion
    # Copies of descriptors cost 100 bytes a page and processor: worth it only for files that many processors share.
    fcm: type[SharedFCM] = SharedFCM
    global_pm: type[SharedGlobalPM] | type[DistributedGlobalPM] = DistributedGlobalPM

    adapt: bool = False
    """Swap them by who uses them."""

    @classmethod
    def named(cls, text: str, *, adapt: bool = False) -> Variants:
        """The variants that a user names.

        Args:
            text: ``shared`` or ``distributed``, for all objects; then, with commas, others for single ones, such as
                ``distributed,region=shared``. ``default``: what is best for most.
            adapt: swap them by who uses them; see `k42.vm.adapt`.

        Raises:
            ValueError: there is no such object or implementation.
        """
        chosen = cls(adapt=adapt)
        for part in text.removeprefix("default").removeprefix(",").split(",") if text != "default" else ():
            name, equals, implementation = part.partition("=")
            objects = (name,) if equals else tuple(_CLASSES)
            for name in objects:
                try:
                    chosen = replace(chosen, **{name: _CLASSES[name][implementation if equals else part]})
                except KeyError:
                    known = ", ".join(f"{key}={'|'.join(_CLASSES[key])}" for key in _CLASSES)
                    raise ValueError(f"{part!r}: say shared or distributed, or {known}") from None
        return chosen

    @staticmethod
    def watched(global_pm: GlobalPageManager, clients: Iterable[_Client]) -> Iterator[Watched]:
        """The objects of a kernel that can be either, for `Adapter.look`."""
        yield Watched(global_pm, global_pm.native().traffic, SharedGlobalPM, DistributedGlobalPM)
        for client in list(clients):
            process = client.process
            yield Watched(process, process.region_map().traffic, SharedProcess, DistributedProcess)
            for mapped in list(client.regions.values()):
                yield Watched(mapped.region, mapped.region.native().traffic, SharedRegion, DistributedRegion)


_CLASSES: dict[str, dict[str, Any]] = {
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


def choices() -> dict[str, tuple[str, ...]]:
    """The objects that have several implementations, and a name of each, as `Variants.named` takes them."""
    return {name: tuple({made: text for text, made in classes.items()}.values()) for name, classes in _CLASSES.items()}
