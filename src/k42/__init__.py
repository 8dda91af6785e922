"""k42: software that scales because it is local. Clustered Objects and a user-space virtual memory system."""

from __future__ import annotations

from k42.errors import Destroyed, Error
from k42.objects import DistributedRoot, Object, Root, SharedRoot, destroy, local, processors

__version__ = "0.1.0"

__all__ = [
    "Destroyed",
    "DistributedRoot",
    "Error",
    "Object",
    "Root",
    "SharedRoot",
    "destroy",
    "local",
    "processors",
]
