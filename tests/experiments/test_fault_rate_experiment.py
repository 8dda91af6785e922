from __future__ import annotations

import functools
from pathlib import Path

import pytest

from k42.experiments import fault_rate
from k42.experiments._record import PAGE
from k42.experiments._runner import own_kernel

pytestmark = pytest.mark.usefixtures("userfaultfd")


def test_all_are_measured() -> None:
    samples = fault_rate.measure(pages=32, rounds=5)
    assert [each.case.implementation for each in samples] == ["linux", "k42, 64 KiB around", "k42, 2 MiB around"]
    assert all(value > 0 for each in samples for value in each.values)
    assert len(fault_rate.findings(samples)) == 2


def test_who_maps_more_around_faults_less(tmp_path: Path) -> None:
    from k42 import vm

    pages = 64
    path = tmp_path / "file"
    path.write_bytes(bytes(fault_rate.THREADS * pages * PAGE))
    faults = []
    with own_kernel(64 << 20) as socket, vm.connect(socket) as client, client.open(path) as kept:
        kept.prefetch()
        for around in PAGE, 16 * PAGE, 512 * PAGE:
            before = client.stat()["engine"]["faults"]
            fault_rate.pages_per_second(functools.partial(client.open, path, fault_around=around), pages)
            faults.append(client.stat()["engine"]["faults"] - before)
    one, some, many = faults
    # Each page is touched twice: by one thread, and after it was unmapped by one of all.
    assert one >= 2 * fault_rate.THREADS * pages
    assert some < one / 4
    assert many < some / 2
