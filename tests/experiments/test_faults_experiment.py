from __future__ import annotations

import pytest

from k42.experiments import faults
from k42.experiments._record import PAGE, PAGE_SIZES
from k42.experiments._runner import default_processors


@pytest.mark.usefixtures("userfaultfd")
def test_bare_and_linux() -> None:
    processors = default_processors()
    samples = faults.measure(faults.BARE_AND_LINUX, processors, pages=32, rounds=5)
    records = [each.record("faults", "time_per_page", "us") for each in samples]
    assert {(r.implementation, r.processors, r.parameters["page_size"]) for r in records} == {
        (name, count, page_size)
        for name in ("bare", "bare-remote", "bare-zero", "linux", "linux-read", "linux-anonymous")
        for count in processors
        for page_size in PAGE_SIZES
    }
    assert all(record.value > 0 and record.runs == 5 for record in records)


@pytest.mark.parametrize("name", faults.BARE_AND_LINUX)
def test_arrays_hold_what_was_written(name: str, userfaultfd: None) -> None:
    with faults.BARE_AND_LINUX[name].make(0, 4 * PAGE, PAGE) as memory, memoryview(memory) as view:
        view[PAGE] = 200
        assert view[PAGE] == 200
        assert len(view) == 4 * PAGE
