from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from k42.errors import Error
from k42.experiments import remote
from k42.experiments._runner import own_kernel

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "array.npy"
    path.write_bytes(bytes(range(251)) * 8000)
    return path


def test_the_server_counts_what_it_sends(file: Path) -> None:
    data = file.read_bytes()
    with remote.server(file) as address:
        for make in remote.download, functools.partial(remote.cached, "blockcache"):
            assert remote.time_of(make, "whole", data, lambda: f"{address}/array.npy") > remote.LATENCY
        counts = json.loads(remote._get(f"{address}/reset"))
        assert counts == {"bytes": 2 * len(data), "requests": counts["requests"]}
        assert json.loads(remote._get(f"{address}/count")) == {"bytes": 0, "requests": 0}
        with pytest.raises(Error, match="are not what the file is"):
            remote.time_of(remote.download, "random", data[::-1], lambda: f"{address}/array.npy")


@pytest.mark.usefixtures("userfaultfd")
def test_k42_reads_the_same_and_two_processes_fetch_it_once(file: Path) -> None:
    from k42 import vm

    data = file.read_bytes()
    with remote.server(file) as address, own_kernel(64 << 20) as socket, vm.connect(socket) as client:
        for number, operation in enumerate(remote.OPERATIONS):
            url = f"{address}/{number}/array.npy"
            make = functools.partial(remote.own, client)
            assert remote.time_of(make, operation, data, lambda url=url: url) > 0  # type: ignore[misc]
        times = remote.fetched_by_two(socket, f"{address}/two/array.npy", file, address)
        assert 1 <= times <= 1 + 65536 / len(data)  # opening it may read its beginning, to see what the server can
