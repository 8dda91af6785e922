"""Which pages go first is chosen for each file, by who opens it first."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from vm_support import PAGE, file_counts, running, until, words

from k42 import vm
from k42.vm.fr import _frames

# Some pages are used again and again while others come and go; then many others come, each once. How many of the first
# are read again when they are used again?
SCAN = """
    client = vm.connect(sys.argv[1])
    for path, policy in zip(sys.argv[2::2], sys.argv[3::2]):
        with client.open(path, fault_around=4096, policy=policy) as mapping:
            mapping.advise("random")
            hot = range(12)
            def filled():
                stats = mapping.stats()
                assert stats["policy"] == policy
                return stats["filled"]
            for page in range(12, 300):
                mapping[page * 4096]
                for used in hot:
                    mapping[used * 4096]
            before = filled()
            for page in range(300, 700):
                mapping[page * 4096]
            assert filled() == before + 400
            for used in hot:
                mapping[used * 4096]
            say(filled() - before - 400)
    """


def test_each_file_has_the_policy_that_it_was_opened_with(kernels, script, folder: Path):
    kernel = kernels(64 * PAGE, policy="clock")
    jobs: list[object] = []
    for policy in ("fifo", "s3fifo", "clock"):
        path = folder / policy
        path.write_bytes(words(700 * PAGE))
        jobs += [path, policy]
    fifo, s3fifo, clock = map(int, script(SCAN, kernel.socket, *jobs).good().split())
    assert fifo == clock == 12  # they went with the others
    assert s3fifo <= 2  # a page that is used once goes before them


def test_who_opens_a_file_first_decides(kernels, connect, folder: Path):
    kernel = kernels(policy="clock")
    client, other = connect(kernel), connect(kernel)
    path = folder / "file"
    path.write_bytes(words(20 * PAGE))
    with client.open(path) as mapping:
        assert mapping.stats()["policy"] == "clock"
        with pytest.raises(ValueError, match=r"file is in use with the policy 'clock', not 'fifo': who opens it first"):
            other.open(path, policy="fifo")
        with other.open(path, policy="clock") as same, other.open(path) as any_:
            assert bytes(same) == bytes(any_) == bytes(mapping) == words(20 * PAGE)
    # Nobody uses it now: the next decides, and finds what was written.
    with client.open(path, "r+", policy="fifo") as mapping:
        mapping[0] = 77
        assert mapping.stats()["policy"] == "fifo"
    with other.open(path, policy="s3fifo") as mapping:
        assert mapping[0] == 77
        assert mapping.stats()["policy"] == "s3fifo"
        with client.open(path) as same:
            assert same.stats()["policy"] == "s3fifo"
    with client.open(path) as mapping:
        assert mapping.stats()["policy"] == "s3fifo"  # it stayed as it was
    with pytest.raises(ValueError, match=r"'lru'.*fifo, clock, s3fifo"):
        client.open(path, policy="lru")
    url = f"file://{path}"
    with client.open(url, policy="fifo") as mapping:
        assert mapping.stats()["policy"] == "fifo"
        with pytest.raises(ValueError, match="who opens it first decides"):
            other.open(url, policy="clock")
    with other.open(url, policy="clock") as mapping:
        assert mapping.stats()["policy"] == "clock"
        assert mapping[:8] == b"\x4d" + words(8)[1:]


def test_another_kernel_goes_on_with_it(kernels, folder: Path):
    supervisor = kernels(supervise=True)
    path = folder / "file"
    path.write_bytes(words(20 * PAGE))
    with vm.connect(supervisor.socket, grace=30) as client, client.open(path, policy="s3fifo") as mapping:
        os.kill(client.stat()["pid"], signal.SIGKILL)
        until(lambda: client.stat()["deaths"] == 1, "another kernel serves")
        assert mapping.stats()["policy"] == file_counts(client, path)["policy"] == "s3fifo"
        assert bytes(mapping) == words(20 * PAGE)


def test_what_the_file_did_not_take_is_not_hidden_by_another_policy(monkeypatch, tmp_path, folder: Path, script):
    path = folder / "file"
    path.write_bytes(words(20 * PAGE))
    full = True
    take = _frames.take

    def taken(*arguments: object) -> object:
        if full:
            raise vm.StoreError("no space left")
        return take(*arguments)

    monkeypatch.setattr(_frames, "take", taken)
    code = """
    client = vm.connect(sys.argv[1])
    mapping = client.open(sys.argv[2], "r+", policy="fifo")
    mapping[0] = 77
    for end in (mapping.close, lambda: client.open(sys.argv[2], policy="clock")):
        try:
            end()
        except vm.StoreError as error:
            say(error)
    with client.open(sys.argv[2]) as mapping:
        say(mapping.stats()["policy"], mapping[0])
    input()
    with client.open(sys.argv[2], policy="clock") as mapping:
        say(mapping.stats()["policy"], mapping[0])
    """
    with running(tmp_path / "kernel.sock", 256):
        process = script(code, tmp_path / "kernel.sock", path)
        assert [process.line() for _ in range(3)] == ["no space left", "no space left", "fifo 77"]
        full = False
        process.tell()
        assert process.line() == "clock 77"
        process.good()
