from __future__ import annotations

import os
import random
import struct

import pytest
from http_server import Server
from stores_support import PAGE, padded, words

from k42 import vm
from k42.vm.fr import compress


@pytest.fixture
def packed(folder):
    """Compresses some content; the path."""

    def make(content: bytes, **options):
        (folder / "plain").write_bytes(content)
        read, written = compress(folder / "plain", folder / "packed", **options)
        assert read == len(content)
        assert written == (folder / "packed").stat().st_size
        return folder / "packed"

    return make


@pytest.mark.parametrize("size", [1, PAGE, 32 * PAGE, 32 * PAGE + 1, 100 * PAGE - 1, 3000 * PAGE + 5])
@pytest.mark.parametrize("group", [1, 7, 32, 512])
def test_any_pages(packed, opened, frames, size, group):
    content = words(size)
    path = packed(content, group=group, level=1)
    fr = opened(f"zstd+file://{path}")
    pages = -(-size // PAGE)
    assert fr.size() == size
    memory = frames(pages + 3)
    assert memory.filled(fr, 0, pages + 3) == padded(content, pages + 3)
    chance = random.Random(size)
    for _ in range(10):
        first = chance.randrange(pages)
        count = chance.randint(1, min(40, pages - first))
        expected = padded(content, pages)[first * PAGE : (first + count) * PAGE]
        assert memory.filled(fr, first, count) == expected
    if size >= group * PAGE:
        assert fr.traits().cluster == group


def test_what_compresses_well_is_small_and_any_zstd_reads_it(packed):
    content = b"the same again and again\n" * 100_000
    path = packed(content)
    assert path.stat().st_size < len(content) // 50
    try:
        from compression import zstd
    except ImportError:
        from backports import zstd
    assert zstd.decompress(path.read_bytes()) == content


def test_an_empty_file(packed, opened):
    assert opened(f"zstd+file://{packed(b'')}").size() == 0


def test_from_a_server(packed, opened, frames):
    content = words(200 * PAGE + 1)
    server = Server()
    try:
        server.files["/a"] = packed(content).read_bytes()
        fr = opened("zstd+" + server.url("/a"))
        asked = len(server.requests)
        assert frames(201).filled(fr, 0, 201) == padded(content, 201)
        assert len(server.requests) == asked + 1  # what lies together is asked for together
        server.files["/a"] += b"x"
        assert fr.changed()
        with pytest.raises(vm.StoreError, match="changed"):
            fr.fill(frames(201).memfd, 0, 1)
    finally:
        server.end()


def test_read_only(packed, opened):
    url = f"zstd+file://{packed(words(PAGE))}"
    with pytest.raises(vm.Unsupported, match="read-only"):
        opened(url, "r+")
    fr = opened(url, "c")
    assert not fr.writable()


def test_a_file_that_changes(packed, opened, frames):
    path = packed(words(100 * PAGE))
    fr = opened(f"zstd+file://{path}")
    with open(path, "r+b") as file:
        file.write(b"other")
    with pytest.raises(vm.StoreError, match="changed"):
        fr.fill(frames(100).memfd, 0, 1)


def test_every_damage_is_seen(packed, opened, frames):
    content = random.Random(1).randbytes(20 * PAGE)
    path = packed(content, group=4)
    good = path.read_bytes()
    chance = random.Random(2)
    memory = frames(20)
    seen = 0
    for _ in range(120):
        bad = bytearray(good)
        for _ in range(chance.choice([1, 1, 5])):
            bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        if chance.random() < 0.2:
            del bad[chance.randrange(len(bad)) :]
        path.write_bytes(bad)
        try:
            fr = opened(f"zstd+file://{path}")
            data = memory.filled(fr, 0, 20)
        except vm.StoreError:
            seen += 1
        else:
            assert data == content  # a bit that does not matter
    assert seen > 90


@pytest.mark.parametrize("content", [b"", b"x" * 16, words(10 * PAGE), bytes(PAGE)])
def test_what_is_no_such_file(folder, opened, content):
    (folder / "x").write_bytes(content)
    with pytest.raises(vm.StoreError, match="no seekable zstd file"):
        opened(f"zstd+file://{folder}/x")


def test_frames_too_large_are_refused(folder, opened):
    packed, unpacked = 20, 1 << 31
    table = struct.pack("<IIIIIBI", 0x184D2A5E, 17, packed, unpacked, 1, 0, 0x8F92EAB1)
    (folder / "x").write_bytes(bytes(packed) + table)
    with pytest.raises(vm.StoreError, match="frames of more than"):
        opened(f"zstd+file://{folder}/x")


def test_what_cannot_be_compressed_leaves_nothing(folder):
    with pytest.raises(OSError, match="none"):
        compress(folder / "none", folder / "target")
    with pytest.raises(ValueError, match="pages"):
        compress(folder / "none", folder / "target", group=0)
    assert os.listdir(folder) == []
