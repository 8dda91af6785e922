"""The paper's experiments on the simulated machine: what the figures say, and that all pages are there."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from k42.cli import app
from k42.errors import Error
from k42.experiments import simulated
from k42.sim import MANYCORE, S85, Simulation, SpinLock, simulation, turns
from k42.sim.vm import Kernel, Variants


def value(name: str, implementation: str, processors: int, **changed: object) -> float:
    experiment = simulated.EXPERIMENTS[name]
    arguments = experiment.implementations(True)[implementation] | changed
    return simulated.Point(experiment.measure, S85, implementation, processors, arguments).run()


def test_figure_1():
    # What the machine is fitted on; flat where nothing is shared, ever worse where something is.
    for variant, paper in ("lock", 19), ("atomic", 12), ("array", 6), ("padded", 1):
        one, eight, all_of_them = (value("counter", variant, n, calls=60) / S85.call for n in (1, 8, 24))
        assert one < 1.1
        assert all_of_them == pytest.approx(paper, rel=0.15)
        assert variant == "padded" or one < 1.2 < eight < all_of_them / 2


def test_figures_6_and_8():
    def memclone(implementation: str, processors: int) -> float:
        return value("memclone", implementation, processors, pages=60)

    bound, best = [
        [memclone(name, n) for n in (1, 24)] for name in ("zero-fill alone", "distributed Process, distributed PM")
    ]
    assert bound[1] > 2 * bound[0]  # the bus
    assert best[1] - bound[1] < 2 * (best[0] - bound[0])
    for name in "shared Process, distributed PM", "distributed Process, shared PM", "shared Process, shared PM":
        assert memclone(name, 24) > 2 * best[1]


def test_figures_9_and_13():
    best = value("memclone-shared", "distributed Region, partitioned FCM", 16, pages=60)
    for worse in (
        "shared Region, partitioned FCM",
        "distributed Region, replicated FCM",
        "distributed Region, shared FCM",
    ):
        assert value("memclone-shared", worse, 16, pages=60) > 1.2 * best


def test_figure_12():
    shared, replicated = (value("grep", f"{fcm} FCM", 16, pages=20) for fcm in ("shared", "replicated"))
    assert shared > replicated


def test_a_process_that_is_distributed_costs_where_it_is_unmapped():
    shared, distributed = (value("attach", f"unmap touched/{kind} Process", 12) for kind in ("shared", "distributed"))
    assert 1.05 * shared < distributed < 2 * shared


@pytest.mark.parametrize("fcm", ["shared", "replicated", "partitioned"])
@pytest.mark.parametrize("objects", ["shared", "distributed"])
def test_every_page_gets_one_frame(fcm, objects):
    # Four processors fault on the same pages in orders of their own: as many frames as pages, whatever the objects.
    sim = Simulation(S85, 4, check=True)
    kernel = Kernel(sim, Variants(objects, objects, objects, fcm))
    process, file = kernel.process(), kernel.fcm()
    region = kernel.region(file, 7)

    orders = [[page * step % 31 for page in range(30)] for step in (1, 3, 5, 7)]

    def body(processor: int) -> None:
        if processor == 0:
            process.attach(region)
        sim.work(20_000)
        for page in orders[processor]:
            kernel.fault(process, region, page)

    sim.run(body)
    assert file.resident() == {7 + page for order in orders for page in order}
    assert kernel.global_pm.taken == len(file.resident())
    for counts in sim.counts():
        assert counts.accesses == counts.hits + counts.misses


def test_no_fault_outside_of_regions():
    sim = Simulation(S85, 1)
    kernel = Kernel(sim)
    process, region = kernel.process(), kernel.region(kernel.fcm())
    with pytest.raises(Error, match="outside of all regions"):
        sim.run(lambda _: kernel.fault(process, region, 0))


def test_no_such_variant():
    with pytest.raises(Error, match="no split fcm; there are: shared, replicated, partitioned"):
        Variants(fcm="split")


def a_run() -> tuple[list[int], object]:
    sim = Simulation(S85, 8, seed=3)
    lock, words = SpinLock(sim), [sim.allocate(8) for _ in range(20)]

    def body(processor: int) -> None:
        for i in range(30):
            with lock:
                sim.update(words[i % 20])
            sim.store(words[(i + processor) % 20])

    return sim.run(body), sim.counts()


def test_threads_and_greenlets_give_the_same_run(monkeypatch):
    by_default = a_run()
    monkeypatch.setattr(simulation, "turns", turns._Threads)
    assert a_run() == by_default


def test_many_processors_are_not_a_deep_recursion():
    one, all_of_them = (simulated._call(Simulation(MANYCORE, n), "padded", 5) for n in (1, 128))
    assert all_of_them < 1.1 * one


def test_a_cluster_simulates_the_same(tmp_path):
    pytest.importorskip("distributed", reason="distributed has no free-threaded wheels for 3.13")
    where = tmp_path / "scheduler.json"
    common = ["--scheduler-file", str(where), "--no-dashboard"]
    python = [sys.executable, "-m"]
    cluster = [
        [*python, "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", *common],
        *2 * [[*python, "distributed.cli.dask_worker", "--nthreads", "1", "--host", "127.0.0.1", *common]],
    ]
    records = {name: tmp_path / f"{name}.jsonl" for name in ("here", "there")}
    command = [*python, "k42", "experiment", "counter", "--machine", "sim", "--processors", "1,3", "--quick", "--json"]
    with contextlib.ExitStack() as stack:
        for each in cluster:
            process = stack.enter_context(subprocess.Popen(each, cwd=tmp_path, stderr=subprocess.DEVNULL))
            stack.callback(process.kill)
            while not where.exists():
                assert process.poll() is None
                time.sleep(0.05)
        address = json.loads(where.read_text())["address"]
        subprocess.run([*command, str(records["there"]), "--dask", address], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*command, str(records["here"])], check=True, stdout=subprocess.DEVNULL)
    assert records["there"].read_text() == records["here"].read_text() != ""
    result = CliRunner().invoke(app, [*command[3:6], "sim", "--quick", "--dask", "tcp://127.0.0.1:1"])
    assert (result.exit_code, "no Dask scheduler" in result.output) == (2, True), result.output


def test_the_command(tmp_path):
    records = tmp_path / "records.jsonl"
    plot = tmp_path / "plot.png"
    command = ["experiment", "counter", "--machine", "sim", "--processors", "1,4", "--quick"]
    result = CliRunner().invoke(app, [*command, "--json", str(records), "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    assert "the paper: 19 at 24" in result.output
    found = [json.loads(line) for line in records.read_text().splitlines()]
    assert {(each["machine"], each["implementation"], each["processors"]) for each in found} == {
        ("s85", name, count) for name in ("lock", "atomic", "array", "padded") for count in (1, 4)
    }
    assert plot.stat().st_size > 10_000
    machine = tmp_path / "two.toml"
    machine.write_text('like = "s85"\nprocessors = 2\n')
    result = CliRunner().invoke(app, [*command[:2], "--machine", str(machine), "--quick"])
    assert result.exit_code == 0, result.output
    for wrong, message in (
        (["faults", "--machine", "sim"], "does not run"),
        (["counter", "--machine", "x"], "no machine"),
    ):
        result = CliRunner().invoke(app, ["experiment", *wrong])
        assert (result.exit_code, message in result.output) == (2, True), result.output
