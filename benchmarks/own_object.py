"""Measures the steps of docs/own-object.md: the code is taken from the page, so that they cannot differ.

Run it with the interpreter in question: ``.venv/bin/python benchmarks/own_object.py``. Each figure is the median of
interleaved rounds: the time of a call of `record`, in ns, by one thread and by two at once (the slower one's), and how
throughput grew. Keep the machine quiet: what threads wait for each other is part of it.
"""

from __future__ import annotations

import re
import statistics
import sysconfig
import threading
import time
from pathlib import Path
from typing import Any

CALLS = 100_000
ROUNDS = 11
PAGE = Path(__file__).parents[1] / "docs" / "own-object.md"


def steps() -> dict[str, Any]:
    """The title of each step, and the object that its code has made."""
    made = {}
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.M):
        for code in re.findall(r"^```python\n(.*?)^```", section, re.M | re.S):
            names: dict[str, Any] = {"__name__": "page"}
            exec(code, names)
            made[section.splitlines()[0]] = names["latencies"]
    return made


def time_per_call(latencies: Any, threads: int) -> float:
    """ns a call: the slowest thread's."""
    start, times = threading.Barrier(threads), []

    def body() -> None:
        target = latencies
        start.wait()
        began = time.perf_counter()
        for _ in range(CALLS):
            target.record(1.0)
        times.append(time.perf_counter() - began)

    workers = [threading.Thread(target=body) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(times) / CALLS * 1e9


def main() -> None:
    """Measures and prints a table."""
    objects = steps()
    figures: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for title, latencies in objects.items():
            for threads in (1, 2):
                figures.setdefault((title, threads), []).append(time_per_call(latencies, threads))
    gil = "without a GIL" if sysconfig.get_config_var("Py_GIL_DISABLED") else "with a GIL"
    print(f"| Python {sysconfig.get_python_version()} {gil} | 1 thread, ns | 2 threads, ns | scaling |")
    print("| --- | --- | --- | --- |")
    for title in objects:
        one, two = (statistics.median(figures[title, threads]) for threads in (1, 2))
        print(f"| {title} | {one:.0f} | {two:.0f} | {2 * one / two:.2f} |")


if __name__ == "__main__":
    main()
