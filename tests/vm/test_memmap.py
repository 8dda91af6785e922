"""`k42.vm.memmap` is `numpy.memmap`, and `k42.vm.load` is ``numpy.load`` with ``mmap_mode``."""

from __future__ import annotations

import gc
import itertools
import pickle
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vm_support import PAGE, words

from k42 import vm

EXAMPLES = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
SYNONYMS = ["readonly", "copyonwrite", "readwrite", "write"]


@pytest.fixture(scope="module")
def module_client(shared_kernel):
    with vm.connect(shared_kernel.socket) as made:
        yield made


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two new paths of an example."""
    folder = tmp_path_factory.mktemp("memmap")
    numbers = itertools.count()
    return lambda: [folder / f"{next(numbers)}", folder / f"{next(numbers)}"]


def made(make: Any) -> Any:
    """The array, or the type of the error."""
    try:
        return make()
    except Exception as error:
        return type(error)


def same(ours: Any, theirs: Any) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert ours.strides == theirs.strides or not ours.size  # of nothing they are as numpy likes
    assert ours.flags.writeable == theirs.flags.writeable
    assert ours.flags.c_contiguous == theirs.flags.c_contiguous
    assert ours.tobytes() == theirs.tobytes()
    if isinstance(theirs, numpy.memmap):
        assert isinstance(ours, vm.memmap)
        assert (ours.offset, ours.mode) == (theirs.offset, theirs.mode)
        assert type(ours.filename) is type(theirs.filename)
    else:
        assert type(ours) is type(theirs)


shapes = st.one_of(
    st.none(),
    st.integers(0, 3000),
    st.lists(st.integers(0, 12), max_size=3),
    st.lists(st.integers(0, 12), max_size=3).map(tuple),
    st.just(numpy.int64(7)),
)


@EXAMPLES
@given(
    size=st.sampled_from([0, 1, 8, 100, PAGE, PAGE + 8, 3 * PAGE]),
    dtype=st.sampled_from(["u1", "<i2", "f4", "f8", "S5", numpy.int64, [("a", "u1"), ("b", "<f8")], None]),
    mode=st.sampled_from(["r", "r+", "w+", "c", *SYNONYMS, "x", "w", 5]),
    offset=st.sampled_from([0, 1, 8, 100, PAGE, PAGE + 8]),
    shape=shapes,
    order=st.sampled_from(["C", "F"]),
)
def test_what_is_made(module_client, pair, size, dtype, mode, offset, shape, order):
    if shape is None and offset >= size:
        return  # an array of nothing, or an error, by the version of numpy; here always an error
    paths = pair()
    for path in paths:
        path.write_bytes(words(size))
    ours = made(lambda: vm.memmap(str(paths[0]), dtype, mode, offset, shape, order, client=module_client))
    theirs = made(lambda: numpy.memmap(str(paths[1]), dtype, mode, offset, shape, order))
    if isinstance(theirs, type):
        assert isinstance(ours, type), (ours, theirs)
        assert issubclass(ours, theirs) or theirs in (OverflowError,), (ours, theirs)
        return
    same(ours, theirs)
    if ours.size and ours.flags.writeable:
        for array in (ours, theirs):
            array.reshape(-1).view(numpy.uint8)[-1:] = 65
    same(ours, theirs)
    ours.flush()
    theirs.flush()
    mapping = ours._mmap
    del ours, theirs
    mapping.close()
    assert paths[0].read_bytes() == paths[1].read_bytes()
    for path in paths:
        path.unlink()


INDICES = [0, -1, slice(2, 5), slice(None, None, -2), (0, 1), ..., None, [0, 2], (slice(None), 1), numpy.int64(1)]


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_what_is_made_of_it(client, folder, mode):
    paths = [folder / "ours", folder / "theirs"]
    content = numpy.arange(60, dtype="f8")
    for path in paths:
        path.write_bytes(content.tobytes())
    ours = vm.memmap(paths[0], "f8", mode, shape=(6, 10), client=client)
    theirs = numpy.memmap(paths[1], "f8", mode, shape=(6, 10))
    for index in INDICES:
        same(ours[index], theirs[index])
    same(ours[ours > 30], theirs[theirs > 30])
    for work in (
        lambda a: a + 1,
        lambda a: a.sum(),
        lambda a: a.sum(axis=0),
        lambda a: numpy.sqrt(a),
        lambda a: a.T,
        lambda a: a.copy(),
        lambda a: a.astype("f4"),
        lambda a: numpy.asarray(a),
        lambda a: a.reshape(-1),
        lambda a: a.view("u8"),
        lambda a: numpy.concatenate([a, a]),
    ):
        results = [work(array) for array in (ours, theirs)]
        assert isinstance(results[0], vm.memmap) == isinstance(results[1], numpy.memmap)
        assert isinstance(results[0], numpy.ndarray) == isinstance(results[1], numpy.ndarray)
        assert numpy.array_equal(*results)
        if isinstance(results[0], vm.memmap):
            assert (results[0]._mmap is None) == (results[1]._mmap is None)
    again = pickle.loads(pickle.dumps(ours))
    assert numpy.array_equal(again, theirs)
    assert type(again) is type(ours)
    assert again._mmap is None
    assert pickle.loads(pickle.dumps(theirs))._mmap is None
    if mode != "r":
        ours[0, :3] = theirs[0, :3] = 99
        ours += 1
        theirs += 1
        same(ours, theirs)
    else:
        with pytest.raises(ValueError, match="read-only"):
            ours[0, 0] = 1


def test_views_keep_it_open(client, folder):
    path = folder / "file"
    path.write_bytes(words(10 * PAGE))
    view = vm.memmap(path, "u8", "r", client=client)[100:200]
    gc.collect()
    assert view.tobytes() == words(10 * PAGE)[800:1600]
    mapping = view._mmap
    with pytest.raises(BufferError):
        mapping.close()
    plain = numpy.asarray(view)
    del view
    with pytest.raises(BufferError):
        mapping.close()
    del plain
    mapping.close()


def test_names(client, folder, monkeypatch):
    path = folder / "file"
    path.write_bytes(words(PAGE))
    monkeypatch.chdir(folder)
    for given_, kept in [("file", str(path)), (Path("file"), path), (str(path), str(path))]:
        assert vm.memmap(given_, mode="r", client=client).filename == kept == numpy.memmap(given_, mode="r").filename
    with open("file", "rb") as opened:
        array = vm.memmap(opened, mode="r", client=client)
        assert array.filename == str(path) == numpy.memmap(opened, mode="r").filename
    with tempfile.TemporaryFile() as nameless:
        nameless.write(words(PAGE))
        array = vm.memmap(nameless, mode="r", client=client)
        assert array.filename is None
        assert array.tobytes() == words(PAGE)
        assert numpy.memmap(nameless, mode="r").filename is None


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_loading(client, folder, version, order):
    path = folder / "a.npy"
    array = numpy.asarray(numpy.arange(6000.0).reshape(60, 100), order=order)
    with open(path, "wb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of versions that not all readers know
        numpy.lib.format.write_array(file, array, version)
    for mode in ("r", "r+", "c", None):
        ours = vm.load(path, mode, client=client)
        theirs = numpy.load(path, mode)
        same(ours, theirs)
        if mode == "c":
            ours[0] = 5
        del ours
    assert numpy.array_equal(numpy.load(path), array)
    ours = vm.load(path, "r+", client=client)
    ours[3, 4] = -1
    ours.flush()
    assert numpy.load(path)[3, 4] == -1


def test_loading_all_kinds_of_types(client, folder):
    path = folder / "a.npy"
    for array in (
        numpy.array(5.0),
        numpy.zeros((0, 3)),
        numpy.array(["ä", "b"]),
        numpy.array([(1, 2.0)], dtype=[("ä日", "i4"), ("b", "f8")]),
        numpy.arange(5, dtype=">i2"),
        numpy.array(["2024-01-01"], dtype="M8[D]"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a name that needs version 3.0
            numpy.save(path, array)
        same(vm.load(path, client=client), numpy.load(path, "r"))
        same(vm.load(path, None, client=client), numpy.load(path))


def test_what_cannot_be_loaded(client, folder):
    path = folder / "a.npy"
    numpy.save(path, numpy.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy holds Python objects"):
        vm.load(path, client=client)
    numpy.savez(folder / "a.npz", numpy.zeros(3))
    with pytest.raises(ValueError, match=r"a\.npz is an archive of arrays"):
        vm.load(folder / "a.npz", client=client)
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"no \.npy file"):
        vm.load(path, client=client)
    numpy.save(path, numpy.zeros(1000))
    whole = path.read_bytes()
    for end in (7, 9, 50, 128, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError):  # noqa: PT011  (numpy's words)
            vm.load(path, client=client)
    path.write_bytes(whole[:6] + b"\x09" + whole[7:])
    with pytest.raises(ValueError, match="version"):
        vm.load(path, client=client)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="Header info length"):
        vm.load(path, max_header_size=10, client=client)
    with pytest.raises(ValueError, match="mmap_mode must be"):
        vm.load(path, "w+", client=client)
    assert not any(c["regions"] for c in client.stat()["clients"])


def test_numpy_is_optional(script):
    code = """
        sys.modules["numpy"] = None
        try:
            vm.memmap
        except NotImplementedError as error:
            say(type(error).__name__, error)
        assert vm.open and vm.Mapping
        try:
            vm.nothing
        except AttributeError as error:
            say(error)
        """
    process = script(code)
    assert process.line() == "Unsupported k42.vm.memmap and k42.vm.load need numpy: pip install 'k42[numpy]'"
    assert process.line() == "module 'k42.vm' has no attribute 'nothing'"
    process.good()


def test_through_the_users_own_kernel(script, tmp_path):
    array = numpy.arange(1000)
    numpy.save(tmp_path / "a.npy", array)
    code = """
        os.environ["XDG_RUNTIME_DIR"] = sys.argv[1]
        array = vm.load(sys.argv[1] + "/a.npy")
        say(type(array).__name__, int(array.sum()))
        say(int(vm.memmap(sys.argv[1] + "/a.npy", "<i8", "r", array.offset).sum()))
        """
    with tempfile.TemporaryDirectory(prefix="k42-") as folder:
        numpy.save(Path(folder) / "a.npy", array)
        assert script(code, folder).good() == "memmap 499500\n499500\n"
    assert sys.getrefcount(array)
