"""Clustered Objects: one reference to everyone, a representative for each processor (section 2.2)."""

from __future__ import annotations

import atexit

from k42 import _native
from k42._native import destroy, local, request, uninstalled
from k42.objects import processors
from k42.objects.interposition import Call, Interposition, interpose
from k42.objects.object import Object
from k42.objects.root import ClusteredRoot, DistributedRoot, PartitionedRoot, Root, SharedRoot, global_method
from k42.objects.swap import swap

__all__ = [
    "Call",
    "ClusteredRoot",
    "DistributedRoot",
    "Interposition",
    "Object",
    "PartitionedRoot",
    "Root",
    "SharedRoot",
    "destroy",
    "global_method",
    "interpose",
    "local",
    "processors",
    "request",
    "swap",
    "uninstalled",
]

# Hooks that wait for an owner of their processor run now, whoever this thread is.
atexit.register(_native.open_mail_of_all)
