"""Whether memory stays flat."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

_STATM = Path("/proc/self/statm")


def memory_flat(function: Callable[[], object], rounds: int, *, tolerance: int = 4 << 20) -> None:
    """Check that the process needs no more memory the more often `function` has run.

    The first quarter of the rounds fills caches, pools and free lists; what is resident must not grow by more than
    the tolerance after it.

    Args:
        function: one round.
        rounds: how many. A leak of a few bytes is only seen if so many rounds make more than `tolerance` of them.
        tolerance: bytes by which the process may have grown. The default is what allocators and the kernel's
            count of pages are known to be off by.

    Raises:
        AssertionError: the memory grew; the message says by how much a round.

    >>> from k42.testing import memory_flat
    >>> memory_flat(lambda: bytearray(1000), 1000)
    >>> hoard = []
    >>> memory_flat(lambda: hoard.append(bytearray(100_000)), 1000)
    Traceback (most recent call last):
    AssertionError: memory grew by ...
    """
    warm = rounds // 4
    for _ in range(warm):
        function()
    before = _resident()
    for _ in range(rounds - warm):
        function()
    grown = _resident() - before
    if grown > tolerance:
        raise AssertionError(
            f"memory grew by {grown / 2**20:.1f} MiB in {rounds - warm} rounds after {warm} to warm up: "
            f"{grown / (rounds - warm):.0f} bytes a round"
        )


def _resident() -> int:
    """Return the bytes of memory that this process has, once garbage is gone."""
    gc.collect()
    # What the allocator keeps for later would hide what is taken from there.
    with contextlib.suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
