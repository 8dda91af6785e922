"""URLs as real memory: through a kernel and page faults, from servers that behave and that do not."""

from __future__ import annotations

import io
import os
import signal
import sys
import textwrap
import threading
import zipfile
from pathlib import Path

import pytest
from vm_support import PAGE, until, words

sys.path.insert(0, str(Path(__file__).parent / "stores"))
import http_server
from http_server import Server, status

from k42 import vm

SIZE = 600 * PAGE + 123
CONTENT = words(SIZE)
QUICK = {"k42": {"backoff": 0.01, "timeout": 5, "retries": 1}}


@pytest.fixture
def server():
    made = Server()
    made.files["/a"] = CONTENT
    yield made
    made.end()


def ranges(server, path="/a"):
    """The ranges that were asked for, but those of one byte, by which a URL is opened."""
    with server.lock:
        asked = [headers["Range"] for name, headers in server.requests if name == path]
    pairs = [tuple(map(int, one.removeprefix("bytes=").split("-"))) for one in asked]
    return [pair for pair in pairs if pair != (0, 0)]


def counts(client, url):
    [found] = [file for file in client.stat()["files"] if file["name"] == url]
    return found


def at_rest(client, url):
    """When nothing is being read any more."""

    def idle():
        now = counts(client, url)
        return not (now["io_running"] or now["io_queued_prefetch"] or now["io_queued_urgent"])

    until(idle, "reading ahead ends")


def take(mapping, page, content=CONTENT):
    """Reads three pages, and lets other threads run meanwhile, such as the server's (an access to less may not)."""
    data = mapping[page * PAGE : (page + 3) * PAGE]
    assert data == content[page * PAGE : (page + 3) * PAGE]


# What can be opened.


def test_slices_and_arrays(client, server):
    numpy = pytest.importorskip("numpy")
    url = server.url("/a")
    with client.open(url) as mapping:
        assert mapping[:] == CONTENT
        assert mapping.name == url
        array = numpy.frombuffer(memoryview(mapping), numpy.uint8)
        assert array.tobytes() == CONTENT
        del array
    with client.open(url, offset=PAGE + 5, length=9) as part:
        assert part[:] == CONTENT[PAGE + 5 : PAGE + 14]
    with client.open(url, "c") as private:
        private[3:7] = b"mine"
        assert private[:9] == CONTENT[:3] + b"mine" + CONTENT[7:9]
    with pytest.raises(vm.Unsupported, match="read-only"):
        client.open(url, "r+")
    with pytest.raises(vm.StoreError, match="404"):
        client.open(server.url("/none"))


def test_arrays_of_numpy(client, server):
    numpy = pytest.importorskip("numpy")
    from k42.vm.arrays import load, memmap

    wanted = numpy.arange(50_000, dtype=numpy.int32).reshape(100, 500)
    packed = io.BytesIO()
    numpy.save(packed, wanted)
    server.files["/x.npy"] = packed.getvalue()
    server.files["/raw"] = wanted.tobytes()
    # The server is in this process, and numpy keeps the GIL while it waits for a page: bring them in first.
    for path in ("/x.npy", "/raw"):
        with client.open(server.url(path)) as mapping:
            mapping.prefetch()
    assert (load(server.url("/x.npy"), client=client) == wanted).all()
    raw = memmap(server.url("/raw"), numpy.int32, "r", shape=(100, 500), client=client)
    assert (raw[7:9] == wanted[7:9]).all()


def test_archives_and_files_and_compressed_ones(client, server, folder):
    pytest.importorskip("fsspec", reason="needs the extra k42[url]")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m", CONTENT)
    (folder / "x.zip").write_bytes(packed.getvalue())
    (folder / "plain").write_bytes(CONTENT)
    urls = [f"zip://m::file://{folder}/x.zip", f"file://{folder}/plain"]
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        pass
    else:
        server.files["/x.zip"] = packed.getvalue()
        urls.append(f"zip://m::{server.url('/x.zip')}")
    for url in urls:
        with client.open(url) as mapping:
            assert mapping[:] == CONTENT
    with client.open(f"file://{folder}/plain", "r+") as writing:
        writing[:3] = b"new"
    assert (folder / "plain").read_bytes() == b"new" + CONTENT[3:]


def test_compressed(client, server, folder):
    pytest.importorskip("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")
    from k42.vm.fr import compress

    (folder / "plain").write_bytes(CONTENT)
    compress(folder / "plain", folder / "packed")
    server.files["/z"] = (folder / "packed").read_bytes()
    with client.open("zstd+" + server.url("/z")) as mapping:
        assert mapping[:] == CONTENT


def test_stores_that_a_package_announces(kernels, connect, folder, monkeypatch):
    (folder / "k42_own_store.py").write_text(
        textwrap.dedent("""
            class Store:
                content = bytearray(range(256)) * 64
                def __init__(self, url, first=0):
                    self.content[0] = first
                def size(self):
                    return len(self.content)
                def read_into(self, offset, buffer):
                    buffer[:] = self.content[offset : offset + len(buffer)]
                def write_from(self, offset, buffer):
                    self.content[offset : offset + len(buffer)] = buffer
            """)
    )
    info = folder / "k42_own-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: k42-own\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[k42.stores]\nown = k42_own_store:Store\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    client = connect(kernels())
    with client.open("own://x", "r+", storage_options={"first": 7}) as mapping:
        assert mapping[:4] == bytes([7, 1, 2, 3])
        mapping[9:12] = b"abc"
        mapping.flush()
        mapping.advise("dontneed")
        assert mapping[8:13] == b"\x08abc\x0c"


def test_the_memory_of_this_process_is_not_the_kernels(client):
    pytest.importorskip("fsspec", reason="needs the extra k42[url]")
    with pytest.raises(vm.StoreError, match="memory"):
        client.open("memory://x")


def test_options_are_told_to_nobody(kernels, connect, server):
    kernel = kernels()
    client = connect(kernel)
    url = server.url("/a").replace("http://", "http://user:password@")
    options = QUICK | {"headers": {"X-Token": "secret"}}
    with client.open(url, storage_options=options) as mapping:
        take(mapping, 0)
        at_rest(client, server.url("/a").replace("http://", "http://user:***@"))
        assert "user:***@" in str(client.stat())
        server.always = status(403)
        with pytest.raises(vm.StoreError, match="403") as caught:
            take(mapping, 500)
        told = str(client.stat()) + str(mapping.stats()["name"].replace(url, "")) + kernel.log.read_text()
    assert all(headers["X-Token"] == "secret" for _, headers in server.requests)
    assert "secret" not in told + str(caught.value)


def test_the_kernel_imports_what_a_url_needs_when_it_needs_it(script):
    code = """
        import k42.vm.kernel
        say(*[name for name in ("asyncio", "aiohttp", "fsspec", "ssl", "numpy", "s3fs") if name in sys.modules])
        """
    assert script(code, connect=False).good().split() == []


# Who asks for what, and how often.


def test_processes_that_touch_one_page_make_one_request(kernels, connect, script, server):
    kernel, url = kernels(), server.url("/a")
    client = connect(kernel)
    with client.open(url) as mapping:
        opened = len(server.requests)
        held = threading.Event()

        def held_up(handler, first, last):
            held.wait(30)
            return False

        server.always = held_up
        code = """
            client = vm.connect(sys.argv[1])
            mapping = client.open(sys.argv[2])
            say("open")
            sys.stdin.readline()
            say(mapping[300 * 4096])
            """
        readers = [script(code, kernel.socket, url) for _ in range(4)]
        for reader in readers:
            assert reader.line() == "open"
        for reader in readers:
            reader.tell()
        until(lambda: len(ranges(server)) >= 1, "one asks")
        until(lambda: mapping.stats()["queued"] >= 3, "the others wait for its answer")
        held.set()
        assert [int(reader.line()) for reader in readers] == [CONTENT[300 * PAGE]] * 4
        assert len(ranges(server)) == 1
        assert len(server.requests) == opened + 4 + 1  # each asks at open whether it is still the same


def test_a_process_that_is_killed_while_its_page_is_to_be_read(kernels, connect, script, server):
    kernel, url = kernels(), server.url("/a")
    client = connect(kernel)
    with client.open(url, storage_options={"k42": {"concurrency": 1}}) as mapping:
        held = threading.Event()
        server.always = lambda *_: held.wait(30) and False
        code = """
            client = vm.connect(sys.argv[1])
            mapping = client.open(sys.argv[2], storage_options={"k42": {"concurrency": 1}})
            say("open")
            page = int(sys.stdin.readline())
            say(mapping[page * 4096])
            """
        first, killed, another = [script(code, kernel.socket, url) for _ in range(3)]
        for reader in (first, killed, another):
            assert reader.line() == "open"
        first.tell("0")
        until(lambda: len(ranges(server)) >= 1, "the server is asked for one")
        killed.tell("300")
        until(lambda: counts(client, url)["io_queued_urgent"] >= 1, "another waits for its turn")
        another.tell("300")
        until(lambda: mapping.stats()["queued"] >= 1, "and somebody else for that page")
        killed.process.kill()
        until(lambda: len(client.stat()["clients"]) == 3, "it is gone")
        held.set()
        assert int(first.line()) == CONTENT[0]
        assert int(another.line()) == CONTENT[300 * PAGE]


def test_processes_that_read_it_whole_fetch_each_byte_once(kernels, script, server):
    kernel, url = kernels(), server.url("/a")
    code = """
        mapping = vm.connect(sys.argv[1]).open(sys.argv[2])
        import hashlib
        say(hashlib.md5(mapping[:]).hexdigest())
        """
    readers = [script(code, kernel.socket, url) for _ in range(2)]
    assert len({reader.good() for reader in readers}) == 1
    asked = sorted(ranges(server))
    assert asked[0][0] == 0
    assert [last + 1 for _, last in asked] == [first for first, _ in asked[1:]] + [SIZE]


def test_who_reads_on_seldom_waits(client, server):
    content = server.files["/long"] = words(4000 * PAGE)
    url = server.url("/long")
    with client.open(url) as mapping:
        before = client.stat()["engine"]["handed_up"]
        for page in range(0, 4000, 3):
            take(mapping, page, content)
        assert client.stat()["engine"]["handed_up"] - before <= 12
        assert len(ranges(server, "/long")) <= 60


def test_several_who_read_on_at_a_time(client, server):
    content = server.files["/long"] = words(4000 * PAGE)
    with client.open(server.url("/long")) as mapping:
        before = client.stat()["engine"]["handed_up"]
        for page in range(0, 300, 3):
            for start in range(0, 4000, 500):
                take(mapping, start + page, content)
        assert client.stat()["engine"]["handed_up"] - before <= 8 * 6


def test_who_jumps_about_reads_nothing_ahead(client, server):
    pages = [584, 130, 420, 40, 500, 250, 330]
    for advice, most in (("normal", 16), ("random", 3)):
        url = server.url(f"/{advice}")
        server.files[f"/{advice}"] = CONTENT
        with client.open(url) as mapping:
            if advice == "random":
                mapping.advise("random")
            for page in pages:
                take(mapping, page)
            at_rest(client, url)
            assert mapping.stats()["resident"] <= most * len(pages)
            assert len(ranges(server, f"/{advice}")) == len(pages) * (3 if advice == "random" else 1)


def test_a_fault_goes_before_what_is_only_read_ahead(client, server):
    content = server.files["/long"] = words(4000 * PAGE)
    url = server.url("/long")
    with client.open(url, storage_options={"k42": {"concurrency": 2}}) as mapping:
        mapping.advise("sequential")
        gate = threading.Event()
        server.always = lambda *_: gate.wait(30) and False
        readers = [threading.Thread(target=take, args=(mapping, page, content)) for page in (0, 3000)]
        try:
            readers[0].start()
            until(lambda: counts(client, url)["io_queued_prefetch"] >= 3, "it is read ahead")
            readers[1].start()
            until(lambda: counts(client, url)["io_queued_urgent"] >= 1, "a fault waits")
        finally:
            gate.set()
            for reader in readers:
                reader.join()
        at_rest(client, url)
        asked = [first // PAGE for first, _ in ranges(server, "/long")]
        assert 2992 in asked[:3]
        assert len(asked) >= 6


# A local file goes the same way.


def test_a_local_file_is_read_ahead(client, folder):
    path = folder / "file"
    content = words(4000 * PAGE)
    path.write_bytes(content)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with client.open(path) as mapping:
        before = client.stat()["engine"]["handed_up"]
        for page in range(0, 4000, 4):
            assert mapping[page * PAGE] == content[page * PAGE]
        assert client.stat()["engine"]["handed_up"] - before <= 25


def test_a_local_file_read_at_random(client, folder):
    path = folder / "file"
    content = words(2000 * PAGE)
    path.write_bytes(content)
    with client.open(path) as mapping:
        mapping.advise("random")
        for page in range(1999, 0, -37):
            assert mapping[page * PAGE : page * PAGE + 8] == content[page * PAGE : page * PAGE + 8]
        assert mapping.stats()["resident"] == len(range(1999, 0, -37))


def test_fault_around(client, folder):
    path = folder / "file"
    path.write_bytes(words(256 * PAGE))
    with client.open(path) as mapping:
        mapping.prefetch()
        faults = {}
        for around in (PAGE, 16 * PAGE, 64 * PAGE):
            with client.open(path, fault_around=around) as other:
                before = mapping.stats()["mapped"]
                for page in range(256):
                    assert other[page * PAGE] >= 0
                faults[around] = mapping.stats()["mapped"] - before
    assert faults == {PAGE: 256, 16 * PAGE: 16, 64 * PAGE: 4}


def test_more_is_mapped_where_accesses_go_on(client, folder):
    path = folder / "file"
    pages = 4096
    path.write_bytes(bytes(pages * PAGE))
    with client.open(path) as mapping:
        mapping.prefetch()

        def faults(order):
            with client.open(path) as other:
                before = mapping.stats()["mapped"]
                for page in order:
                    assert other[page * PAGE] == 0
                return mapping.stats()["mapped"] - before

        # 16, 32, 64 … pages: and 512 at last. A thread that comes to another CPU begins anew.
        assert faults(range(pages)) < 8 + 2 * pages // 512
        assert faults(range(0, pages, 16)) < 8 + 2 * pages // 512
        assert faults(range(pages - 1, -1, -1)) == pages // 16  # backwards: as much as always


def test_fault_around_is_refused(client, folder):
    path = folder / "file"
    path.write_bytes(words(PAGE))
    for wrong in (0, 1000, 3 * PAGE, 4 << 20):
        with pytest.raises(ValueError, match="fault_around"):
            client.open(path, fault_around=wrong)


# What goes wrong.


@pytest.mark.parametrize(
    "trick",
    [status(500), http_server.hang_up, http_server.truncated, http_server.another_range, http_server.everything],
)
def test_errors_name_the_place_and_a_retry_works(client, server, trick):
    url = server.url("/a")
    with client.open(url, storage_options=QUICK) as mapping:
        server.always = trick
        for access in (lambda: mapping[300 * PAGE : 303 * PAGE], lambda: mapping.prefetch(300 * PAGE, PAGE)):
            with pytest.raises(vm.StoreError) as caught:
                access()
            assert caught.value.url == url
            assert caught.value.offset is not None
            assert caught.value.offset // PAGE in range(288, 304)
        mapping.seek(400 * PAGE)
        with pytest.raises(vm.StoreError):
            mapping.read(3 * PAGE)
        server.always = None
        assert mapping[:] == CONTENT


def test_an_access_through_a_pointer_ends_in_sigbus(kernels, script, server):
    pytest.importorskip("numpy")
    kernel, url = kernels(), server.url("/a")
    code = """
        import numpy
        mapping = vm.connect(sys.argv[1]).open(sys.argv[2], storage_options={"k42": {"retries": 0}})
        array = numpy.frombuffer(memoryview(mapping), numpy.uint8)
        say("open")
        sys.stdin.readline()
        if sys.argv[3] == "heal":
            try:
                mapping[300 * 4096]
            except vm.StoreError:
                say("failed")
            sys.stdin.readline()
            mapping[300 * 4096]
        say(array[300 * 4096])
        """
    server.always = None
    for what in ("die", "heal"):
        process = script(code, kernel.socket, url, what)
        assert process.line() == "open"
        server.always = status(500)
        process.tell()
        if what == "heal":
            assert process.line() == "failed"
            server.always = None
            process.tell()
            assert int(process.line()) == CONTENT[300 * PAGE]
            assert process.finish() == 0
        else:
            assert process.finish() == -signal.SIGBUS
            server.always = None
            assert url in process.stderr()
            assert f"offset {288 * PAGE}" in process.stderr()
            assert "500" in process.stderr()


def test_an_object_that_changed_is_noticed(kernels, connect, server):
    client = connect(kernels())  # with room for both versions
    url = server.url("/a")
    with client.open(url, storage_options=QUICK) as old:
        take(old, 0)
        at_rest(client, url)
        server.files["/a"] = words(SIZE, 1)
        with pytest.raises(vm.StoreError, match="changed"):
            take(old, 500)
        with client.open(url, storage_options=QUICK) as new:
            assert new[:] == words(SIZE, 1)
        take(old, 0)


def test_a_server_that_hangs_holds_up_nobody_else(kernels, server, folder):
    kernel = kernels()
    (folder / "file").write_bytes(CONTENT)
    server.files["/b"] = words(SIZE, 2)
    client = vm.connect(kernel.socket)
    stuck = client.open(server.url("/a"))
    server.always = http_server.hanging

    def wait():
        with pytest.raises(vm.KernelUnavailable):
            stuck.prefetch(0, PAGE)

    waiting = threading.Thread(target=wait)
    waiting.start()
    until(lambda: len(ranges(server)) >= 1, "the server is asked")
    with client.open(folder / "file") as other:
        assert other[:] == CONTENT
    server.always = None
    with client.open(server.url("/b")) as other:
        assert other[:] == words(SIZE, 2)
    client.close()
    waiting.join(30)
    assert not waiting.is_alive()
    assert kernel.stop() == 0  # long before the request of /a has failed five times
