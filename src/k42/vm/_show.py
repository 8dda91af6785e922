"""What a kernel counts, as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table

from k42.vm.protocol import text_of


def tables(stat: dict[str, Any]) -> Group:
    """The counts that `k42.vm.Client.stat` returns."""
    frames = stat["frames"]
    kernel = Table(title=f"kernel {stat['pid']}, k42 {stat['version']}")
    kinds = ("budget", "file", "reserved", "overcommitted")
    for name in kinds:
        kernel.add_column(name, justify="right")
    kernel.add_row(*(size(frames[name]) for name in kinds))
    clients = Table(title="clients: what they have in memory")
    for name in ("pid", "mappings", "resident", "share", "limit"):
        clients.add_column(name, justify="right")
    for client in stat["clients"]:
        counts = (size(client["used"]), size(client["share"]), size(client["limit"]))
        clients.add_row(str(client["pid"]), str(client["regions"]), *counts)
    files = Table(title="files")
    files.add_column("name", overflow="fold")
    for name in ("resident", "dirty", "filled", "evicted", "written"):
        files.add_column(name, justify="right")
    for file in stat["files"]:
        pages = (size(file["resident"]), size(file["dirty"]))
        files.add_row(str(file["name"]), *pages, *(str(file[name]) for name in ("filled", "evicted", "written")))
    return Group(kernel, clients, files)


def size(pages: int | None) -> str:
    """So many pages, as text; a dash where there is no number."""
    return "-" if pages is None else text_of(pages)
