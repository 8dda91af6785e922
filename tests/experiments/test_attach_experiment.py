from __future__ import annotations

import functools

import pytest

from k42.experiments import attach
from k42.experiments._runner import default_processors, own_kernel


@pytest.mark.parametrize("operation", attach.OPERATIONS)
def test_linux_maps_and_unmaps(operation: str) -> None:
    assert attach.time_per_region(attach.linux, operation, default_processors()[-1], 2) > 0


@pytest.mark.usefixtures("userfaultfd")
def test_what_k42_maps_is_unmapped() -> None:
    from k42 import vm

    with own_kernel(attach.BUDGET) as socket, vm.connect(socket) as client:
        for operation in attach.OPERATIONS:
            make = functools.partial(attach._k42, client)
            assert attach.time_per_region(make, operation, default_processors()[-1], 2) > 0
        stat = client.stat()
        assert stat["clients"][0]["regions"] == 0
        assert stat["engine"]["faults"] >= 2 * attach.NBYTES // 4096
