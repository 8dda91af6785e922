"""What can go wrong in the virtual memory system."""

from __future__ import annotations

from k42.errors import Error


class Unsupported(Error, NotImplementedError):
    """This system, or this version of k42, cannot do what was asked; the message says what would."""


class KernelUnavailable(Error, ConnectionError):
    """No kernel process answers: not running, died, of another version, or of another user."""


class OutOfFrames(Error, MemoryError):
    """The kernel's budget has no room for the memory asked for."""


class StoreError(Error, OSError):
    """A store (a file) could not be read, or was shorter than when it was opened."""


class ProtocolError(Error):
    """The other side of a connection said something that makes no sense."""


class UserModeOnlyWarning(UserWarning):
    """Faults from within system calls cannot be served: ``read(2)`` into an absent page fails with EFAULT."""
