"""Hot-swapping: another implementation for a live object, behind the same references (section 2.2.1 of the paper).

First the best form in which the one can give its state and the other take it is chosen. Then calls are held up: those
of requests that run already go on, others wait. Once nobody is inside, the state is transferred, each representative
for itself and several at once, and the calls go on, on the new implementation. Whatever fails before that leaves the
object as it was.
"""

from __future__ import annotations

import math
import random
import time
from typing import Any

from k42 import _native
from k42.errors import Error, SwapRefused
from k42.objects._reference import interface_of, reference_type
from k42.objects.object import Object
from k42.objects.root import Root


def swap(ref: Any, target: type[Object], *args: Any, timeout: float = 10.0, keep: bool = False, **kwargs: Any) -> Any:
    """Give a live object another implementation.

    Calls that run finish on the old one, calls that come wait for the swap and then run on the new one; references
    stay what they are. No call is lost or repeated. The transfer of the state must not wait for other threads: calls
    that come wait for it.

    Args:
        ref: the reference.
        target: the new class; an interface of `k42.structures` stands for its default. It must have every public method
            that the references have, and one of the forms in its `transfers` must be one of the old class's.
        args, kwargs: for the `__init__` of the new root, like those of `create`.
        timeout: seconds to wait for the calls that run. New calls are held up for parts of it, one second at the most
            at once, so that calls that wait for each other get done.
        keep: return a new reference to the old object, with its state as it was. Else it is released.

    Returns:
        None, or the reference to the old object.

    Raises:
        SwapRefused: there is no common form; or the swap was called within a request of its own thread, where it would
            wait for itself; or calls did not end in time, among them perhaps generators or coroutines that nobody
            finishes, which the message names; or the transfer raised, and what it raised is the cause. The object is
            as it was.
        Destroyed: the object has been destroyed.
        TypeError: `target` is no such class.
        ValueError: `timeout` is not a number of seconds.

    What the new root's `__init__` raises passes to the caller; the object is as it was.
    """
    if not (isinstance(target, type) and issubclass(target, Object)):
        raise TypeError(f"swap() needs a class that derives from k42.Object, not {target!r}")
    if math.isnan(timeout):
        raise ValueError("timeout is a number of seconds, not NaN")
    target = target.__dict__.get("_default", target)
    old = _native.root_of(ref)
    missing = sorted(name for name in interface_of(type(ref)) if not hasattr(target, name))
    if missing:
        raise TypeError(
            f"{target.__qualname__} cannot replace {old.rep_class.__qualname__}: it has no {', '.join(missing)}"
        )
    form = _negotiate(old, target)
    new: Any = target.Root.__new__(target.Root, *args, **kwargs)
    new.rep_class = target
    new.ref = ref
    new.__init__(*args, **kwargs)
    deadline = time.monotonic() + timeout
    while True:
        switch = _begin(ref, old, max(0.0, deadline - time.monotonic()))
        try:
            if switch.root() is not old:
                old = switch.root()
                form = _negotiate(old, target)
            try:
                state = old._export(form, switch)
                try:
                    new._import(form, state, switch)
                except BaseException:
                    _native.end_root(new)
                    raise
            except NotNow as error:
                if time.monotonic() >= deadline:
                    raise SwapRefused(f"{old.rep_class.__qualname__} stays as it is: {error}") from error
            except Exception as error:
                raise SwapRefused(
                    f"{old.rep_class.__qualname__} stays as it is: the transfer of its state to {target.__qualname__} "
                    f"in the form {form!r} failed: {error}"
                ) from error
            else:
                if keep:
                    kept = _native.create_reference(reference_type(old.rep_class, Object), old)
                    switch.keep(new, kept)
                    return kept
                switch.replace(new)
                return None
        finally:
            switch.end()
        time.sleep(random.uniform(0, 0.002))  # not in step with those who come and go


class NotNow(Error):
    """What `export_state` raises where the state cannot be given at this moment: the swap tries again, in its time."""


def _negotiate(old: Root, target: type[Object]) -> str:
    """The common form that both like best: that with the least sum of places in the two lists."""
    source: type[Object] = old.rep_class
    gives, takes = source.transfers, target.transfers
    common = [form for form in gives if form in takes]
    if not common:
        raise SwapRefused(
            f"{source.__qualname__} stays as it is: it gives its state as {_listed(gives)}, "
            f"{target.__qualname__} takes {_listed(takes)}: name a common form in the `transfers` of both"
        )
    return min(common, key=lambda form: gives.index(form) + takes.index(form))


def _listed(forms: tuple[str, ...]) -> str:
    return " or ".join(repr(form) for form in forms) or "nothing"


def _begin(ref: Any, old: Root, timeout: float) -> _native.Switch:
    name = old.rep_class.__qualname__
    switch = _native.Switch(ref)
    end = time.monotonic() + timeout
    match switch.begin(timeout):
        case "quiet":
            return switch
        case "in request":
            raise SwapRefused(
                f"{name} stays as it is: swap() was called within a request, that is a call on a Clustered Object or "
                "k42.request(), or within a swap of the same object, for whose end it would have to wait: "
                "call it from outside, or from another thread"
            )
        case "busy":
            raise SwapRefused(f"{name} stays as it is: another swap of it did not end within {timeout:g} s")
    suspended = _native.suspended(ref)
    what = (
        f"generators or coroutines that nobody has finished or closed: {', '.join(suspended)}"
        if suspended
        else "calls that run, or wait for each other"
    )
    late = time.monotonic() - end
    raise SwapRefused(f"{name} stays as it is: within {timeout + max(0.0, late):.3g} s it was never left by {what}")
