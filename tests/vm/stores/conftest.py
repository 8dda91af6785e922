from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from stores_support import Frames


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
