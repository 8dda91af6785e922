from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if not sys.platform.startswith("linux"):
    collect_ignore_glob = ["test_*.py"]

from vm_support import PAGE, PAGES, Kernels, Script, words

from k42 import _native, vm


def _why_not() -> str | None:
    """Why no test here can run, if so."""
    for user_mode_only in (False, True):
        try:
            os.close(_native.open_userfaultfd(user_mode_only))
        except OSError as error:
            reason = error.strerror
        else:
            return None
    return f"userfaultfd is not to be had here, not even in user mode: {reason}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = _why_not() if here else None
    for item in here:
        # Without privilege all but system calls on absent pages works the same.
        item.add_marker(pytest.mark.filterwarnings("ignore::k42.vm.UserModeOnlyWarning"))
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def _stderr(pytestconfig: pytest.Config) -> int:
    manager = pytestconfig.pluginmanager.getplugin("capturemanager")
    with manager.global_and_fixture_disabled() if manager else contextlib.nullcontext():
        return os.dup(2)


@pytest.fixture(autouse=True)
def _watchdog(_stderr: int) -> Iterator[None]:
    """A thread that waits for a page may hold the GIL: only what needs no interpreter can end such a hang."""
    faulthandler.dump_traceback_later(100, exit=True, file=_stderr)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short: that of a socket has at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="k42-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def path(folder: Path) -> Path:
    """A file of so many pages, each of which says where it is."""
    made = folder / "file"
    made.write_bytes(words(PAGES * PAGE))
    return made


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    """Starts a kernel when called."""
    made = Kernels()
    yield made
    made.end()


@pytest.fixture(scope="module")
def shared_kernel() -> Iterator[vm.KernelProcess]:
    """One kernel for the tests of a module that leave it as they found it. Budget: 64 MiB."""
    made = Kernels()
    yield made()
    made.end()


@pytest.fixture
def connect() -> Iterator[Callable[..., vm.Client]]:
    """Connects to a kernel when called."""
    with contextlib.ExitStack() as stack:
        yield lambda kernel, **options: stack.enter_context(vm.connect(kernel.socket, **options))


@pytest.fixture
def client(shared_kernel: vm.KernelProcess) -> Iterator[vm.Client]:
    """A client of the shared kernel."""
    with vm.connect(shared_kernel.socket) as made:
        yield made


@pytest.fixture
def script() -> Iterator[Callable[..., Script]]:
    """Starts a Python process when called."""
    started: list[Script] = []

    def start(*arguments: Any, **options: Any) -> Script:
        started.append(Script(*arguments, **options))
        return started[-1]

    yield start
    for process in started:
        process.dispose()
