from __future__ import annotations

import errno
import sys
import textwrap

import pytest
from stores_support import PAGE, padded, words

import k42
from k42 import vm
from k42.vm.files import open_store
from k42.vm.fr import Traits

MODULE = """
    import errno
    from k42.vm.fr import Traits

    class Reader:
        def __init__(self, url, content=""):
            if url.endswith("/fail"):
                raise PermissionError(errno.EACCES, "not for you")
            self.content = bytearray.fromhex(content)
            self.state = 0
            self.trick = None
        def size(self):
            return len(self.content)
        def read_into(self, offset, buffer):
            assert 0 <= offset < offset + len(buffer) <= len(self.content)
            if self.trick is not None:
                return self.trick(offset, buffer)
            buffer[:] = self.content[offset : offset + len(buffer)]

    class Writer(Reader):
        traits = Traits(concurrency=2, cluster=4)
        closed = synced = False
        def write_from(self, offset, buffer):
            assert offset + len(buffer) <= len(self.content)
            self.content[offset : offset + len(buffer)] = buffer
        def resize(self, size):
            self.content = self.content[:size].ljust(size, b"\\0")
        def sync(self):
            self.synced = True
        def close(self):
            self.closed = True

    class Versioned(Reader):
        def version(self):
            return self.state

    class Sizeless(Reader):
        def size(self):
            return "large"
    """
POINTS = """
    [k42.stores]
    reader = k42_test_stores:Reader
    writer = k42_test_stores:Writer
    versioned = k42_test_stores:Versioned
    sizeless = k42_test_stores:Sizeless
    broken = k42_test_stores:None_
    """


@pytest.fixture(autouse=True)
def installed(folder, monkeypatch):
    """A package that announces stores, as pip would install it."""
    (folder / "k42_test_stores.py").write_text(textwrap.dedent(MODULE))
    info = folder / "k42_test_stores-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: k42-test-stores\nVersion: 1\n")
    (info / "entry_points.txt").write_text(textwrap.dedent(POINTS))
    monkeypatch.syspath_prepend(folder)
    yield
    sys.modules.pop("k42_test_stores", None)


@pytest.fixture
def opened(opened):
    """Opens a URL whose store has this content."""
    return lambda url, mode="r", content=b"": opened(url, mode, {"content": content.hex()})


def store_of(fr):
    return k42.local(fr).root.store


@pytest.mark.parametrize("size", [1, PAGE, 3 * PAGE + 9, (1 << 20) + PAGE + 1])
def test_reading(opened, frames, size):
    fr = opened("reader://x", content=words(size))
    pages = -(-size // PAGE)
    assert fr.name() == "reader://x"
    assert frames(pages + 2).filled(fr, 0, pages + 2) == padded(words(size), pages + 2)
    assert not fr.writable()
    assert fr.traits() == Traits()
    with pytest.raises(vm.Unsupported, match="read-only: its class has no write_from"):
        fr.write_back(frames(1).memfd, 0, 1)
    with pytest.raises(vm.Unsupported, match="read-only"):
        opened("reader://x", "r+", words(size))


def test_writing(opened, frames):
    fr = opened("writer://x", "r+", words(3 * PAGE + 9))
    assert fr.writable()
    assert fr.traits().cluster == 4
    memory = frames(4)
    memory.put(words(4 * PAGE, 1))
    fr.write_back(memory.memfd, 2, 2)
    expected = words(2 * PAGE) + words(4 * PAGE, 1)[2 * PAGE : 3 * PAGE + 9]
    assert frames(4).filled(fr, 0, 4) == padded(expected, 4)
    fr.sync()
    fr.resize(5 * PAGE)
    assert fr.size() == 5 * PAGE
    assert frames(5).filled(fr, 0, 5) == padded(expected, 5)
    assert store_of(fr).synced


def test_what_goes_wrong_in_it(opened, frames):
    fr = opened("reader://x", content=words(2 * PAGE))

    def fail(offset, buffer):
        raise OSError(errno.ENXIO, "no such thing")

    for trick, message in (
        (fail, "no such thing"),
        (lambda offset, buffer: 1 // 0, "ZeroDivisionError"),
        (lambda offset, buffer: 7, "it filled 7 of 4096 bytes"),
    ):
        store_of(fr).trick = trick
        with pytest.raises(vm.StoreError, match=message) as error:
            fr.fill(frames(2).memfd, 1, 1)
        assert (error.value.url, error.value.offset) == ("reader://x", PAGE)
        assert error.value.errno == (errno.ENXIO if trick is fail else None)
    store_of(fr).trick = None
    assert frames(2).filled(fr, 0, 2) == words(2 * PAGE)


def test_versions(opened, frames):
    fr = opened("versioned://x", content=words(PAGE))
    assert frames(1).filled(fr, 0, 1) == words(PAGE)
    store_of(fr).state = 1
    assert fr.changed()
    with pytest.raises(vm.StoreError, match="changed"):
        fr.fill(frames(1).memfd, 0, 1)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("reader://x/fail", r"reader://x/fail: not for you \(EACCES\)"),
        ("sizeless://x", "its size"),
        ("broken://x", "cannot be imported"),
    ],
)
def test_what_cannot_be_opened(opened, url, message):
    with pytest.raises(vm.StoreError, match=message):
        opened(url)


def test_no_class_that_is_not_installed(opened):
    for url in ("k42_test_stores:Reader", "os:system", "k42_test_stores:Reader://x"):
        with pytest.raises((vm.StoreError, vm.Unsupported, ValueError)):
            opened(url)
    assert "k42_test_stores" not in sys.modules


def test_options_that_it_does_not_have():
    with pytest.raises(vm.StoreError, match="TypeError"):
        open_store("reader://x", "r", {"nonsense": 1})
