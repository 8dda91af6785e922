"""`Object`: the base of the classes whose instances are representatives of Clustered Objects."""

from __future__ import annotations

from typing import Any, ClassVar, Self, cast

from k42 import _native
from k42.objects._reference import reference_type
from k42.objects.root import Root as _Root
from k42.objects.root import SharedRoot


class Object:
    """A representative of a Clustered Object; the class as a whole describes the object.

    Everyone holds the same reference, which `create` returns; each call on it reaches the representative of
    the processor that makes the call. Which one that is, the class's root decides: an inner class `Root`,
    derived from `SharedRoot` (one for all processors, the default) or `DistributedRoot` (one for each). The
    methods find it as `self.root`. `__init__` takes no arguments: it runs at the first call on a processor.

    A method that returns `self` returns the reference to its caller. The request of a generator or a coroutine lasts
    until it has ended or is closed; that of any other call until it returns. References compare and hash by identity,
    cannot be pickled, and have the attributes of the class, not those of a representative (for these see `local`).

    A representative that has a method `on_release()` gets it called once, after the object has been destroyed and
    nobody uses it any more, by the thread that owns its processor (see `destroy`). A class whose objects can be
    swapped for those of another implementation names the forms of its state in `transfers`, the best first, and has
    `export_state(form)` and `import_state(form, states)`, in its representatives, its root or both (see `swap`). None
    of these is a method of the references.

    Section 2.2 of the paper.

    >>> import k42
    >>> class Hits(k42.Object):
    ...     class Root(k42.DistributedRoot):
    ...         def __init__(self, start=0):
    ...             self.start = start
    ...     def __init__(self):
    ...         self.n = 0
    ...     def add(self, k=1):
    ...         self.n += k
    ...     def value(self):
    ...         return self.root.start + sum(r.n for r in self.root.reps())
    >>> hits = Hits.create(start=10)
    >>> hits.add()
    >>> hits.value()
    11
    >>> k42.destroy(hits)
    True
    """

    # No __slots__, as in Root: a method that reads `self.n` takes a fifth less on 3.13 without a GIL.
    Root: ClassVar[type[_Root]] = SharedRoot
    transfers: ClassVar[tuple[str, ...]] = ()
    _default: ClassVar[type[Object]]  # of an interface: the implementation that stands for it

    root: Any

    @classmethod
    def create(cls, *args: Any, **kwargs: Any) -> Self:
        """Create an object of this class: an instance of its root, and a reference to it.

        All arguments go to the root's `__init__`. Representatives are made later, by the first calls.
        Returns the reference; type checkers see the class. Raises what the root's `__init__` raises.
        Section 2.2.1 of the paper.
        """
        root = cls.Root.__new__(cls.Root, *args, **kwargs)
        root.rep_class = cls
        ref = _native.create_reference(reference_type(cls, Object), root)
        root.ref = ref
        try:
            root.__init__(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            _native.destroy(ref)
            raise
        return cast(Self, ref)
