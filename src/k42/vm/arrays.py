"""numpy arrays whose memory is a mapping: `memmap` as `numpy.memmap`, `load` as ``numpy.load`` with ``mmap_mode``.

Needs numpy (``pip install k42[numpy]``).
"""

from __future__ import annotations

import ast
import math
import operator
import os
from collections.abc import Mapping as Mapping_
from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex, cast

from k42.vm import client as client_module
from k42.vm.client import Client, OpenMode
from k42.vm.errors import Unsupported
from k42.vm.mapping import Mapping

try:
    import numpy
except ImportError as error:
    raise Unsupported("k42.vm.memmap and k42.vm.load need numpy: pip install 'k42[numpy]'") from error

_SYNONYMS = {"readonly": "r", "copyonwrite": "c", "readwrite": "r+", "write": "w+"}
_MODES = ("r", "c", "r+", "w+")


class memmap(numpy.memmap[Any, Any]):
    """An array in a file or behind a URL: `numpy.memmap` with k42's page cache, budget, stores and write-back.

    An instance of `numpy.memmap`, with the same arguments, attributes and behaviour (results of arithmetic are plain
    arrays, pickles carry the data), except that

    - it may be given a URL;
    - what was written reaches the file with `flush`, or when the last array of the mapping has gone and the kernel
      finds the time: until then other programs read the file as it was (other users of k42 see it at once);
    - the mapping cannot be closed under an array: that raises BufferError.

    Args:
        filename: a path, a URL (``scheme://…``), or an open file that has a name.
        dtype: of the elements.
        mode: ``"r"`` or ``"readonly"``; ``"r+"`` or ``"readwrite"``: the file grows where it is too short; ``"w+"`` or
            ``"write"``: made anew, needs a shape; ``"c"`` or ``"copyonwrite"``: writable, but changes stay in memory.
        offset: of the first element in the file, in bytes.
        shape: None: as many elements as there are from `offset` to the end, in one dimension.
        order: ``"C"`` or ``"F"``.
        page_size, storage_options: see `Client.open`.
        client: through which kernel; None: the user's own.

    Raises:
        ValueError: a mode that is none, no shape in mode ``"w+"``, data that is not a multiple of the element's size;
            and what `Client.open` raises.
    """

    _mmap: Mapping | None
    filename: Any

    def __new__(
        cls,
        filename: Any,
        dtype: Any = numpy.uint8,
        mode: str = "r+",
        offset: int = 0,
        shape: int | Sequence[int] | None = None,
        order: Literal["C", "F"] = "C",
        *,
        page_size: int | None = None,
        storage_options: Mapping_[str, Any] | None = None,
        client: Client | None = None,
    ) -> memmap:
        """See the class."""
        mode = _SYNONYMS.get(mode, mode)
        if mode not in _MODES:
            raise ValueError(f"mode must be one of {[*_MODES, *_SYNONYMS]!r} (got {mode!r})")
        if mode == "w+" and shape is None:
            raise ValueError("shape must be given if mode == 'w+'")
        opener = client_module.open if client is None else client.open
        store, name = _store_and_name(filename)
        if hasattr(filename, "read") and hasattr(filename, "flush"):
            filename.flush()  # what its owner has written
        opened = cast("OpenMode", "r+" if mode == "w+" and hasattr(filename, "read") else mode)
        options: dict[str, Any] = {"page_size": page_size, "storage_options": storage_options}
        element = numpy.dtype(dtype)
        if shape is None:
            mapping = opener(store, opened, offset, None, **options)
            elements, rest = divmod(len(mapping), element.itemsize)
            if rest:
                mapping.close()
                raise ValueError("Size of available data is not a multiple of the data-type size.")
            return cls._of(mapping, element, mode, offset, (elements,), order, name)
        extent = _extent(shape)
        nbytes = math.prod(extent) * element.itemsize
        # A mapping has at least one byte, an array need not.
        before = 1 if nbytes == 0 and offset else 0
        mapping = opener(store, opened, offset - before, before or max(1, nbytes), **options)
        return cls._of(mapping, element, mode, offset, extent, order, name, before)

    @classmethod
    def _of(
        cls,
        mapping: Mapping,
        dtype: numpy.dtype[Any],
        mode: str,
        offset: int,
        shape: tuple[int, ...],
        order: Literal["C", "F"],
        name: Any,
        skip: int = 0,
    ) -> memmap:
        """The array in a mapping, from its byte `skip` on."""
        # By way of a plain array, whose buffer keeps the mapping from being closed; an array made on the mapping itself
        # would not.
        memory = numpy.frombuffer(memoryview(mapping), numpy.uint8)
        self = numpy.ndarray.__new__(cls, shape, dtype, memory, skip, None, order)
        self._mmap, self.filename, self.offset, self.mode = mapping, name, offset, mode
        return self

    def flush(self) -> None:
        """Returns when what was written to the mapping is in the store; nothing to do in modes ``"r"`` and ``"c"``.

        Raises:
            StoreError: what the store raised.
            KernelUnavailable: the kernel is gone.
        """
        if self._mmap is not None:
            self._mmap.flush()

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        """Results are scalars and plain arrays, not in the file."""
        array = numpy.ndarray.__array_wrap__(self, array, context)
        if self is array or type(self) is not memmap:
            return array
        return array[()] if return_scalar else array.view(numpy.ndarray)

    def __getitem__(self, index: Any) -> Any:
        """Views are of the mapping; copies are plain arrays."""
        result = super().__getitem__(index)
        if type(result) is memmap and result._mmap is None:
            return result.view(numpy.ndarray)
        return result


def _store_and_name(filename: Any) -> tuple[Any, Any]:
    """What to open, and what the array says it was made from."""
    if hasattr(filename, "read"):
        name = getattr(filename, "name", None)
        if not isinstance(name, str | os.PathLike):
            # Such as TemporaryFile(): no name leads to it, but the descriptor does.
            return f"/proc/self/fd/{filename.fileno()}", None
        return name, os.path.abspath(name)
    if isinstance(filename, os.PathLike):
        path = os.fspath(filename)
        return filename, filename.resolve() if hasattr(filename, "resolve") else os.path.abspath(path)
    if client_module.is_url(filename):
        return filename, filename
    return filename, os.path.abspath(filename)


def _extent(shape: int | SupportsIndex | Sequence[int]) -> tuple[int, ...]:
    if isinstance(shape, Sequence):
        return tuple(operator.index(length) for length in shape)
    return (operator.index(shape),)


def load(
    filename: str | os.PathLike[str],
    mmap_mode: Literal["r", "r+", "c"] | None = "r",
    *,
    max_header_size: int = 10000,
    page_size: int | None = None,
    storage_options: Mapping_[str, Any] | None = None,
    client: Client | None = None,
) -> numpy.ndarray[Any, Any]:
    """The array in a ``.npy`` file, at a path or a URL; its header is read through the mapping.

    Args:
        filename: a path or a URL.
        mmap_mode: as of ``numpy.load``: ``"r"``, ``"r+"`` or ``"c"``, see `memmap`; None: a plain array in memory.
        max_header_size: how many bytes of header are trusted; see ``numpy.load``.
        page_size, storage_options: see `Client.open`.
        client: through which kernel; None: the user's own.

    Raises:
        ValueError: not a ``.npy`` file, or shorter than its header says; Python objects, which are never unpickled;
            a mode that is none; and what `Client.open` raises.
    """
    if mmap_mode not in ("r", "r+", "c", None):
        raise ValueError(f"mmap_mode must be 'r', 'r+', 'c' or None, not {mmap_mode!r}")
    mode: Literal["r", "r+", "c"] = mmap_mode or "r"
    opener = client_module.open if client is None else client.open
    mapping = opener(filename, mode, page_size=page_size, storage_options=storage_options)
    try:
        array = _array_in(mapping, mode, filename, max_header_size)
    except BaseException:
        mapping.close()
        raise
    if mmap_mode is not None:
        return array
    copy = numpy.array(array, subok=False, order="K")
    del array
    mapping.close()
    return copy


def _array_in(mapping: Mapping, mode: str, filename: Any, max_header_size: int) -> memmap:
    start = mapping[:6]
    if start != b"\x93NUMPY":
        what = "an archive of arrays (.npz), whose members cannot be mapped" if start[:2] == b"PK" else "no .npy file"
        raise ValueError(f"{mapping.name} is {what}")
    version = numpy.lib.format.read_magic(mapping)
    if version == (1, 0):
        shape, fortran_order, dtype = numpy.lib.format.read_array_header_1_0(mapping, max_header_size=max_header_size)
    elif version == (2, 0):
        shape, fortran_order, dtype = numpy.lib.format.read_array_header_2_0(mapping, max_header_size=max_header_size)
    elif version == (3, 0):
        shape, fortran_order, dtype = _read_header_3_0(mapping, max_header_size)
    else:
        raise ValueError(f"{mapping.name} is of .npy version {version}, which is not known here")
    if dtype.hasobject:
        raise ValueError(f"{mapping.name} holds Python objects (pickles), which cannot be mapped and are not loaded")
    skip = mapping.tell()
    if math.prod(shape) * dtype.itemsize > len(mapping) - skip:
        raise ValueError(f"{mapping.name} is too short: its array has {shape} elements of {dtype.itemsize} bytes")
    name = _store_and_name(filename)[1]
    return memmap._of(mapping, dtype, mode, skip, shape, "F" if fortran_order else "C", name, skip)


def _read_header_3_0(mapping: Mapping, max_header_size: int) -> tuple[tuple[int, ...], bool, numpy.dtype[Any]]:
    """As version 2.0, but in UTF-8; numpy reads it, but with no public function."""
    size = int.from_bytes(mapping.read(4), "little")
    if size > max_header_size:
        raise ValueError(f"the header of {mapping.name} has {size} bytes, more than the {max_header_size} trusted")
    header = ast.literal_eval(mapping.read(size).decode())
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError(f"{mapping.name} has no proper .npy header")
    return _extent(header["shape"]), bool(header["fortran_order"]), numpy.lib.format.descr_to_dtype(header["descr"])
