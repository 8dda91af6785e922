from __future__ import annotations

import io
import sys
import threading
import zipfile

import pytest
from http_server import Server
from stores_support import PAGE, padded, words

from k42 import vm
from k42.vm import credentials

fsspec = pytest.importorskip("fsspec", reason="needs the extra k42[url]")

CONTENT = words(50 * PAGE + 77)


@pytest.fixture
def memory():
    """fsspec's file system in the memory of this process."""
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()


def whole(fr, frames) -> bytes:
    pages = -(-fr.size() // PAGE)
    return frames(pages).filled(fr, 0, pages)


def test_memory(memory, opened, frames):
    memory.pipe_file("/a", CONTENT)
    fr = opened("memory://a")
    assert whole(fr, frames) == padded(CONTENT, 51)
    assert frames(9).filled(fr, 4, 5) == CONTENT[4 * PAGE : 9 * PAGE]
    assert opened("memory://a").version() == fr.version()
    memory.pipe_file("/a", words(50 * PAGE + 77, 1))
    assert fr.changed()
    with pytest.raises(vm.StoreError, match="changed"):
        fr.fill(frames(1).memfd, 0, 1)
    assert opened("memory://a").version() != fr.version()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_of_an_archive(opened, frames, folder, compression):
    path = folder / "x.zip"

    def write(*contents):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for n, content in enumerate(contents):
                archive.writestr(f"folder/{n}", content)

    write(CONTENT, b"other")
    url = f"zip://folder/0::file://{path}"
    fr = opened(url)
    assert whole(fr, frames) == padded(CONTENT, 51)
    assert frames(9).filled(fr, 4, 5) == CONTENT[4 * PAGE : 9 * PAGE]
    assert opened(url).version() == fr.version()
    write(CONTENT, b"another")  # the member is the same, but lies elsewhere perhaps
    assert fr.changed()
    with pytest.raises(vm.StoreError, match="changed"):
        fr.fill(frames(1).memfd, 0, 1)
    write(words(50 * PAGE + 77, 3))
    assert whole(opened(url), frames) == padded(words(50 * PAGE + 77, 3), 51)
    for missing in ("zip://none::file://" + str(path), f"zip://folder/0::file://{folder}/none"):
        with pytest.raises(vm.StoreError, match=r"FileNotFoundError|KeyError|No such"):
            opened(missing)


def test_a_member_of_an_archive_on_a_server(opened, frames):
    server = Server()
    try:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a", CONTENT)
        server.files["/x.zip"] = packed.getvalue()
        options = {"http": {"headers": {"X-Token": "t"}}, "k42": {"retries": 0}}
        fr = opened("zip://a::" + server.url("/x.zip"), options=options)
        assert whole(fr, frames) == padded(CONTENT, 51)
        assert all(headers["X-Token"] == "t" for _, headers in server.requests)
        server.files["/x.zip"] += b"!"
        with pytest.raises(vm.StoreError, match="changed"):
            fr.fill(frames(1).memfd, 0, 1)
    finally:
        server.end()


def test_files(opened, frames, folder):
    path = folder / "a file"
    path.write_bytes(CONTENT)
    fr = opened(f"file://{folder}/a%20file", "r+")
    assert whole(fr, frames) == padded(CONTENT, 51)
    assert fr.writable()
    assert not opened(f"file://{folder}/a%20file").writable()
    for wrong in ("none", "", "a%20file/x"):
        with pytest.raises(vm.StoreError, match=str(folder)):
            opened(f"file://{folder}/{wrong}")
    with pytest.raises(ValueError, match="of this machine"):
        opened("file://elsewhere/x")


@pytest.mark.parametrize("url", ["", "nothing", "/a/path", "memory://a\0b"])
def test_no_urls(opened, url):
    with pytest.raises(ValueError, match="not a URL"):
        opened(url)


@pytest.mark.parametrize("url", ["nosuchscheme://x", "memory://none", "zip://a::nosuchscheme://x"])
def test_what_is_not_there(opened, url):
    with pytest.raises((vm.StoreError, vm.Unsupported)):
        opened(url)


def test_what_is_missing_is_named(opened, monkeypatch):
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "fsspec.core", None)
        with pytest.raises(vm.Unsupported, match=r"pip install 'k42\[url\]'"):
            opened("memory://x")
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "s3fs", None)
        context.setattr(sys.modules["fsspec.registry"], "_registry", {})
        with pytest.raises(vm.Unsupported, match=r"pip install 'k42\[s3\]'"):
            opened("s3://bucket/x")


def test_a_store_without_versions_is_refused(opened):
    class Blind(fsspec.AbstractFileSystem):
        protocol = "blind"

        def info(self, path, **_):
            return {"name": path, "size": 10, "type": "file"}

        def cat_file(self, path, start=None, end=None, **_):
            return b"0123456789"[start:end]

    fsspec.register_implementation("blind", Blind, clobber=True)
    with pytest.raises(vm.Unsupported, match="nothing by which a change"):
        opened("blind://x")


def test_stores_that_give_too_much_or_too_little(opened, frames):
    class Wrong(fsspec.AbstractFileSystem):
        protocol = "wrong"
        give = 0

        def info(self, path, **_):
            return {"name": path, "size": 3 * PAGE, "type": "file", "ETag": "x"}

        def cat_file(self, path, start=None, end=None, **_):
            if Wrong.give > 1000:
                raise RuntimeError("broken")
            if Wrong.give == 1000:
                Wrong.give = 0
                raise ConnectionResetError("passes")
            return words(3 * PAGE)[start : end + Wrong.give]

    fsspec.register_implementation("wrong", Wrong, clobber=True)
    fr = opened("wrong://x", options={"k42": {"backoff": 0.001}})
    for Wrong.give in (-1, 1, -PAGE):
        with pytest.raises(vm.StoreError, match="asked for 4096 bytes"):
            fr.fill(frames(1).memfd, 0, 1)
    Wrong.give = 1001
    with pytest.raises(vm.StoreError, match="RuntimeError: broken"):
        fr.fill(frames(1).memfd, 0, 1)
    Wrong.give = 1000
    assert whole(fr, frames) == words(3 * PAGE)


def test_threads(memory, opened, frames):
    memory.pipe_file("/a", CONTENT)
    fr = opened("memory://a")
    together = frames(51)
    threads = [threading.Thread(target=fr.fill, args=(together.memfd, page, 1)) for page in range(51)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together.read() == padded(CONTENT, 51)


def test_credentials_are_the_clients_own(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    given = {"key": "id", "secret": "secret", "endpoint_url": "http://127.0.0.1:1"}
    assert credentials.with_credentials("s3://a/b", {}) == given
    assert credentials.with_credentials("zstd+s3://a/b", {}) == given
    own = {"key": "mine", "endpoint_url": "there"}
    assert credentials.with_credentials("s3://a/b", own) == own
    assert credentials.with_credentials("http://a/b", {}) == {}
    credentials.forget_credentials()
    assert credentials.with_credentials("s3://a/b", {}) == {}
