"""Page managers (PM): who may have a frame (paper section 4.2)."""

from k42.vm.pm.global_pm import (
    ABOVE_SHARE,
    ANYBODYS,
    Backing,
    DistributedGlobalPM,
    GlobalPageManager,
    Level,
    SharedGlobalPM,
)
from k42.vm.pm.process_pm import PageManager, ProcessPM

__all__ = [
    "ABOVE_SHARE",
    "ANYBODYS",
    "Backing",
    "DistributedGlobalPM",
    "GlobalPageManager",
    "Level",
    "PageManager",
    "ProcessPM",
    "SharedGlobalPM",
]
