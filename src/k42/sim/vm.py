"""The virtual memory objects of the paper (section 4) as they run on a simulated machine.

Each object says which words it reads and writes on the path of a page fault, and computes for an estimated time in
between; in the program the same is native code, whose accesses nobody sees. What is where follows the paper: what a
lock protects, what is on the path of a fault, what is copied to whom. Between a call by reference and the method lies
an access to the processor's translation table.

The costs of computing (`Costs`) are estimates, and no curve of the paper went into them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from k42.errors import Error
from k42.sim.locks import QueueLock, SpinLock
from k42.sim.simulation import Simulation

PAGE = 4096  # bytes
_REFILL = 64  # frames that a processor's free list gets at once
_PARTS = 16  # tables of the partitioned FCM
_SPAN = 512  # pages of the file that in turn belong to one of them
_BUCKETS = 4096  # of a page table
_OTHERS = 6  # regions of a process beside those of the workload: text, data, stack, libraries
_FRAMES = 1 << 39  # where the descriptors of frames are
MEMORY = 1 << 40
"""Where frames are, in bytes."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """Cycles of computing, beside what memory takes.

    Attributes:
        fault: until a fault's handler runs, and back to the program: the paper's call into the kernel (section 1.1).
        call: of a method by its reference.
        element: to look at one element of a list or a bucket.
        region: address to page of the file, and the checks.
        fcm: of the FCM, for one fault.
        frames: of the PM or the Global PM, for one frame.
        hat: to enter one page into a processor's page table.
        touch: of the program, between two faults.
        search: of `grep`, for one page.
        map: a region made, with its FCM: what mapping takes in the paper (20.19 µs, section 4.1).
        unmap: and all that goes with it (11.12 µs).
        unmap_processor: of the HAT, for each processor that used it (153 µs on 24, less the above).
    """

    fault: int = 721
    call: int = 12
    element: int = 8
    region: int = 150
    fcm: int = 900
    frames: int = 200
    hat: int = 900
    touch: int = 100
    search: int = 8192
    map: int = 12_114
    unmap: int = 6_672
    unmap_processor: int = 3_547


@dataclasses.dataclass(frozen=True)
class Variants:
    """Which implementation each object has.

    Attributes:
        process: ``shared`` or ``distributed`` (figure 5).
        global_pm: ``shared`` or ``distributed`` (figure 7).
        region: ``shared`` or ``distributed`` (figure 10).
        fcm: ``shared``, ``replicated`` (figure 11) or ``partitioned`` (section 4.4).
    """

    process: str = "distributed"
    global_pm: str = "distributed"
    region: str = "distributed"
    fcm: str = "shared"

    def __post_init__(self) -> None:
        for name, known in _KINDS.items():
            if (kind := getattr(self, name)) not in known:
                raise Error(f"there is no {kind} {name}; there are: {', '.join(known)}")


class _Object:
    """What all have in common: where they are, what computing costs, and the processors' translation tables."""

    def __init__(self, kernel: Kernel) -> None:
        self.sim = kernel.sim
        self.costs = kernel.costs
        self._entries = kernel.translations()

    def called(self) -> None:
        """The call of a method by reference: the processor's own table, and the representative's class."""
        self.sim.load(self._entries[self.sim.processor()])
        self.sim.work(self.costs.call)

    def private(self, size: int) -> list[int]:
        """Addresses of `size` bytes for each processor, on lines of their own."""
        return [self.sim.allocate(size, padded=True) for _ in range(self.sim.processors)]


class SharedGlobalPM(_Object):
    """One list of free frames under one lock (figure 7, left)."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self._lock = QueueLock(self.sim)
        self._head = self.sim.allocate(16, padded=True)
        self.taken = 0

    def frame(self) -> int:
        """Take a frame; its address."""
        self.called()
        with self._lock:
            return self._take()

    def frames(self, count: int) -> list[int]:
        """Take frames."""
        with self._lock:
            return [self._take() for _ in range(count)]

    def _take(self) -> int:
        sim, number = self.sim, self.taken
        self.taken += 1
        sim.load(self._head)
        sim.load(_FRAMES + number * 32)  # the descriptor, which leads to the next
        sim.work(self.costs.frames)
        sim.store(self._head)
        return MEMORY + number * PAGE


class DistributedGlobalPM(_Object):
    """A list of free frames for each processor, and the overflow list that they are filled from (figure 7, right)."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self._overflow = SharedGlobalPM(kernel)
        self._heads = self.private(16)
        self._free: list[list[int]] = [[] for _ in range(self.sim.processors)]

    @property
    def taken(self) -> int:
        """How many frames are in use."""
        return self._overflow.taken - sum(map(len, self._free))

    def frame(self) -> int:
        """Take a frame; its address."""
        self.called()
        sim, me = self.sim, self.sim.processor()
        if not self._free[me]:
            self._free[me] = self._overflow.frames(_REFILL)[::-1]
        sim.load(self._heads[me])
        sim.work(self.costs.frames)
        sim.store(self._heads[me])
        return self._free[me].pop()


class _List:
    """A list of regions: elements side by side, as an allocator gives them."""

    def __init__(self, owner: _Object) -> None:
        self._owner = owner
        self._sim = owner.sim
        self._head = self._sim.allocate(16, padded=True)
        self.elements: list[tuple[int, object]] = []  # (address, what)

    def append(self, what: object) -> None:
        """Put it at the end."""
        self._sim.store(self._head)
        if self.elements:
            self._sim.store(self.elements[-1][0])
        self.elements.append((self._sim.allocate(64), what))
        self._sim.store(self.elements[-1][0])

    def find(self, what: object) -> bool:
        """Whether it is there."""
        self._sim.load(self._head)
        for address, other in self.elements:
            self._sim.load(address)
            self._sim.work(self._owner.costs.element)
            if other is what:
                return True
        return False

    def remove(self, what: object) -> None:
        """Take it out."""
        if self.find(what):
            place = next(i for i, (_, other) in enumerate(self.elements) if other is what)
            self._sim.store(self.elements[place - 1][0] if place else self._head)
            del self.elements[place]


class SharedProcess(_Object):
    """One list of regions under one lock (figure 5, left)."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self._lock = QueueLock(self.sim)
        self._regions = _List(self)
        self._regions.elements = [(self.sim.allocate(64), object()) for _ in range(_OTHERS)]

    def fault(self, region: Region, page: int) -> None:
        """Handle a fault."""
        self.called()
        with self._lock:
            if not self._regions.find(region):
                raise Error("a fault outside of all regions")
        region.fault(page)

    def attach(self, region: Region) -> None:
        """Add a region."""
        self.called()
        with self._lock:
            self._regions.append(region)

    def detach(self, region: Region) -> None:
        """Remove a region."""
        self.called()
        with self._lock:
            self._regions.remove(region)


class DistributedProcess(SharedProcess):
    """The same as the master, and on each processor a list of the regions used there (figure 5, right)."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self._locks = [SpinLock(self.sim) for _ in range(self.sim.processors)]
        self._local = [_List(self) for _ in range(self.sim.processors)]
        self._cached: dict[int, list[int]] = {}  # region's id: processors that have it in their lists

    def fault(self, region: Region, page: int) -> None:
        """Handle a fault: by the local list, or by the master, which is then copied from."""
        self.called()
        me = self.sim.processor()
        with self._locks[me]:
            found = self._local[me].find(region)
        if not found:
            with self._lock:
                if not self._regions.find(region):
                    raise Error("a fault outside of all regions")
                self._cached.setdefault(id(region), []).append(me)
            with self._locks[me]:
                self._local[me].append(region)
        region.fault(page)

    def detach(self, region: Region) -> None:
        """Remove a region from the master, and from the lists of all who used it."""
        super().detach(region)
        for processor in self._cached.pop(id(region), []):
            with self._locks[processor]:
                self._local[processor].remove(region)


class SharedRegion(_Object):
    """Requests are counted in one word (section 4.3)."""

    def __init__(self, kernel: Kernel, fcm: Fcm, first: int = 0) -> None:
        super().__init__(kernel)
        self._fcm = fcm
        self._first = first  # the file's page at its start
        self._fields = self.sim.allocate(64, padded=True)  # addresses, the file, the FCM: read only
        self._requests = self._counters()

    def _counters(self) -> list[int]:
        return [self.sim.allocate(8, padded=True)] * self.sim.processors

    def fault(self, page: int) -> None:
        """Handle a fault on a page of the region."""
        self.called()
        sim, requests = self.sim, self._requests[self.sim.processor()]
        sim.update(requests)
        sim.load(self._fields)
        sim.work(self.costs.region)
        self._fcm.fault(self._first + page)
        sim.update(requests)


class DistributedRegion(SharedRegion):
    """Requests are counted by each processor for itself (figure 10)."""

    def _counters(self) -> list[int]:
        return self.private(8)


class _Table:
    """A hash table of page descriptors.

    Args:
        owner: whose.
        fine: buckets are locked one by one, and who is inside is counted, since the table may grow; else whoever calls
            has a lock, or is alone.
    """

    def __init__(self, owner: _Object, *, fine: bool = False) -> None:
        self._sim = owner.sim
        self._element = owner.costs.element
        self._buckets = self._sim.allocate(8 * _BUCKETS, padded=True)
        self._users = self._sim.allocate(8, padded=True)
        self._fine = fine
        self._locks: dict[int, SpinLock] = {}
        self.pages: dict[int, int] = {}  # page: address of its descriptor

    def find(self, page: int) -> int | None:
        """The descriptor of a page."""
        self._sim.load(self._bucket(page))
        self._sim.work(self._element)
        known = self.pages.get(page)
        if known is not None:
            self._sim.load(known)
        return known

    def find_or_allocate(self, page: int) -> tuple[int, bool]:
        """The descriptor of a page, and whether it is new."""
        if not self._fine:
            return self._find_or_allocate(page)
        self._sim.update(self._users)
        bucket = self._bucket(page)
        with self._locks.setdefault(bucket, SpinLock(self._sim, bucket)):
            found = self._find_or_allocate(page)
        self._sim.update(self._users)
        return found

    def _find_or_allocate(self, page: int) -> tuple[int, bool]:
        if (known := self.find(page)) is not None:
            return known, False
        descriptor = self.pages[page] = self._sim.allocate(64, padded=True)
        self._sim.store(descriptor)
        self._sim.store(self._bucket(page))
        return descriptor, True

    def _bucket(self, page: int) -> int:
        return self._buckets + 8 * (page * 0x9E3779B1 % _BUCKETS)


class _AnyFcm(_Object):
    """What is alike: a page that is found is mapped; one that is new gets a frame of zeros before."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self._kernel = kernel

    def fault(self, page: int) -> None:
        """Handle a fault on a page of the file."""
        self.called()
        descriptor, new = self._find(page)
        self.sim.work(self.costs.fcm)
        if new:
            self.sim.claim(self._kernel.pm.frame(), PAGE)
            self._now_resident(descriptor)
        self._kernel.hat.map(page)

    def tables(self) -> list[_Table]:
        """The tables that say which pages are resident."""
        raise NotImplementedError

    def resident(self) -> set[int]:
        """The pages that are resident."""
        return {page for table in self.tables() for page in table.pages}

    def _find(self, page: int) -> tuple[int, bool]:
        raise NotImplementedError

    def _now_resident(self, descriptor: int) -> None:
        self.sim.store(descriptor)


class SharedFcm(_AnyFcm):
    """One table under one lock, which is taken again when a page has become resident (section 4.4)."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self._lock = QueueLock(self.sim)
        self._table = _Table(self)

    def tables(self) -> list[_Table]:
        """The one table."""
        return [self._table]

    def _find(self, page: int) -> tuple[int, bool]:
        with self._lock:
            return self._table.find_or_allocate(page)

    def _now_resident(self, descriptor: int) -> None:
        with self._lock:
            super()._now_resident(descriptor)


class ReplicatedFcm(_AnyFcm):
    """DHash (figure 11): each processor has copies of the descriptors that it used, of a master with locked buckets."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self._master = _Table(self, fine=True)
        self._local = [_Table(self) for _ in range(self.sim.processors)]
        self._inside = self.private(8)  # requests in the local table

    def tables(self) -> list[_Table]:
        """The master."""
        return [self._master]

    def _find(self, page: int) -> tuple[int, bool]:
        sim, me = self.sim, self.sim.processor()
        sim.update(self._inside[me])
        new = False
        descriptor = self._local[me].find(page)
        if descriptor is None:
            master, new = self._master.find_or_allocate(page)
            descriptor, _ = self._local[me].find_or_allocate(page)
            sim.store(master)  # it leads to its copies
        sim.update(descriptor)  # the element is locked
        sim.store(descriptor)
        sim.update(self._inside[me])
        return descriptor, new


class PartitionedFcm(_AnyFcm):
    """Tables for disjoint sets of pages, by shift and modulo of the page (section 4.4)."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self._parts = [_Table(self, fine=True) for _ in range(_PARTS)]

    def tables(self) -> list[_Table]:
        """All parts."""
        return self._parts

    def _find(self, page: int) -> tuple[int, bool]:
        return self._parts[page // _SPAN % _PARTS].find_or_allocate(page)


class Pm(_Object):
    """A process's page manager: passes on to the Global PM (section 4.2)."""

    def __init__(self, kernel: Kernel, global_pm: GlobalPm) -> None:
        super().__init__(kernel)
        self._global_pm = global_pm
        self._fields = self.sim.allocate(16, padded=True)

    def frame(self) -> int:
        """A frame's address."""
        self.called()
        self.sim.load(self._fields)
        return self._global_pm.frame()


class Hat(_Object):
    """The page tables, one for each processor."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel)
        self._tables = self.private(8 << 20)

    def map(self, page: int) -> None:
        """Enter a page into this processor's."""
        self.called()
        self.sim.work(self.costs.hat)
        self.sim.store(self._tables[self.sim.processor()] + 8 * (page % (1 << 20)))


Process = SharedProcess | DistributedProcess
Region = SharedRegion | DistributedRegion
Fcm = SharedFcm | ReplicatedFcm | PartitionedFcm
GlobalPm = SharedGlobalPM | DistributedGlobalPM

PROCESSES: dict[str, Callable[[Kernel], Process]] = {"shared": SharedProcess, "distributed": DistributedProcess}
GLOBAL_PMS: dict[str, Callable[[Kernel], GlobalPm]] = {"shared": SharedGlobalPM, "distributed": DistributedGlobalPM}
REGIONS: dict[str, Callable[..., Region]] = {"shared": SharedRegion, "distributed": DistributedRegion}
FCMS: dict[str, Callable[[Kernel], Fcm]] = {
    "shared": SharedFcm,
    "replicated": ReplicatedFcm,
    "partitioned": PartitionedFcm,
}
_KINDS: dict[str, Iterable[str]] = {"process": PROCESSES, "global_pm": GLOBAL_PMS, "region": REGIONS, "fcm": FCMS}


class Kernel:
    """The objects of one simulated kernel.

    Args:
        sim: where.
        variants: which implementations they have.
        costs: of computing.
    """

    def __init__(self, sim: Simulation, variants: Variants | None = None, costs: Costs | None = None) -> None:
        self.sim = sim
        self.costs = costs or Costs()
        self.variants = variants or Variants()
        self._translations = [sim.allocate(1 << 16, padded=True) for _ in range(sim.processors)]
        self._objects = 0
        self.hat = Hat(self)
        self.global_pm = GLOBAL_PMS[self.variants.global_pm](self)
        self.pm = Pm(self, self.global_pm)

    def translations(self) -> list[int]:
        """The addresses of a new object's entries in the local translation tables."""
        self._objects += 1
        return [table + 16 * self._objects for table in self._translations]

    def process(self) -> Process:
        """A new process."""
        return PROCESSES[self.variants.process](self)

    def fcm(self) -> Fcm:
        """A new file, or anonymous memory."""
        return FCMS[self.variants.fcm](self)

    def region(self, fcm: Fcm, first: int = 0) -> Region:
        """A new region that shows a file from a page on."""
        return REGIONS[self.variants.region](self, fcm, first)

    def fault(self, process: Process, region: Region, page: int) -> None:
        """A program touches a page of a region that its processor has not mapped."""
        self.sim.work(self.costs.fault)
        process.fault(region, page)

    def zero_fill(self, frame: int) -> None:
        """The least that a fault on new memory costs: a page of zeros, mapped, by no object (figure 6)."""
        self.sim.work(self.costs.fault)
        self.sim.claim(MEMORY + frame * PAGE, PAGE)
        self.hat.map(frame)
