from __future__ import annotations

import threading
from collections.abc import Callable

import pytest


@pytest.fixture
def in_threads() -> Callable[..., list[object]]:
    """Run `work(i)` in n threads, all alive from before the first to after the last; return results."""

    def run(n: int, work: Callable[[int], object]) -> list[object]:
        barrier = threading.Barrier(n)
        results: list[object] = [None] * n
        errors: list[BaseException] = []

        def body(i: int) -> None:
            try:
                barrier.wait()
                results[i] = work(i)
            except BaseException as error:
                errors.append(error)
            finally:
                barrier.wait()

        threads = [threading.Thread(target=body, args=(i,)) for i in range(n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    return run
