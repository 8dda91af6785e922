from __future__ import annotations

import sys
import sysconfig
import threading

import pytest
from stores_support import PAGE, padded, words

from k42 import vm
from k42.vm.files import open_store

if sysconfig.get_config_var("Py_GIL_DISABLED") and sys.version_info < (3, 14):
    pytest.skip("moto's server needs what has no free-threaded wheels for 3.13", allow_module_level=True)
s3fs = pytest.importorskip("s3fs", reason="needs the extra k42[s3]")
moto_server = pytest.importorskip("moto.server", reason="needs moto[s3] and flask-cors")

CONTENT = words(300 * PAGE + 9)


@pytest.fixture(scope="module")
def endpoint():
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def options(endpoint):
    return {
        "key": "test",
        "secret": "test",
        "endpoint_url": endpoint,
        "client_kwargs": {"region_name": "us-east-1"},
        "k42": {"backoff": 0.01},
    }


@pytest.fixture
def bucket(options):
    given = {name: value for name, value in options.items() if name != "k42"}
    fs = s3fs.S3FileSystem(skip_instance_cache=True, **given)
    if not fs.exists("bucket"):
        fs.call_s3("create_bucket", Bucket="bucket")
    return fs


@pytest.fixture
def opened(opened, options):
    return lambda url, **more: opened(url, "r", options | more)


def test_ranges(bucket, opened, frames):
    bucket.pipe_file("bucket/a", CONTENT)
    fr = opened("s3://bucket/a")
    assert fr.size() == len(CONTENT)
    assert frames(301).filled(fr, 0, 301) == padded(CONTENT, 301)
    assert frames(301).filled(fr, 7, 3) == CONTENT[7 * PAGE : 10 * PAGE]
    assert not fr.changed()
    assert opened("s3://bucket/a").version() == fr.version()
    with pytest.raises(vm.Unsupported, match="read-only"):
        open_store("s3://bucket/a", "r+", {})


def test_an_object_that_changes(bucket, opened, frames):
    bucket.pipe_file("bucket/b", CONTENT)
    fr = opened("s3://bucket/b")
    first = frames(301).filled(fr, 0, 1)
    assert first == CONTENT[:PAGE]
    bucket.pipe_file("bucket/b", words(300 * PAGE + 9, 1))
    with pytest.raises(vm.StoreError, match="changed since it was opened") as error:
        fr.fill(frames(301).memfd, 1, 1)
    assert (error.value.url, error.value.offset) == ("s3://bucket/b", PAGE)
    assert fr.changed()
    new = opened("s3://bucket/b")
    assert new.version() != fr.version()
    assert frames(1).filled(new, 0, 1) == words(PAGE, 1)
    bucket.rm_file("bucket/b")
    with pytest.raises(vm.StoreError):
        new.fill(frames(301).memfd, 0, 1)


@pytest.mark.parametrize("url", ["s3://bucket/none", "s3://nobucket/none", "s3://bucket"])
def test_what_is_not_there(bucket, opened, url):
    with pytest.raises(vm.StoreError, match=url):
        opened(url)


def test_nobody_listens(opened):
    with pytest.raises(vm.StoreError, match=r"\(2 attempts\)"):
        opened("s3://bucket/a", endpoint_url="http://127.0.0.1:9", k42={"retries": 1, "backoff": 0.001})


def test_many_at_a_time(bucket, opened, frames):
    bucket.pipe_file("bucket/c", CONTENT)
    fr = opened("s3://bucket/c")
    memory = frames(301)
    threads = [threading.Thread(target=fr.fill, args=(memory.memfd, first, 43)) for first in range(0, 301, 43)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.read() == padded(CONTENT, 301)
