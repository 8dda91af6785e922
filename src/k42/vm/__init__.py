"""The virtual memory system: files and anonymous memory as real memory, from one page cache, within a hard budget.

A *kernel* process (``k42 serve``, or started by the first client) owns the page cache; clients map it and their page
faults are served by the kernel's objects: Process, Region, FCM, PM, Global PM, FR and HAT of the paper's section 4.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from k42.vm.errors import (
    ForkWarning,
    KernelUnavailable,
    OutOfFrames,
    ProtocolError,
    StoreError,
    Unsupported,
    UserModeOnlyWarning,
)

if not sys.platform.startswith("linux"):
    raise Unsupported(f"k42.vm needs Linux (userfaultfd); this is {sys.platform}. The rest of k42 works here.")

from k42.vm.client import Client, anonymous, connect, open
from k42.vm.launch import KernelProcess, launch
from k42.vm.mapping import Mapping

if TYPE_CHECKING:
    from k42.vm.arrays import load, memmap

__all__ = [
    "Client",
    "ForkWarning",
    "KernelProcess",
    "KernelUnavailable",
    "Mapping",
    "OutOfFrames",
    "ProtocolError",
    "StoreError",
    "Unsupported",
    "UserModeOnlyWarning",
    "anonymous",
    "connect",
    "launch",
    "load",
    "memmap",
    "open",
]


def __getattr__(name: str) -> Any:
    if name in ("load", "memmap"):  # not before somebody asks: they need numpy, which is optional
        from k42.vm import arrays

        return getattr(arrays, name)
    raise AttributeError(f"module 'k42.vm' has no attribute {name!r}")
