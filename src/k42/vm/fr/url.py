"""The FR of what a URL names: read in ranges, each of which must belong to the version first opened.

What tells versions apart:
    ``http``, ``https`` (`k42.vm.fr._http`): the ETag, else Last-Modified, and the total size of each single response; a
    strong ETag is demanded by ``If-Match`` besides.
    ``s3`` (`k42.vm.fr._s3`): the ETag, by ``IfMatch``, and that of each response.
    All others, through fsspec: what ``info()`` says (size, times, checksums); asked again after each read, for archives
    (``zip://member::URL``) of the archive, too.
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import k42
from k42.vm.errors import StoreError, Unsupported
from k42.vm.fr import _frames
from k42.vm.fr._remote import REMOTE, Changed, Put, Refused, Remote, Transient
from k42.vm.fr.interface import FileRepresentative, Traits
from k42.vm.protocol import PAGE

T = TypeVar("T")

_OTHER = Traits(concurrency=4, cluster=64, read_ahead=1024, retries=2)
_ARCHIVE = Traits(concurrency=1, cluster=256, read_ahead=1024, retries=2)  # a member is unpacked from its start
_ARCHIVES = {"zip", "tar", "libarchive"}
_LONGEST_PAUSE = 60.0  # seconds, whatever a server asks for
# What in info() changes with the content; compared without case and underscores.
_MARKS = {
    "etag", "mtime", "modified", "lastmodified", "modificationtime", "modify", "updated", "generation", "versionid",
    "checksum", "crc", "crc32", "md5", "md5hash", "sha", "sha1", "sha256", "hash", "contenthash",
}  # fmt: skip
_NO_MARKS = {"atime", "lastaccess", "accesstime", "accessed", "nlink"}  # change without it


class _Any:
    """Whatever else fsspec knows."""

    def __init__(self, fs: Any, path: str, traits: Traits, base: Remote | None) -> None:
        self.fs = fs
        self.path = path
        self.traits = traits
        self.base = base  # what an archive lies in
        self.version: tuple[int, Hashable] | None = None
        self._cancelled = False

    def open(self) -> tuple[int, Hashable]:
        self.version = self.current()
        return self.version

    def read(self, offset: int, length: int, put: Put) -> None:
        if self._cancelled:
            raise Refused("it is being closed")
        data: bytes = self._call(self.fs.cat_file, self.path, start=offset, end=offset + length)
        # As it was when it was opened, and is so now: it was so all the time.
        if self.current() != self.version:
            raise Changed
        if len(data) != length:
            raise Refused(f"asked for {length} bytes, it gave {len(data)}")
        put(offset, data)

    def current(self) -> tuple[int, Hashable]:
        base = self.base.current() if self.base is not None else None
        self.fs.invalidate_cache()
        info = self._call(self.fs.info, self.path)
        if info.get("type") == "directory":
            raise Refused("it is a folder")
        if not isinstance(info.get("size"), int):
            raise Unsupported(f"{plain(self.path)}: the store does not say how large it is")
        known = {key.lower().replace("_", ""): value for key, value in info.items()}
        marks = {key: repr(value) for key, value in known.items() if key not in _NO_MARKS and _is_plain(value)}
        if not _MARKS & marks.keys():
            try:
                marks["modified"] = repr(self._call(self.fs.modified, self.path))
            except Refused:
                if base is None:
                    raise Unsupported(
                        f"{plain(self.path)}: the store says nothing by which a change of it could be noticed"
                    ) from None
        return info["size"], (base, tuple(sorted(marks.items())))

    def cancel(self) -> None:
        self._cancelled = True
        if self.base is not None:
            self.base.cancel()

    def close(self) -> None:
        self.cancel()
        if self.base is not None:
            self.base.close()

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except (ConnectionError, TimeoutError) as error:
            raise Transient(f"{type(error).__name__}: {error}") from error
        except Exception as error:  # of any library
            raise Refused(f"{type(error).__name__}: {error}") from error


def _is_plain(value: object) -> bool:
    return isinstance(value, (str, bytes, int, float, tuple)) or hasattr(value, "isoformat")


def _remote(url: str, options: dict[str, Any], own: dict[str, Any]) -> Remote:
    """The store of a URL; `own`: traits that the user asks for."""
    scheme = url.split(":", 1)[0]
    if scheme in ("http", "https") and "::" not in url:
        from k42.vm.fr._http import Http  # http.client, and with it ssl, which take their time to import

        others = {name for name, value in options.items() if isinstance(value, dict)} - {"headers"}  # of a chain
        given = {name: value for name, value in options.items() if name not in others}
        return Http(url, given | options.get(scheme, {}), replace(REMOTE, **own))
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise Unsupported(f"{plain(url)} needs fsspec: pip install 'k42[url]'") from error
    base = None
    if "::" in url:
        rest = url.split("::", 1)[1]
        base = _remote(rest, {key: value for key, value in options.items() if isinstance(value, dict)}, own)
        try:
            base.open()  # before the archive is
        except BaseException:
            base.close()
            raise
    options = copy.deepcopy(options)  # fsspec changes what it is given
    if url.startswith(("s3://", "s3a://")):
        limit = replace(REMOTE, **own).timeout
        patience = {"retries": {"max_attempts": 0}, "connect_timeout": limit, "read_timeout": limit}
        options["config_kwargs"] = patience | options.get("config_kwargs", {})
    try:
        # An instance of our own: others know what was there before.
        fs, path = url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError as error:
        extra = "s3" if plain(url).startswith("s3") else "url"
        raise Unsupported(f"{plain(url)}: {error}; pip install 'k42[{extra}]', or what it names") from error
    except (ConnectionError, TimeoutError) as error:
        raise Transient(f"{type(error).__name__}: {error}") from error
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    if type(fs).__name__ == "S3FileSystem":
        from k42.vm.fr._s3 import S3  # asyncio, which takes its time to import

        return S3(fs, path, replace(REMOTE, **own))
    protocol = url.split("://", 1)[0]
    return _Any(fs, path, replace(_ARCHIVE if protocol in _ARCHIVES else _OTHER, **own), base)


class UrlFR(FileRepresentative):
    """Reads what a URL names. Read-only: such stores write whole objects, not pages.

    Args of ``create``:
        url: as fsspec understands it, chained (``zip://member::https://…``) or not.
        options: what fsspec gets, such as ``headers`` for http, or ``key``, ``secret``, ``endpoint_url`` for s3. Of
            ``k42`` in it, the `Traits` by name that shall be others than this kind of store has.

    Raises:
        StoreError: it is not there, or cannot be opened.
        Unsupported: a library is missing, which the message names; or the store cannot read parts, or cannot tell one
            version from another.
    """

    class Root(k42.SharedRoot):
        """Holds the store, and the size and the version that were opened."""

        def __init__(self, url: str, options: Mapping[str, Any]) -> None:
            self.name = plain(url)
            self.cancelled = threading.Event()
            given = dict(options)
            own = given.pop("k42", {})
            first = replace(REMOTE, **own)

            def connect() -> tuple[Remote, int, Hashable]:
                remote = _remote(url, given, own)
                try:
                    return remote, *remote.open()
                except BaseException:
                    remote.close()
                    raise

            self.remote, self.size, self.version = self.attempt(connect, None, first)

        def attempt(self, call: Callable[[], T], offset: int | None, traits: Traits) -> T:
            """Calls, again after errors that may pass, and says what is wrong in our words."""
            for n in range(traits.retries + 1):
                try:
                    return call()
                except Transient as error:
                    if n == traits.retries or self.cancelled.is_set():
                        raise StoreError(f"{error} ({n + 1} attempts)", url=self.name, offset=offset) from error
                    # Spread, so that those that failed together do not come again together.
                    pause = max(error.after, traits.backoff * 2**n * random.uniform(0.75, 1.25))
                    self.cancelled.wait(min(pause, _LONGEST_PAUSE))
                except Changed as error:
                    raise StoreError("it changed since it was opened", url=self.name, offset=offset) from error
                except Refused as error:
                    raise StoreError(str(error), url=self.name, offset=offset) from error
            raise AssertionError

    root: Root

    def name(self) -> str:
        """The URL, without passwords."""
        return self.root.name

    def size(self) -> int:
        """Its size in bytes when it was opened."""
        return self.root.size

    def version(self) -> Hashable:
        """What the store said of it when it was opened: size, ETag, times."""
        return self.root.version

    def changed(self) -> bool:
        """Asks the store; see `FileRepresentative.changed`."""
        root = self.root
        try:
            return root.attempt(root.remote.current, None, root.remote.traits)[1] != root.version
        except StoreError as error:
            if isinstance(error.__cause__, Changed):
                return True
            raise

    def traits(self) -> Traits:
        """By the kind of store."""
        return self.root.remote.traits

    def read_range(self, offset: int, length: int) -> bytearray:
        """Bytes of the version that was opened; see `FileRepresentative.read_range`."""
        data = bytearray(length)

        def put(at: int, piece: bytes | bytearray | memoryview) -> None:
            data[at - offset : at - offset + len(piece)] = piece

        self._read(offset, length, put)
        return data

    def _read(self, offset: int, length: int, put: Put) -> None:
        root = self.root
        root.attempt(lambda: root.remote.read(offset, length, put), offset, root.remote.traits)

    def fill(self, memfd: int, first: int, count: int) -> None:
        """Reads a range; see `FileRepresentative.fill`."""
        offset, end = first * PAGE, (first + count) * PAGE
        length = max(0, min(end, self.root.size) - offset)
        if length:
            self._read(offset, length, lambda at, piece: _frames.put(memfd, at, piece))
        _frames.put_zeros(memfd, offset + length, end)

    def cancel(self) -> None:
        """Ends requests that are under way; see `FileRepresentative.cancel`."""
        self.root.cancelled.set()
        self.root.remote.cancel()

    def close(self) -> None:
        """Lets go of connections."""
        self.root.remote.close()


def plain(url: str) -> str:
    """A URL without the password that may stand in it."""
    parts = []
    for part in url.split("::"):
        split = urlsplit(part)
        if "@" in split.netloc and ":" in split.netloc.split("@")[0]:
            user, host = split.netloc.split(":", 1)[0], split.netloc.rsplit("@", 1)[1]
            part = urlunsplit(split._replace(netloc=f"{user}:***@{host}"))
        parts.append(part)
    return "::".join(parts)
