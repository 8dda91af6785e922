"""A kernel whose objects are counted, for the experiment `objects`; its argument says how, as an object in JSON.

Who calls an object is counted by an arbiter on each (`k42.interpose`), by the CPU where the call is made. The fault
engine makes no such calls: it walks the native halves, and how often, by its server thread of each CPU, stands in the
parts of distributed objects anyway; it is read when they end. So a kernel that nobody counts pays nothing, and one that
is counted serves its faults as ever.

What is not counted: file representatives, which the kernel also asks about by ``k42.local``, past any arbiter.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import k42
from k42 import _native
from k42.objects.interposition import Call
from k42.vm.fr import FileRepresentative
from k42.vm.kernel import Kernel
from k42.vm.process import Process
from k42.vm.region import Region

_WORKER = "k42-worker-"  # how the threads are called that finish the faults which the engine hands up


class Counted:
    """What is known of one object.

    Args:
        kind: the class of its representatives.
        number: how many came before it.

    Attributes:
        created: the CPU where it was made.
        destroyed: the CPU where it was destroyed; None: it is there yet.
        owners: numbers of the processes that it serves; empty: all of them.
        shows: of a region, the FCM.
        anonymous: of a region or an FCM, whether it is of anonymous memory.
    """

    def __init__(self, kind: type[Any], number: int) -> None:
        self.kind = kind
        self.number = number
        self.created = _native.current_cpu()
        self.destroyed: int | None = None
        self.owners: set[int] = set()
        self.shows: Counted | None = None
        self.anonymous = False
        self._calls: dict[tuple[int, int, bool], int] = {}  # by thread, CPU, and whether it finishes a fault
        self._engine: Counter[int] = Counter()  # by CPU

    def called(self) -> None:
        """It is called here. Each thread has entries of its own: none is lost."""
        thread = threading.current_thread()
        key = (threading.get_ident(), _native.current_cpu(), thread.name.startswith(_WORKER))
        self._calls[key] = self._calls.get(key, 0) + 1

    def add_engine(self, uses: Counter[int]) -> None:
        """The fault engine has used it so often, by CPU."""
        self._engine.update(uses)

    def uses(self, *, faults: bool) -> Counter[int]:
        """How often it was used on each CPU to serve a fault, or else for a request."""
        uses = Counter(self._engine) if faults else Counter[int]()
        for (_, cpu, fault), count in self._calls.items():
            if fault == faults:
                uses[cpu] += count
        return uses

    def to_json(self) -> dict[str, Any]:
        """As the experiment reads it."""
        return {
            "kind": self.kind.__name__,
            "number": self.number,
            "owners": sorted(self.owners),
            "anonymous": self.anonymous,
            "created": self.created,
            "destroyed": self.destroyed,
            "faults": self.uses(faults=True),
            "requests": self.uses(faults=False),
        }


class Census:
    """Counts all objects that are made from its `begin` on.

    Args:
        without: classes of representatives that are not counted.
    """

    def __init__(self, *without: type[Any]) -> None:
        self._without = without
        self._objects: dict[Any, Counted] = {}  # by reference; those that are there yet
        self._ended: list[Counted] = []
        self._over = False

    def begin(self) -> None:
        """Counts from now on; while no other thread makes or destroys objects."""
        _native.watch(self)

    def end(self) -> None:
        """What is there yet lasts as long as the program: that it is destroyed then does not count."""
        self._over = True

    def close(self) -> list[Counted]:
        """Counts no more; all objects, in the order in which they were made."""
        _native.watch(None)
        return sorted([*self._ended, *self._objects.values()], key=lambda counted: counted.number)

    # For the runtime.

    def created(self, reference: Any) -> None:
        """An object is made; its root's `__init__` has not run."""
        kind = _native.root_of(reference).rep_class
        if issubclass(kind, self._without):
            return
        counted = self._objects[reference] = Counted(kind, len(self._objects) + len(self._ended))

        def arbiter(call: Call) -> Any:
            counted.called()
            self._called(counted, call)
            return call.proceed()

        k42.interpose(reference, arbiter)

    def ending(self, reference: Any) -> None:
        """An object is about to be destroyed."""
        counted = self._objects.get(reference)
        if counted is None:
            return
        if not self._over:
            counted.destroyed = _native.current_cpu()
        self._ends(counted, reference)
        self._ended.append(counted)
        del self._objects[reference]

    # For who knows more of some objects.

    def _called(self, counted: Counted, call: Call) -> None:
        pass

    def _ends(self, counted: Counted, reference: Any) -> None:
        pass


class _HasUses(Protocol):
    """A native half that counts its uses by processor."""

    def uses_by(self, processor: int, /) -> int: ...


class KernelCensus(Census):
    """The census of one kernel, which knows whom an object serves, and what the fault engine does."""

    def __init__(self) -> None:
        super().__init__(FileRepresentative)
        self.kernel: Kernel | None = None  # from when it is made; before there is no fault
        self._processes = 0

    def _called(self, counted: Counted, call: Call) -> None:
        if call.name == "attach_hat":
            self._processes += 1
            for reference in (call.ref, call.args[0], _native.root_of(call.ref).pm):
                self._objects[reference].owners.add(self._processes)
        elif call.name == "attach_region":
            region = self._objects[call.args[1]]
            shown = _native.root_of(call.args[1]).fcm
            region.shows = self._objects[shown]
            region.anonymous = region.shows.anonymous = _native.root_of(shown).anonymous
            for each in (region, region.shows):
                each.owners |= counted.owners

    def _ends(self, counted: Counted, reference: Any) -> None:
        # Each fault that the engine serves is one use of the Process and the HAT, and of the Region and the FCM.
        root = _native.root_of(reference)
        if issubclass(counted.kind, Region):
            also, uses = counted.shows, self._engine_uses(root.region)
        elif issubclass(counted.kind, Process):
            also, uses = self._objects.get(root.hat), self._engine_uses(root.map)
        else:
            return
        for each in (counted, also):
            if each is not None:
                each.add_engine(uses)

    def _engine_uses(self, native: _HasUses) -> Counter[int]:
        assert self.kernel is not None
        processors = zip(self.kernel.cpus, self.kernel._engine.processors(), strict=True)
        return +Counter({cpu: native.uses_by(number) for cpu, number in processors if number is not None})

    def close(self) -> list[Counted]:
        """Counts no more; all objects, in the order in which they were made."""
        assert self.kernel is not None
        pm = self.kernel._global_pm
        self._objects[pm].add_engine(self._engine_uses(pm.native()))
        return super().close()


def main(job: dict[str, Any]) -> None:
    """Run a kernel until SIGTERM, then print what its objects were used for."""
    os.sched_setaffinity(0, job["cpus"])
    census = KernelCensus()
    census.begin()
    kernel = census.kernel = Kernel(Path(job["socket"]), job["budget"], None)

    def stop(_number: int, _frame: object) -> None:
        census.end()
        kernel.stop()

    signal.signal(signal.SIGTERM, stop)
    print("ready", flush=True)
    kernel.run()
    print(json.dumps([counted.to_json() for counted in census.close()]), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
