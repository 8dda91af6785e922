from __future__ import annotations

import functools

import pytest

from k42.experiments import memclone_shared
from k42.experiments._runner import default_processors, own_kernel
from k42.vm.variants import Variants, choices


def test_the_implementations_are_those_that_there_are() -> None:
    objects = list(memclone_shared.variants().values())
    for text in objects:
        Variants.named(text)
    assert len(set(objects)) == len(choices()["region"]) * len(choices()["fcm"])
    assert objects[0] == "region=shared,fcm=shared"


@pytest.mark.usefixtures("userfaultfd")
@pytest.mark.parametrize("operation", memclone_shared.OPERATIONS)
def test_threads_touch_parts_of_one_mapping(operation: str) -> None:
    from k42 import vm

    processors = default_processors()[-1]
    assert memclone_shared.time_per_thread(memclone_shared.linux, operation, processors) > 0
    with own_kernel(memclone_shared.BUDGET) as socket, vm.connect(socket) as client:
        make = functools.partial(memclone_shared.k42_anonymous, client)
        assert memclone_shared.time_per_thread(make, operation, processors) > 0
        pages = processors * memclone_shared.PAGES
        assert client.stat()["engine"]["faults"] >= pages
