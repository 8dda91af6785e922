"""What can go wrong in the virtual memory system."""

from __future__ import annotations

import errno as _errno

from k42.errors import Error


class Unsupported(Error, NotImplementedError):
    """This system, or this version of k42, cannot do what was asked; the message says what would."""


class KernelUnavailable(Error, ConnectionError):
    """No kernel process answers: not running, died, of another version, or of another user."""


class OutOfFrames(Error, MemoryError):
    """The kernel's budget has no room for the memory asked for."""


class StoreError(Error, OSError):
    """A store (a file, a URL, swap space) could not be read or written, or is not what it was when it was opened.

    Args:
        reason: what went wrong.
        url: the store's name: a path or a URL.
        offset: where in it, in bytes; None: no place in particular.
        errno: of Linux, where it was Linux that refused; None: it was not.

    Attributes:
        reason, url, offset, errno: as given.
    """

    def __init__(self, reason: str, *, url: str = "", offset: int | None = None, errno: int | None = None) -> None:
        place = ", ".join([url] * bool(url) + [f"offset {offset}"] * (offset is not None))
        code = f" ({_errno.errorcode.get(errno, f'errno {errno}')})" if errno is not None else ""
        super().__init__(f"{place}: {reason}{code}" if place else f"{reason}{code}")
        self.reason, self.url, self.offset, self.errno = reason, url, offset, errno

    @classmethod
    def of(cls, error: OSError, url: str, offset: int | None = None) -> StoreError:
        """What Linux said, of a store; to be raised from `error`."""
        return cls(error.strerror or str(error), url=url, offset=offset, errno=error.errno)

    def __reduce__(self) -> tuple[object, ...]:
        return _store_error, (type(self), self.reason, self.url, self.offset, self.errno)


def _store_error(type_: type[StoreError], reason: str, url: str, offset: int | None, errno: int | None) -> StoreError:
    return type_(reason, url=url, offset=offset, errno=errno)


class ProtocolError(Error):
    """The other side of a connection said something that makes no sense."""


class ForkWarning(RuntimeWarning):
    """A forked child does not have what ``connect(fork="reattach")`` would have opened for it; the message says why."""


class UserModeOnlyWarning(UserWarning):
    """Faults from within system calls cannot be served: ``read(2)`` into an absent page fails with EFAULT."""
