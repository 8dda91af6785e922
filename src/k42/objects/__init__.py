"""Clustered Objects: one reference to everyone, a representative for each processor (section 2.2)."""

from __future__ import annotations

from k42._native import destroy, local
from k42.objects import processors
from k42.objects.object import Object
from k42.objects.root import DistributedRoot, Root, SharedRoot

__all__ = ["DistributedRoot", "Object", "Root", "SharedRoot", "destroy", "local", "processors"]
