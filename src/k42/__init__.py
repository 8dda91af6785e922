"""k42: software that scales because it is local. Clustered Objects and a user-space virtual memory system."""

from __future__ import annotations

from k42.errors import Destroyed, Error, GateClosed, PoolExhausted, SwapRefused
from k42.objects import (
    Call,
    ClusteredRoot,
    DistributedRoot,
    Interposition,
    Object,
    PartitionedRoot,
    Root,
    SharedRoot,
    destroy,
    global_method,
    interpose,
    local,
    processors,
    request,
    swap,
    uninstalled,
)

__version__ = "0.1.0"

__all__ = [
    "Call",
    "ClusteredRoot",
    "Destroyed",
    "DistributedRoot",
    "Error",
    "GateClosed",
    "Interposition",
    "Object",
    "PartitionedRoot",
    "PoolExhausted",
    "Root",
    "SharedRoot",
    "SwapRefused",
    "destroy",
    "global_method",
    "interpose",
    "local",
    "processors",
    "request",
    "swap",
    "uninstalled",
]
