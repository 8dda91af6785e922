from __future__ import annotations

import threading
import time
from email.utils import formatdate

import http_server
import pytest
from http_server import Server, status
from stores_support import PAGE, padded, words
from vm_support import until

from k42 import vm
from k42.vm.files import open_store

QUICK = {"k42": {"backoff": 0.01, "timeout": 5}}
CONTENT = words(20 * PAGE + 123)


@pytest.fixture
def server():
    made = Server()
    made.files["/a"] = CONTENT
    yield made
    made.end()


@pytest.fixture
def opened(opened, server):
    """Opens what lies at a path of the server."""
    return lambda path="/a", options=QUICK: opened(server.url(path), "r", options)


def reads_right(fr, frames) -> bool:
    return frames(21).filled(fr, 0, 21) == padded(CONTENT, 21)


def test_ranges(server, opened, frames):
    fr = opened()
    assert fr.size() == len(CONTENT)
    assert fr.name() == server.url("/a")
    assert not fr.writable()
    assert reads_right(fr, frames)
    memory = frames(100)
    assert memory.filled(fr, 3, 2) == CONTENT[3 * PAGE : 5 * PAGE]
    assert memory.filled(fr, 20, 80) == padded(CONTENT[20 * PAGE :], 80)
    before = len(server.requests)
    assert memory.filled(fr, 21, 10) == bytes(10 * PAGE)
    assert len(server.requests) == before
    assert fr.read_range(5, 7) == CONTENT[5:12]
    with pytest.raises(vm.Unsupported, match="read-only"):
        fr.write_back(memory.memfd, 0, 1)
    with pytest.raises(vm.Unsupported, match=r"read-only.*'c'"):
        open_store(server.url("/a"), "r+", {})


def test_the_options_reach_the_server_and_nothing_of_the_environment(server, opened, frames):
    fr = opened(options=QUICK | {"headers": {"X-Token": "secret"}})
    assert reads_right(fr, frames)
    assert all(headers["X-Token"] == "secret" for _, headers in server.requests)
    assert all(headers["Accept-Encoding"] == "identity" for _, headers in server.requests)
    for wrong in ({"k42": {"retries": "many"}}, {"k42": {"nonsense": 1}}, {"k42": {"timeout": 0}}):
        with pytest.raises(ValueError, match=r"nonsense|retries|timeout"):
            open_store(server.url("/a"), "r", wrong)


def test_no_password_in_messages(server):
    url = server.url("/none").replace("http://", "http://user:secret@")
    with pytest.raises(vm.StoreError, match="404") as error:
        open_store(url, "r", QUICK)
    assert "secret" not in str(error.value)
    assert "user:***@127.0.0.1" in str(error.value)


@pytest.mark.parametrize(
    "trick",
    [
        status(500),
        status(503),
        status(429, Retry_After="0"),
        status(503, Retry_After=formatdate(0, usegmt=True)),
        http_server.hang_up,
        http_server.truncated,
    ],
)
def test_what_passes_is_tried_again(server, opened, frames, trick):
    fr = opened()
    server.tricks += [trick, trick, trick]
    assert reads_right(fr, frames)
    assert not server.tricks
    server.always = trick
    before = len(server.requests)
    with pytest.raises(vm.StoreError, match="5 attempts") as error:
        fr.fill(frames(21).memfd, 3, 2)
    # (It is asked again at once where a connection that was used before is closed.)
    assert len(server.requests) == before + 5 or trick is http_server.hang_up
    assert (error.value.url, error.value.offset) == (server.url("/a"), 3 * PAGE)
    assert error.value.__cause__ is not None
    server.always = None
    assert reads_right(fr, frames)


def test_the_server_says_when_to_come_again(server, opened, frames):
    fr = opened()
    server.tricks += [status(429, Retry_After="1")]
    start = time.monotonic()
    assert reads_right(fr, frames)
    assert time.monotonic() - start >= 1


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 501])
def test_what_does_not_pass_is_not_tried_again(server, opened, frames, code):
    fr = opened()
    server.always = status(code)
    before = len(server.requests)
    with pytest.raises(vm.StoreError, match=f"HTTP status {code}"):
        fr.fill(frames(21).memfd, 0, 1)
    assert len(server.requests) == before + 1
    server.also_at_open = True
    with pytest.raises(vm.StoreError, match=f"HTTP status {code}"):
        opened()
    assert len(server.requests) == before + 2


@pytest.mark.parametrize(
    "trick",
    [
        http_server.short_but_says_so,
        http_server.too_long,
        http_server.too_long_without_length,
        http_server.another_range,
        http_server.shorter_range,
        http_server.no_range,
        http_server.unknown_total,
        http_server.everything,
        http_server.the_part_as_everything,
        http_server.encoded,
    ],
)
def test_a_server_that_lies_is_not_believed(server, opened, frames, trick):
    fr = opened()
    memory = frames(21)
    server.always = trick
    before = len(server.requests)
    with pytest.raises(vm.StoreError) as error:
        fr.fill(memory.memfd, 2, 4)
    assert error.value.offset == 2 * PAGE
    assert len(server.requests) == before + 1
    server.always = None
    assert reads_right(fr, frames)


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("kind", ["etag", "weak etag", "time", "size"])
def test_a_file_that_changes_is_never_a_mixture(server, opened, frames, kind, conditional):
    server.conditional = conditional
    server.weak = kind == "weak etag"
    server.with_etag = kind != "time"
    fr, old = opened(), opened()
    assert reads_right(fr, frames)
    assert not fr.changed()
    server.files["/a"] = words(len(CONTENT) + 5 * (kind == "size"), seed=1)
    server.modified = "Sun, 02 Jan 2022 00:00:00 GMT"
    for _ in range(2):
        with pytest.raises(vm.StoreError, match="changed since it was opened"):
            fr.fill(frames(21).memfd, 0, 3)
    assert fr.changed()
    new = opened()
    assert new.version() != fr.version()
    assert old.version() == fr.version()
    assert frames(1).filled(new, 0, 1) == words(PAGE, 1)


def test_a_file_that_becomes_shorter(server, opened, frames):
    server.conditional = False
    fr = opened()
    server.files["/a"] = CONTENT[: 3 * PAGE]
    with pytest.raises(vm.StoreError, match="changed"):
        fr.fill(frames(21).memfd, 10, 3)


def test_changes_in_the_middle(server, opened, frames):
    """The content changes all the time while several threads read: each range is of the version that was opened."""
    server.conditional = False
    versions = [words(20 * PAGE + 123, seed) for seed in range(4)]
    stop = threading.Event()

    def change():
        n = 0
        while not stop.wait(0.003):
            n += 1
            server.files["/a"] = versions[n % 4]

    changer = threading.Thread(target=change)
    changer.start()
    outcomes = {"read": 0, "changed": 0}
    lock = threading.Lock()
    wrong = []

    def read():
        memory = frames(21)
        for _ in range(15):
            fr = opened()
            etag = fr.version()
            for first in (0, 5, 10):
                try:
                    data = memory.filled(fr, first, 5)
                except vm.StoreError as error:
                    if "changed" not in str(error):
                        wrong.append(error)
                    fate = "changed"
                else:
                    fate = "read"
                    expected = [v for v in versions if http_etag(v) in str(etag)]
                    if data != expected[0][first * PAGE : (first + 5) * PAGE]:
                        wrong.append("a mixture")
                with lock:
                    outcomes[fate] += 1

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    stop.set()
    changer.join()
    assert not wrong
    assert outcomes["changed"] > 0
    assert sum(outcomes.values()) == 135


def http_etag(content: bytes) -> str:
    import hashlib

    return hashlib.md5(content).hexdigest()


def test_servers_that_cannot_be_used(server, opened):
    server.with_etag, server.modified = False, ""
    with pytest.raises(vm.Unsupported, match="neither ETag nor Last-Modified"):
        opened()
    server.with_etag, server.also_at_open, server.always = True, True, http_server.everything
    with pytest.raises(vm.Unsupported, match="gives no parts"):
        opened()


def test_an_empty_file(server, opened):
    server.files["/empty"] = b""
    assert opened("/empty").size() == 0


def test_nobody_listens(server):
    url = server.url("/a")
    server.end()
    with pytest.raises(vm.StoreError, match=r"\(3 attempts\)"):
        open_store(url, "r", {"k42": {"backoff": 0.001, "retries": 2}})


def test_a_slow_server_and_a_dead_one(server, opened, frames):
    fr = opened(options={"k42": {"backoff": 0.01, "timeout": 0.3, "retries": 1}})
    server.always = http_server.slow  # for longer than the limit in all, but never silent
    assert reads_right(fr, frames)
    server.always = http_server.hanging
    with pytest.raises(vm.StoreError, match=r"no answer within 0.3 s \(2 attempts\)"):
        fr.fill(frames(21).memfd, 0, 1)


def test_who_waits_is_let_go(server, opened, frames):
    fr = opened(options={})
    server.always = http_server.hanging
    failed = []
    memory = frames(21)

    def read(page):
        try:
            fr.fill(memory.memfd, page, 1)
        except vm.StoreError as error:
            failed.append(str(error))

    readers = [threading.Thread(target=read, args=(page,)) for page in range(3)]
    before = len(server.requests)
    for reader in readers:
        reader.start()
    until(lambda: len(server.requests) == before + 3, "all wait for the server")
    fr.cancel()
    for reader in readers:
        reader.join(30)
    assert len(failed) == 3
    assert all("closed" in reason for reason in failed)
    with pytest.raises(vm.StoreError, match="closed"):
        fr.fill(memory.memfd, 0, 1)


def test_who_pauses_is_let_go(server, opened, frames):
    fr = opened(options={})
    server.always = status(503, Retry_After="3000")
    failed = []
    memory = frames(1)

    def read():
        try:
            fr.fill(memory.memfd, 0, 1)
        except vm.StoreError:
            failed.append(1)

    thread = threading.Thread(target=read)
    thread.start()
    until(lambda: len(server.requests) == 2, "it was told to wait")
    fr.cancel()
    thread.join(30)
    assert failed


def test_many_at_a_time(server, opened, frames):
    fr = opened()
    memory = frames(21)
    threads = [threading.Thread(target=fr.fill, args=(memory.memfd, page, 1)) for page in range(21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.read() == padded(CONTENT, 21)
