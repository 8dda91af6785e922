"""A control group with a limit of memory, for as long as an experiment needs it; of version 1 or 2."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from k42.errors import Error

_ROOT = Path("/sys/fs/cgroup")


def _parent() -> tuple[Path, str]:
    """The folder of this process's own group, which ours shall be in, and the name of the file of its limit."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
        if not controllers and (folder := _ROOT / path.lstrip("/")).joinpath("memory.current").exists():
            return folder.parent, "memory.max"  # beside: a group with processes has no groups with limits in it
    raise Error("Linux has no control groups for memory here")


@contextlib.contextmanager
def limited(name: str, nbytes: int) -> Iterator[str]:
    """Make a group and remove it afterwards, when its processes have ended; yields its folder.

    Args:
        name: of the group.
        nbytes: memory that its processes may take, what they cache of files included.

    Raises:
        Error: there can be none here; the message says why.
    """
    try:
        parent, file = _parent()
        folder = parent / f"{name}-{os.getpid()}"
        folder.mkdir()
    except OSError as error:
        raise Error(f"no control group with a limit of memory can be made here: {error}") from error
    try:
        try:
            (folder / file).write_text(str(nbytes))
        except OSError as error:
            raise Error(f"a control group was made, but cannot be given a limit of memory: {error}") from error
        yield str(folder)
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    for _ in range(100):
        try:
            folder.rmdir()
        except OSError:
            time.sleep(0.05)  # the last process has ended, and Linux is still at it
        else:
            return
