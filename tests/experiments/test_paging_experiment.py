from __future__ import annotations

from pathlib import Path

import pytest

from k42 import _native
from k42.errors import Error
from k42.experiments import paging
from k42.experiments._cgroup import limited

BUDGET = 4 * 2**20
PAGES = paging.TIMES * BUDGET // 4096


def test_the_file_and_its_checks(tmp_path: Path) -> None:
    path = tmp_path / "file"
    paging.write_file(path, 100)
    data = bytearray(path.read_bytes())
    assert len(data) == 100 * 4096
    _, wrong = _native.visit_pages(data, 50, 42, 7)
    assert wrong == 0
    path.write_bytes(data)
    paging.check_file(path, 7, paging.visited(100, 50, 42))
    with pytest.raises(Error, match="were written, of 100"):
        paging.check_file(path, 7, 100)
    data[5 * 4096] ^= 1
    assert _native.visit_pages(data, 100, 0, 0)[1] == 1
    path.write_bytes(data)
    with pytest.raises(Error, match="page 5 of the file was lost"):
        paging.check_file(path, 7, 1)


@pytest.mark.usefixtures("userfaultfd")
def test_both_page_under_the_same_limit(tmp_path: Path) -> None:
    try:
        with limited("k42-test", 1 << 30):
            pass
    except Error as error:
        pytest.skip(str(error))
    with paging.workers(["linux", "k42-clock"], BUDGET, tmp_path) as made:
        for worker in made.values():
            assert worker.used < BUDGET + paging.PROCESSES
            stamps = iter((1, 2))
            for operation in paging.OPERATIONS:
                assert paging.throughput(worker, operation, PAGES, 200, stamps.__next__) > 0
