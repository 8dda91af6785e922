"""The shared and the distributed implementations of the objects: the same to clients, and swapped while they serve."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from vm_support import PAGE, until, words

import k42
from k42 import _native, vm
from k42.vm.fcm import PartitionedFCM, ReplicatedFCM, SharedFCM
from k42.vm.kernel import Kernel
from k42.vm.pm import Backing, DistributedGlobalPM, Level, ProcessPM, SharedGlobalPM
from k42.vm.process import DistributedProcess, SharedProcess
from k42.vm.region import DistributedRegion, SharedRegion
from k42.vm.variants import Variants

# Two threads read a file over and over, each page once a round, in an order of their own; and write anonymous memory.
WORK = """
    import random
    socket, path = sys.argv[1:]
    wanted = open(path, "rb").read()
    wrong, stop = [], threading.Event()
    def work(client, mapping, seed):
        order = random.Random(seed)
        places = list(range(0, len(wanted), 4096))
        rounds = 0
        while not stop.is_set() or rounds < 2:
            order.shuffle(places)
            for at in places:
                if mapping[at : at + 8] != wanted[at : at + 8]:
                    wrong.append(at)
            # Regions come and go, too.
            with client.anonymous(16 * 4096) as memory:
                for at in range(0, len(memory), 4096):
                    memory[at] = seed
                if any(memory[at] != seed or memory[at + 1] for at in range(0, len(memory), 4096)):
                    wrong.append(-1)
            rounds += 1
    with vm.connect(socket) as client, client.open(path) as mapping:
        say("ready")
        threads = [threading.Thread(target=work, args=(client, mapping, seed)) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        sys.stdin.readline()
        stop.set()
        for thread in threads:
            thread.join()
        say("wrong", wrong)
        sys.stdin.readline()
    """


@pytest.fixture
def inner(folder: Path) -> Iterator[Kernel]:
    """A kernel in this process, whose objects a test can reach. Its clients must be other processes."""
    kernel = Kernel(folder / "kernel.sock", 40 * PAGE, None, Variants.named("shared"))
    thread = threading.Thread(target=kernel.run)
    thread.start()
    yield kernel
    kernel.stop()
    thread.join(60)
    assert not thread.is_alive()


def test_objects_are_swapped_while_faults_come(inner, folder, script):
    content = words(100 * PAGE)
    path = folder / "file"
    path.write_bytes(content)
    client = script(WORK, folder / "kernel.sock", path)
    assert client.line() == "ready"
    [served] = inner._clients.values()
    [mapped] = [mapped for mapped in list(served.regions.values()) if mapped.cached.key]
    faults = inner._engine.counts()["faults"]
    for turn in range(30):
        distributed = turn % 2 == 0
        k42.swap(served.process, DistributedProcess if distributed else SharedProcess)
        k42.swap(mapped.region, DistributedRegion if distributed else SharedRegion)
        k42.swap(mapped.cached.fcm, ReplicatedFCM if distributed else SharedFCM)
        k42.swap(inner._global_pm, DistributedGlobalPM if distributed else SharedGlobalPM)
        assert served.process.region_map().replicated() == distributed
        assert mapped.region.native().distributed() == distributed
        assert mapped.cached.fcm.native().tables() == int(distributed)
        with pytest.raises(k42.SwapRefused, match="partitioned pages"):
            k42.swap(mapped.cached.fcm, PartitionedFCM)
        pool = inner._global_pm.native()
        assert pool.distributed() == distributed
        for _ in range(10):
            assert pool.check()
        faults = until(lambda before=faults: (now := inner._engine.counts()["faults"]) > before and now, "more faults")
    client.tell()
    assert client.line() == "wrong []"
    assert inner._global_pm.usage()["file"] <= 40
    client.tell()
    client.good()


@pytest.mark.parametrize(
    "objects",
    [
        "shared",
        "distributed",
        "distributed,region=shared",
        "shared,process=distributed",
        "shared,global_pm=distributed",
        "shared,fcm=replicated",
        "distributed,fcm=partitioned",
    ],
)
def test_every_choice_of_objects_serves(kernels, connect, folder, objects):
    content = words(64 * PAGE)
    path = folder / "file"
    path.write_bytes(content)
    client = connect(kernels(31 * PAGE, objects=objects))
    with client.open(path) as mapping, client.open(path) as again:
        assert bytes(mapping) == bytes(again) == content
    with client.anonymous(8 * PAGE) as memory:
        memory[::PAGE] = bytes(range(8))
        assert memory[::PAGE] == bytes(range(8))


def test_choices_that_do_not_exist(kernels):
    assert Variants.named("shared", adapt=True).adapt
    for text in ("spread", "distributed,region", "region=replicated", "page=shared", ""):
        with pytest.raises(ValueError, match=r"say shared or distributed, or process=shared\|distributed"):
            Variants.named(text)
    assert Variants.named("shared") == Variants(SharedProcess, SharedRegion, SharedFCM, SharedGlobalPM)
    assert Variants.named("process=shared").process is SharedProcess
    with pytest.raises(vm.KernelUnavailable, match="status 2"):
        kernels(objects="spread")


@pytest.mark.parametrize("implementation", [SharedGlobalPM, DistributedGlobalPM])
@pytest.mark.parametrize("budget", [1, 2, 31])
def test_the_last_frame_is_found_wherever_it_is(implementation, budget):
    pm = implementation.create(budget)

    def on_another_processor(call):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    for _ in range(20):
        pm.allocate(budget, Backing.FILE)
        assert pm.level() is (Level.LOW if budget == 31 else Level.HIGH)
        on_another_processor(lambda: pm.release(budget, Backing.FILE))
        assert pm.check()
        on_another_processor(lambda: pm.allocate(budget, Backing.RESERVED))
        assert pm.usage()["reserved"] == budget
        pm.release(budget, Backing.RESERVED)
    k42.destroy(pm)


class Cache:
    """Gives back what it is asked for, and says who was asked; of an FCM it has what the Global PM uses."""

    def __init__(self, name: str, pm: SharedGlobalPM | DistributedGlobalPM, asked: list[str]) -> None:
        self.name, self.pm, self.asked = name, pm, asked

    def give_back(self, frames: int, whose: int) -> int:
        self.asked.append(self.name)
        self.pm.release(1, Backing.FILE)
        return 1


def test_caches_of_the_own_processor_are_asked_first():
    asked: list[str] = []
    pm = DistributedGlobalPM.create(4)
    caches = {name: Cache(name, pm, asked) for name in ("here", "there", "also here")}
    pm.attach_fcm(caches["here"])
    thread = threading.Thread(target=lambda: pm.attach_fcm(caches["there"]))
    thread.start()
    thread.join()
    pm.attach_fcm(caches["also here"])
    pm.allocate(4, Backing.FILE)
    for wanted in (["here"], ["also here"], ["here"]):
        pm.allocate(1, Backing.FILE)
        assert asked == wanted
        asked.clear()
    pm.allocate(3, Backing.FILE)
    assert asked == ["also here", "here", "there"]
    k42.swap(pm, SharedGlobalPM)
    asked.clear()
    pm.allocate(3, Backing.FILE)
    assert sorted(asked) == ["also here", "here", "there"]
    for name in caches:
        pm.detach_fcm(caches[name])
    with pytest.raises(ValueError, match="not attached"):
        pm.detach_fcm(caches["here"])
    assert pm.check()
    k42.destroy(pm)


def test_accounts_of_processes():
    global_pm = DistributedGlobalPM.create(100)
    greedy, modest = ProcessPM.create(global_pm), ProcessPM.create(global_pm, 1)
    assert modest.account().charge(1)
    assert not modest.account().charge(1)
    number = greedy.allocate(80, Backing.FILE)
    assert greedy.stat() == {"used": 80, "limit": None, "share": 46}  # of what is not kept free
    assert modest.stat() == {"used": 1, "limit": 1, "share": 1}
    pool = global_pm.native()
    pool.refresh_shares()
    assert greedy.account().number() == number
    assert pool.above_share(number)
    assert not pool.above_share(modest.account().number())
    assert pool.above_share(0)  # nobody's
    greedy.close()  # its pages are still in memory
    with pytest.raises(ValueError, match="closed"):
        greedy.account().charge(1)
    other = ProcessPM.create(global_pm)
    assert other.account().number() != number
    pool.release(80, Backing.FILE, number)
    pool.refresh_shares()
    assert pool.check()
    for pm in (greedy, modest, other, global_pm):
        k42.destroy(pm)


def test_a_swap_of_the_objects_of_a_process_that_nobody_has_used():
    process = DistributedProcess.create(ProcessPM.create(SharedGlobalPM.create(1)))
    k42.swap(process, SharedProcess)
    assert not process.region_map().replicated()
    k42.swap(process, DistributedProcess)
    assert process.region_map().replicated()
    assert isinstance(process.region_map(), _native.RegionMap)


def test_a_kernel_that_adapts_serves(kernels, connect, folder):
    content = words(64 * PAGE)
    path = folder / "file"
    path.write_bytes(content)
    client = connect(kernels(31 * PAGE, objects="shared", adapt=True))
    with client.open(path) as mapping:
        until(lambda: bytes(mapping) != content or client.stat()["engine"]["faults"] > 1500, "three looks or so")
        assert bytes(mapping) == content
