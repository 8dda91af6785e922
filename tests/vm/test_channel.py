"""Requests that may take long go over connections of their own: they hold up nobody, and can be given up."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from vm_support import PAGE, PAGES, file_counts, stop, words

from k42 import vm


def test_what_is_prefetched_is_there(client, path):
    with client.open(path) as mapping:
        mapping.prefetch(10 * PAGE + 5, 20 * PAGE)
        filled = file_counts(client, path)["filled"]
        assert filled >= 21
        assert mapping[10 * PAGE : 30 * PAGE] == words(PAGES * PAGE)[10 * PAGE : 30 * PAGE]
        assert mapping.stats()["filled"] == filled
        mapping.prefetch()
        assert file_counts(client, path)["filled"] == PAGES
        for offset, length in [(-1, 5), (0, -1), (0, PAGES * PAGE + 1), (PAGES * PAGE + 1, 0)]:
            with pytest.raises(ValueError, match="not within the mapping"):
                mapping.prefetch(offset, length)


def test_stats(client, path):
    with client.open(path, "c", offset=5, page_size=65536) as mapping:
        stats = mapping.stats()
        assert stats["name"] == str(path)
        assert stats["mode"] == "c"
        assert stats["bytes"] == PAGES * PAGE - 5
        assert stats["page_size"] == 65536
        assert stats["size"] == mapping.size() == PAGES * PAGE
        assert stats["windows"] == 1
    for ask in (mapping.stats, mapping.prefetch, mapping.pin, mapping.unpin, mapping.flush, mapping.snapshot):
        with pytest.raises(ValueError, match="closed"):
            ask()


def test_pinned_pages_stay(kernels, connect, path, folder):
    other = folder / "other"
    other.write_bytes(words(PAGES * PAGE, 1))
    with connect(kernels(budget=48 * PAGE)) as client, client.open(path) as mapping, client.open(other) as rest:
        mapping.pin(0, 8 * PAGE)
        filled = file_counts(client, path)["filled"]
        for _ in range(3):
            assert rest[:] == words(PAGES * PAGE, 1)
        assert mapping[: 8 * PAGE] == words(8 * PAGE)
        assert file_counts(client, path)["filled"] == filled
        mapping.unpin(0, 8 * PAGE)


def test_more_requests_at_once_than_there_are_channels(client, path):
    with client.open(path) as mapping:
        errors: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for _ in range(5):
                    mapping.prefetch(number * PAGE, PAGE)
                    assert mapping.stats()["pages"] == PAGES
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors


def test_others_go_on_while_one_waits(kernels, connect, path):
    kernel = kernels()
    client = connect(kernel, grace=60)
    with client.open(path) as mapping:
        mapping.stats()
        stop(kernel.pid)
        waiting = threading.Thread(target=mapping.prefetch)
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        os.kill(kernel.pid, signal.SIGCONT)
        waiting.join()
        assert file_counts(client, path)["filled"] == PAGES


def test_control_c_gives_a_request_up(shared_kernel, path, script):
    code = """
        socket, path = sys.argv[1:]
        client = vm.connect(socket, grace=60)
        mapping = client.open(path)
        mapping.stats()
        try:
            say("ready")
            sys.stdin.readline()  # the kernel is stopped by then
            say("asking")
            mapping.prefetch()
        except KeyboardInterrupt:
            say("given up")
        sys.stdin.readline()  # it goes on by then
        mapping.prefetch()
        say(mapping.stats()["pages"], mapping[:] == open(path, "rb").read())
        mapping.close()
        client.close()
        """
    process = script(code, shared_kernel.socket, path)
    try:
        assert process.line() == "ready"
        stop(shared_kernel.pid)
        process.tell()
        assert process.line() == "asking"
        time.sleep(0.2)  # it asks by now; if not, the test shows less
        process.process.send_signal(signal.SIGINT)
        assert process.line() == "given up"
        os.kill(shared_kernel.pid, signal.SIGCONT)
        process.tell()
        assert process.good() == f"{PAGES} True\n"
    finally:
        os.kill(shared_kernel.pid, signal.SIGCONT)


def test_a_request_of_a_client_that_is_closed(kernels, path):
    kernel = kernels()
    client = vm.connect(kernel.socket, grace=60)
    mapping = client.open(path)
    mapping.stats()
    stop(kernel.pid)
    caught: list[BaseException] = []

    def work() -> None:
        try:
            client._channels.request({"op": "region_stat", "region": mapping.base})
        except BaseException as error:
            caught.append(error)

    waiting = threading.Thread(target=work)
    waiting.start()
    waiting.join(0.1)
    client._channels.close()
    waiting.join()
    os.kill(kernel.pid, signal.SIGCONT)
    [error] = caught
    assert isinstance(error, vm.KernelUnavailable)
    assert str(error) == "this client is closed"
    client.close()


def test_a_forked_child_has_none(shared_kernel, path, script):
    code = """
        socket, path = sys.argv[1:]
        client = vm.connect(socket)
        mapping = client.open(path)
        mapping.prefetch()
        child = os.fork()
        if child == 0:
            try:
                mapping.prefetch()
            except ValueError as error:
                say(error)
            with vm.connect(socket) as own, own.open(path) as again:
                again.prefetch()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        mapping.prefetch()
        say("the parent goes on")
        client.close()
        """
    process = script(code, shared_kernel.socket, path)
    assert process.line() == "this mapping belongs to the parent process: open it again in the forked child"
    assert process.good() == "the parent goes on\n"


def test_hostile_greetings(shared_kernel, client):
    from vm_support import Raw

    for greeting in (
        {"op": "channel"},
        {"op": "channel", "client": 1},
        {"op": "channel", "client": 10**9, "token": ""},
        {"op": "channel", "client": client._channels.greeting["client"], "token": "0" * 32},
        {"op": "channel", "client": client._channels.greeting["client"], "token": 5},
    ):
        with Raw(shared_kernel.socket) as raw:
            assert raw.ask(greeting)["error"] == "protocol"
            assert raw.ask({"op": "region_stat", "region": 0})["error"] == "protocol"
    assert client.stat()["pid"] == shared_kernel.pid
