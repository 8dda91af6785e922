"""The Python objects and the fault engine are two ways through one protocol: the same schedule gives the same end.

Both run on the soft HAT, so that a schedule is a list and thousands of them run in seconds.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vm_support import until

import k42
from k42 import _native
from k42.vm.fault import Fault
from k42.vm.fcm import SharedFCM
from k42.vm.fr import FileFR, ZeroFR
from k42.vm.hat import SoftHat
from k42.vm.pm import Backing, ProcessPM, SharedGlobalPM
from k42.vm.process import SharedProcess
from k42.vm.protocol import PAGE
from k42.vm.region import SharedRegion

BASE = 0x7F0000000000
CPUS = 2


@dataclass(frozen=True)
class Setup:
    budget: int
    file_pages: int
    tail: int  # bytes of the last page that are not there
    anonymous_pages: int
    overcommit: bool
    group: int


setups = st.builds(
    Setup,
    budget=st.integers(40, 80),
    file_pages=st.integers(1, 70),
    tail=st.integers(0, PAGE - 1),
    anonymous_pages=st.integers(1, 24),
    overcommit=st.booleans(),
    group=st.sampled_from([1, 2, 4, 16]),
)
# What happens: a fault (which mapping, where, on which CPU), or memory pressure on the file.
steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["file", "anonymous"]), st.floats(0, 1, exclude_max=True), st.integers(0, CPUS - 1)),
        st.tuples(st.just("give back"), st.integers(1, 20)),
        st.tuples(st.just("restart"), st.floats(0, 1, exclude_max=True)),
    ),
    max_size=60,
)


class World:
    """One process with a file and anonymous memory mapped, on the soft HAT."""

    def __init__(self, setup: Setup, path: str) -> None:
        self.global_pm = SharedGlobalPM.create(setup.budget)
        self.pm = ProcessPM.create(self.global_pm)
        self.process = SharedProcess.create(self.pm)
        self.hat = SoftHat.create(1, self.process.region_map(), CPUS)
        self.process.attach_hat(self.hat)
        self.global_pm.promise_file(max(setup.group, self.global_pm.cluster()))
        file = SharedFCM.create(self.global_pm, FileFR.create(os.open(path, os.O_RDONLY), path), Backing.FILE, CPUS)
        self.global_pm.attach_fcm(file)
        if not setup.overcommit:
            self.global_pm.reserve(setup.anonymous_pages)
        backing = Backing.OVERCOMMITTED if setup.overcommit else Backing.RESERVED
        anonymous = SharedFCM.create(self.global_pm, ZeroFR.create(setup.anonymous_pages * PAGE), backing, CPUS)
        self.fcms = {"file": file, "anonymous": anonymous}
        self.starts = {"file": BASE, "anonymous": BASE + (1 << 30)}
        self.pages = {"file": setup.file_pages, "anonymous": setup.anonymous_pages}
        self.regions = {}
        self.windows: dict[tuple[str, int], int] = {}
        for kind, fcm in self.fcms.items():
            region = SharedRegion.create(fcm, self.hat, self.starts[kind], self.pages[kind], 0, setup.group)
            assert self.process.attach_region(self.starts[kind], region)
            fcm.native().attach(region.native())
            self.regions[kind] = region
            for cpu in range(CPUS):  # each CPU sees the region at other addresses
                window = self.starts[kind] + cpu * (1 << 35)
                assert self.hat.add_window(cpu, window, self.pages[kind] * PAGE, self.starts[kind])
                self.windows[kind, cpu] = window
        self.engine = _native.Engine(range(CPUS), False, False)

    def run(self, schedule: list[tuple[object, ...]], *, natively: bool) -> None:
        for step in schedule:
            match step:
                case ("give back", int(count)):
                    self.fcms["file"].give_back(count)
                case ("restart", float(where)):
                    # A region that was stopped and let go again serves as before.
                    region = self.regions["file" if where < 0.5 else "anonymous"].native()
                    assert region.stop()
                    assert region.restart()
                case (str(kind), float(where), int(cpu)):
                    offset = int(where * self.pages[kind]) * PAGE
                    address = self.windows[kind, cpu] + offset
                    if natively and self.engine.handle(self.hat.native(), cpu, address, False):
                        continue
                    self.process.handle_fault(Fault(cpu, address, self.starts[kind] + offset))
                    until(self.is_quiet, "what was asked of the store is there")

    def is_quiet(self) -> bool:
        counts = [fcm.stat() for fcm in self.fcms.values()]
        return all(count["io_submitted"] == count["io_done"] for count in counts)

    def end(self) -> dict[str, object]:
        """All that a schedule can change."""
        record = self.hat.native().record()
        return {
            "mapped": record["mapped"],
            "failed": record["failed"],
            "frames": self.global_pm.usage(),
            **{
                f"{kind} {what}": value
                for kind, fcm in self.fcms.items()
                for what, value in {
                    **fcm.native().counts(),
                    "resident": fcm.native().resident(),
                    "frames": os.fstat(fcm.memfd()).st_blocks * 512 // PAGE,
                    "bytes": os.pread(fcm.memfd(), 1 << 20, 0),
                }.items()
            },
        }

    def close(self) -> None:
        for kind, fcm in self.fcms.items():
            self.regions[kind].shutdown()
            self.process.detach_region(self.starts[kind])
            fcm.native().detach(self.regions[kind].native())
            fcm.close()
        for object_ in (*self.regions.values(), *self.fcms.values(), self.process, self.hat, self.pm, self.global_pm):
            k42.destroy(object_)


def check_invariants(end: dict[str, object], world: World) -> None:
    frames = end["frames"]
    assert isinstance(frames, dict)
    used = frames["file"] + frames["reserved"] + frames["overcommitted"]
    assert used <= frames["budget"]
    resident = {kind: len(world.fcms[kind].native().resident()) for kind in world.fcms}
    # Frames are conserved: the pool's count, our table, and what Linux allocated are one.
    assert used == sum(resident.values()) == end["file frames"] + end["anonymous frames"]
    for address in end["mapped"]:
        kind = "file" if address < world.starts["anonymous"] else "anonymous"
        page = (address - world.starts[kind]) // PAGE
        assert page in world.fcms[kind].native().resident(), "mapped, but not resident"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(setup=setups, schedule=steps)
def test_the_engine_and_the_objects_agree(setup: Setup, schedule: list[tuple[object, ...]]) -> None:
    content = os.urandom(setup.file_pages * PAGE - setup.tail)
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        ends = []
        for natively in (False, True):
            world = World(setup, file.name)
            world.run(schedule, natively=natively)
            end = world.end()
            check_invariants(end, world)
            for page in world.fcms["file"].native().resident():
                have = os.pread(world.fcms["file"].memfd(), PAGE, page * PAGE)
                assert have == content[page * PAGE :][:PAGE].ljust(PAGE, b"\0")
            ends.append(end)
            world.close()
        assert ends[0] == ends[1]
        event = {step[0] for step in schedule}
        if "anonymous" in event and not ends[0]["failed"]:
            assert ends[0]["anonymous zero_filled"], "the schedule was to zero-fill something"


def test_an_overcommitted_page_without_a_frame_fails_and_takes_nothing() -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"x" * PAGE)
        file.flush()
        # All frames are promised: to the file's clusters (10) and to others (30).
        world = World(Setup(40, 1, 0, 24, True, 1), file.name)
        world.global_pm.reserve(30)
        world.run([("anonymous", 0.0, 0)], natively=True)
        end = world.end()
        [(address, reason)] = end["failed"].items()
        assert address == world.starts["anonymous"]
        assert "overcommit" in reason
        assert "--budget" in reason
        assert end["frames"]["overcommitted"] == 0
        assert end["anonymous resident"] == []
        world.close()


def test_a_fault_that_comes_when_its_cache_is_being_closed_leaves_no_page_behind() -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"x" * PAGE)
        file.flush()
        world = World(Setup(40, 1, 0, 24, True, 1), file.name)
        cache = world.fcms["file"]
        k42.local(cache).root.queue.close()
        world.process.handle_fault(Fault(0, world.starts["file"], world.starts["file"]))
        assert cache.native().present(0, 1) == 0  # else closing would wait for it for ever
        [(address, reason)] = world.end()["failed"].items()
        assert address == world.starts["file"]
        assert "closed" in reason
        world.close()
