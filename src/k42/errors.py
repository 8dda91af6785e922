"""The exceptions of k42: one small tree under `Error`. Each message says what happened and what to do."""

from __future__ import annotations


class Error(Exception):
    """The root of every exception that k42 defines."""


class Destroyed(Error, ReferenceError):
    """A call on a Clustered Object that has been destroyed."""


class SwapRefused(Error):
    """A swap that did not happen: the object is as it was. The message says what was in the way."""


class PoolExhausted(Error):
    """All items of a pool are taken, and it may not make more."""


class GateClosed(Error):
    """A request at a gate that has been shut down."""
