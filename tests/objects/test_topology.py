"""CPUs and nodes; interpreters other than the main one; what references refuse whatever the implementation."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import weakref

import pytest

import k42
from k42 import processors
from k42.structures.counter import IMPLEMENTATIONS
from k42.testing import race


def test_the_topology_is_that_of_the_system():
    topology = processors.topology()
    assert set(topology.cpus) == os.sched_getaffinity(0)
    assert list(topology.cpus) == sorted(topology.cpus)
    cpus = [cpu for cpus in topology.nodes.values() for cpu in cpus]
    assert sorted(cpus) == list(topology.cpus)
    assert list(topology.nodes) == sorted(topology.nodes)
    for node, mine in topology.nodes.items():
        assert mine == tuple(sorted(mine))
        assert all(processors.node(cpu) == node for cpu in mine)


def test_where_the_system_tells_no_nodes(monkeypatch):
    monkeypatch.setattr(processors, "_NODES", processors.Path("/nonexistent"))
    monkeypatch.setattr(processors, "_nodes", {})
    topology = processors.topology()
    assert topology.nodes == {0: topology.cpus}
    assert processors.node() == 0


def test_lists_of_cpus():
    assert processors._listed("0-3,8,10-11\n") == (0, 1, 2, 3, 8, 10, 11)
    assert processors._listed("5") == (5,)
    assert processors._listed("\n") == ()


def test_pin():
    cpus = processors.topology().cpus

    def work(cpu):
        before = os.sched_getaffinity(0)
        assert processors.pin(cpu) == cpu
        assert os.sched_getaffinity(0) == {cpu}
        assert processors.cpu() == cpu
        assert processors.node() == processors.node(cpu)
        assert processors.topology().cpus == (cpu,)
        others = set(before) - {cpu}
        for wrong in (-1, 10**6, *others):
            with pytest.raises(ValueError, match="this thread may use the CPUs"):
                processors.pin(wrong)
        os.sched_setaffinity(0, before)

    race(*[lambda cpu=cpu: work(cpu) for cpu in cpus[:8]])
    assert os.sched_getaffinity(0) == set(cpus)  # of this thread: as it was


def test_pin_spreads_threads():
    cpus = processors.topology().cpus
    n = 2 * min(len(cpus), 4)
    pinned = race(*[lambda: (processors.current(), processors.pin())] * n)
    assert all(cpu == cpus[processor % len(cpus)] for processor, cpu in pinned)


SUBINTERPRETER = """
import k42
try:
    import _xxsubinterpreters as interpreters
except ImportError:
    import _interpreters as interpreters
inner = '''
try:
    import k42
except ImportError as error:
    message = str(error)
else:
    message = "no error"
print(message, flush=True)
'''
number = interpreters.create()
interpreters.run_string(number, inner)
interpreters.destroy(number)
counter = k42.structures.Counter.create()
counter.add()
print(counter.value())
"""


def test_other_interpreters_are_refused():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import k42.structures" + SUBINTERPRETER],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    message, count = done.stdout.splitlines()
    assert "interpreter" in message
    assert count == "1"


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_references_to_native_structures(kind):
    ref = kind.create()
    assert weakref.ref(ref)() is ref
    assert {ref: 1}[ref] == 1
    assert ref != kind.create()
    assert isinstance(ref, kind)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="cannot pickle or copy a reference"):
            pickle.dumps(ref, protocol)
    with pytest.raises(AttributeError, match=r"k42\.local"):
        ref.n = 1
    assert kind.__name__ in repr(ref)
    k42.destroy(ref)
    assert "destroyed" in repr(ref)
    assert isinstance(ref, kind)
    assert hash(ref) == object.__hash__(ref)


def test_weak_references_see_the_end():
    seen = []

    class Plain(k42.Object):
        def touch(self):
            pass

    ref = Plain.create()
    weak = weakref.ref(ref, seen.append)
    assert weak() is ref
    del ref
    gc.collect()  # the object's root refers to it
    assert seen == [weak]


def test_modules_and_functions_of_a_class_are_not_copied_into_references():
    """What the class has is read from the representative at each access, so it can change."""

    class Limited(k42.Object):
        limit = 3

        def within(self, n):
            return n <= self.limit

    ref = Limited.create()
    assert ref.limit == 3
    k42.local(ref).limit = 5
    assert ref.limit == 5
    assert ref.within(4)
    Limited.limit = 7
    assert ref.limit == 5
    k42.destroy(ref)
