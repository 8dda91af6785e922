"""Ready-made Clustered Objects, one file each: an interface and its implementations."""

from __future__ import annotations

from k42.structures.counter import AtomicCounter, Counter, DistributedCounter, PackedCounter, SharedCounter
from k42.structures.gate import DistributedGate, Gate, SharedGate
from k42.structures.interval_map import Interval, IntervalMap, ReplicatedIntervalMap, SharedIntervalMap
from k42.structures.map import Map, PartitionedMap, ReplicatedMap, SharedMap
from k42.structures.pool import DistributedPool, Pool, PoolStat, SharedPool

__all__ = [
    "AtomicCounter",
    "Counter",
    "DistributedCounter",
    "DistributedGate",
    "DistributedPool",
    "Gate",
    "Interval",
    "IntervalMap",
    "Map",
    "PackedCounter",
    "PartitionedMap",
    "Pool",
    "PoolStat",
    "ReplicatedIntervalMap",
    "ReplicatedMap",
    "SharedCounter",
    "SharedGate",
    "SharedIntervalMap",
    "SharedMap",
    "SharedPool",
]
