"""What goes from object to object when a page is touched that is not mapped."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A page fault of a client."""

    cpu: int
    """Index of the CPU whose window was touched."""
    address: int
    """The page's address in that window."""
    canonical: int
    """The same page in the region's own addresses."""
    write: bool = False
    """Whether it wants to write."""
    tracked: bool = False
    """Whether the region tracks writes; the region knows."""
