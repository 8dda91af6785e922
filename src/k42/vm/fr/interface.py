"""What every file representative can do."""

from __future__ import annotations

import k42


class FileRepresentative(k42.Object):
    """The interface: one file, or one source of pages. Shared by all processors, and without state that changes."""

    def name(self) -> str:
        """What to call it in messages."""
        raise NotImplementedError

    def size(self) -> int:
        """Its size in bytes, as of when it was opened."""
        raise NotImplementedError

    def fill(self, memfd: int, first: int, count: int) -> None:
        """Puts `count` pages of 4 KiB, from page `first`, into the frames; zeros past the end of the file.

        Raises:
            StoreError: the file cannot be read, or is shorter than when it was opened.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of the file."""
        raise NotImplementedError
