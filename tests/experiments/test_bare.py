"""The yardstick takes the faults that it is a yardstick of."""

from __future__ import annotations

import mmap

import pytest

from k42 import _native
from k42.experiments._runner import cpus

PAGE = 4096


@pytest.fixture
def cpu(userfaultfd: None) -> int:
    return cpus()[0]


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("write", [True, False])
def test_a_touch_is_a_fault_once(cpu: int, resident: bool, write: bool) -> None:
    window = _native.BareWindow(cpu, 64 * PAGE, PAGE, resident)
    assert window.faults == 0
    assert _native.touch(window, PAGE, write, 0) > 0
    assert window.faults == 64
    _native.touch(window, PAGE, write, 0)
    assert window.faults == 64


@pytest.mark.parametrize("resident", [True, False])
def test_a_block_is_mapped_in_one_fault(cpu: int, resident: bool) -> None:
    window = _native.BareWindow(cpu, 64 * PAGE, 16 * PAGE, resident)
    _native.touch(window, PAGE, True, 0)
    assert window.faults == 4


def test_unmapped_pages_fault_again_and_keep_their_contents(cpu: int) -> None:
    window = _native.BareWindow(cpu, 4 * PAGE, PAGE, False)
    with memoryview(window) as view:
        view[PAGE] = 7
    assert window.faults == 1
    _native.dontneed(window)
    with memoryview(window) as view:
        assert bytes(view) == bytes(PAGE) + b"\7" + bytes(3 * PAGE - 1)
    assert window.faults == 5


def test_the_last_block_may_be_cut_short(cpu: int) -> None:
    window = _native.BareWindow(cpu, 17 * PAGE, 16 * PAGE, True)
    assert len(memoryview(window)) == 17 * PAGE
    _native.touch(window, PAGE, True, 0)
    assert window.faults == 2


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((0, 0, PAGE, True), ValueError),
        ((0, PAGE, 100, True), ValueError),
        ((0, PAGE + 1, PAGE, True), ValueError),
        ((-1, PAGE, PAGE, True), ValueError),
        ((1023, PAGE, PAGE, True), OSError),  # no such CPU
        ((0, PAGE), TypeError),
    ],
)
def test_what_cannot_be_is_refused(userfaultfd: None, arguments: tuple[int, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        _native.BareWindow(*arguments)  # type: ignore[call-arg, arg-type]


def test_touch_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="stride"):
        _native.touch(bytearray(10), 0, True, 0)
    with pytest.raises(BufferError):
        _native.touch(b"read-only", 1, True, 0)


def test_touch_writes_one_byte_a_stride() -> None:
    memory = bytearray(10)
    _native.touch(memory, 4, False, 0)
    assert memory == bytes(10)
    _native.touch(memory, 4, True, 0)
    assert memory == b"\1\0\0\0\1\0\0\0\1\0"


def test_dontneed_of_what_is_no_mapping_is_an_error() -> None:
    with (
        mmap.mmap(-1, 2 * PAGE) as memory,
        memoryview(memory) as view,
        pytest.raises(OSError, match="Invalid"),
    ):
        _native.dontneed(view[1:])
