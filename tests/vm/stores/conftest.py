from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from stores_support import Frames

import k42
from k42.vm.files import open_store
from k42.vm.fr import FileRepresentative


@pytest.fixture
def frames() -> Iterator[Callable[[int], Frames]]:
    """Makes frames when called."""
    made: list[Frames] = []

    def make(pages: int) -> Frames:
        made.append(Frames(pages))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def opened() -> Iterator[Callable[..., FileRepresentative]]:
    """Opens a URL when called."""
    made: list[FileRepresentative] = []

    def make(url: str, mode: str = "r", options: dict[str, Any] | None = None) -> FileRepresentative:
        made.append(open_store(url, mode, options or {}))
        return made[-1]

    yield make
    for fr in made:
        fr.close()
        k42.destroy(fr)
