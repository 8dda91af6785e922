from __future__ import annotations

import pytest

from k42 import _native
from k42.experiments._runner import cpus


@pytest.fixture(scope="session")
def userfaultfd() -> None:
    """Skips where Linux refuses even the faults of user mode."""
    try:
        _native.BareWindow(cpus()[0], 4096, 4096, True)
    except OSError as error:
        pytest.skip(f"no userfaultfd here: {error}")
