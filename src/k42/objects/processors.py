"""Processors: dense slots, each owned by one live thread.

A thread takes one at its first call on a reference and gives it back at its end; the next thread that takes
it goes on with the representatives that it finds there. So there are as many as threads ever ran at the same
time, and nothing is lost or multiplied when threads come and go. Section 2.2 of the paper.
"""

from __future__ import annotations

from k42._native import current_processor as current
from k42._native import processor_count as count

__all__ = ["count", "current"]
