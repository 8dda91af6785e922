"""What kinds of remote stores have in common: what can become of a request, and how they want to be asked."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Callable, Hashable
from typing import Protocol

from k42.vm.fr.interface import Traits

REMOTE = Traits(concurrency=16, cluster=64, read_ahead=4096, retries=4)
WHOLE = 10
"""A whole answer may take so many times as long as the pause between two pieces of it."""
_TRANSIENT_STATUS = {408, 425, 429}
_PERMANENT_5XX = {501, 505}

Put = Callable[[int, bytes | bytearray | memoryview], None]
"""Takes bytes that belong at an offset."""


class Transient(Exception):
    """What may pass when it is tried again, at the earliest after so many seconds."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class Changed(Exception):
    """It is another version now."""


class Refused(Exception):
    """What will not pass."""


class Remote(Protocol):
    """One kind of store: `open` first. All raise `Transient`, `Changed`, `Refused` or `Unsupported`."""

    traits: Traits

    def open(self) -> tuple[int, Hashable]:
        """(size, version), which later reads must be of."""

    def read(self, offset: int, length: int, put: Put) -> None:
        """Exactly this range, of the version that was opened. What was put is good only when it returns."""

    def current(self) -> tuple[int, Hashable]:
        """(size, version) now."""

    def cancel(self) -> None:
        """Ends requests that are under way."""

    def close(self) -> None:
        """Lets go of connections."""


def may_pass(status: int) -> bool:
    """Whether a request with this HTTP status may do better the next time."""
    return status in _TRANSIENT_STATUS or (status >= 500 and status not in _PERMANENT_5XX)


def retry_after(value: str) -> float:
    """Seconds that an answer asks to wait for, by its Retry-After."""
    if re.fullmatch(r"\d+", value, re.ASCII):
        return float(value)
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
