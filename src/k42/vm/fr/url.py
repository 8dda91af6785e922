"""The FR of what a URL names: read in ranges through fsspec, each of which must belong to the version first opened.

What tells versions apart:
    ``http``, ``https``: the ETag, else Last-Modified, and the total size of each single response; a strong ETag is
    demanded by ``If-Match`` besides. fsspec's own ``cat_file`` looks at none of these, nor at Content-Range, and takes
    any status below 400 for the range; so only its session is used.
    ``s3``: the ETag, by ``IfMatch``, and that of each response.
    All others: what ``info()`` says (size, times, checksums); asked again after each read, for archives
    (``zip://member::URL``) of the archive, too.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import email.utils
import random
import re
import threading
import time
from collections.abc import Callable, Coroutine, Hashable, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

import k42
from k42.vm.errors import StoreError, Unsupported
from k42.vm.fr import _frames
from k42.vm.fr.interface import FileRepresentative, Traits
from k42.vm.protocol import PAGE

T = TypeVar("T")

_REMOTE = Traits(concurrency=16, cluster=64, read_ahead=2048, retries=4)
_OTHER = Traits(concurrency=4, cluster=64, read_ahead=1024, retries=2)
_ARCHIVE = Traits(concurrency=1, cluster=256, read_ahead=1024, retries=2)  # a member is unpacked from its start
_ARCHIVES = {"zip", "tar", "libarchive"}
_LONGEST_PAUSE = 60.0  # seconds, whatever a server asks for
_WHOLE = 10  # a whole answer may take so many times as long as the pause between two pieces of it
_TRANSIENT_STATUS = {408, 425, 429}
_PERMANENT_5XX = {501, 505}
# What in info() changes with the content; compared without case and underscores.
_MARKS = {
    "etag", "mtime", "modified", "lastmodified", "modificationtime", "modify", "updated", "generation", "versionid",
    "checksum", "crc", "crc32", "md5", "md5hash", "sha", "sha1", "sha256", "hash", "contenthash",
}  # fmt: skip
_NO_MARKS = {"atime", "lastaccess", "accesstime", "accessed", "nlink"}  # change without it


class _Transient(Exception):
    """What may pass when it is tried again, at the earliest after so many seconds."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class _Changed(Exception):
    """It is another version now."""


class _Refused(Exception):
    """What will not pass."""


class _Remote(Protocol):
    """One kind of store: `open` first. All raise `_Transient`, `_Changed`, `_Refused` or `Unsupported`."""

    traits: Traits

    def open(self) -> tuple[int, Hashable]:
        """(size, version), which later reads must be of."""

    def read(self, offset: int, length: int) -> bytes | bytearray:
        """Exactly this range, of the version that was opened."""

    def current(self) -> tuple[int, Hashable]:
        """(size, version) now."""

    def cancel(self) -> None:
        """Ends requests that are under way."""

    def close(self) -> None:
        """Lets go of connections."""


class _OnLoop:
    """Requests of coroutines, which run on fsspec's own thread."""

    def __init__(self, fs: Any, traits: Traits) -> None:
        self.fs = fs
        self.traits = traits
        self._lock = threading.Lock()  # protects `_pending` and `_cancelled`
        self._pending: set[concurrent.futures.Future[Any]] = set()
        self._cancelled = False

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._cancelled:
                coroutine.close()
                raise _Refused("it is being closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self.fs.loop)
            self._pending.add(future)
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise _Refused("it is being closed") from error
        finally:
            with self._lock:
                self._pending.discard(future)

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            for future in self._pending:
                future.cancel()

    def close(self) -> None:
        self.cancel()


class _Http(_OnLoop):
    def __init__(self, fs: Any, url: str, traits: Traits) -> None:
        super().__init__(fs, traits)
        self.url = url
        self.version: tuple[int, str, str] | None = None

    def open(self) -> tuple[int, Hashable]:
        self.version = self._run(self._probe())
        return self.version[0], self.version

    def current(self) -> tuple[int, Hashable]:
        now = self._run(self._probe())
        return now[0], now

    def read(self, offset: int, length: int) -> bytearray:
        return self._run(self._get(offset, length))

    def close(self) -> None:
        super().close()
        if self.fs._session is not None:
            self.fs.close_session(self.fs.loop, self.fs._session)

    async def _request(self, first: int, last: int, take: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
        import aiohttp

        options = dict(self.fs.kwargs)
        headers = {**options.pop("headers", {}), "Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
        if self.version is not None and self.version[1].startswith('"'):
            headers["If-Match"] = self.version[1]
        limit = self.traits.timeout
        options["timeout"] = aiohttp.ClientTimeout(total=_WHOLE * limit, sock_connect=limit, sock_read=limit)
        session = await self.fs.set_session()
        try:
            async with session.get(self.fs.encode_url(self.url), headers=headers, **options) as response:
                return await take(response)
        except (aiohttp.ClientSSLError, aiohttp.InvalidURL, aiohttp.TooManyRedirects) as error:
            raise _Refused(f"{type(error).__name__}: {error}") from error
        except TimeoutError as error:
            raise _Transient(f"no answer within {limit:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _Transient(f"{type(error).__name__}: {error}") from error

    async def _probe(self) -> tuple[int, str, str]:
        """(size, ETag, Last-Modified). Not by HEAD, of which servers say less, and not always the same."""

        async def take(response: Any) -> tuple[int, str, str]:
            if response.status == 416 and response.headers.get("Content-Range", "").replace(" ", "") == "bytes*/0":
                return 0, response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
            if response.status == 412:
                raise _Changed
            if response.status == 200:
                raise Unsupported(f"{plain(self.url)}: its server gives no parts of it (ranges): download it")
            _, _, total = self._range_of(response)
            return total, response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")

        size, etag, modified = await self._request(0, 0, take)
        if size and not etag and not modified:
            raise Unsupported(
                f"{plain(self.url)}: its server says neither ETag nor Last-Modified, so that a change of it in the "
                "middle could not be noticed: download it"
            )
        return size, etag, "" if etag else modified

    async def _get(self, offset: int, length: int) -> bytearray:
        assert self.version is not None
        size, etag, modified = self.version

        async def take(response: Any) -> bytearray:
            if response.status in (412, 416):
                raise _Changed
            first, last, total = self._range_of(response)
            if total != size or response.headers.get("ETag", "") != etag:
                raise _Changed
            if not etag and response.headers.get("Last-Modified", "") != modified:
                raise _Changed
            if (first, last) != (offset, offset + length - 1):
                raise _Refused(f"asked for bytes {offset}-{offset + length - 1}, the server gave {first}-{last}")
            if response.content_length not in (None, length):
                raise _Refused(f"the server gave {response.content_length} bytes for a range of {length}")
            data = bytearray(length)
            done = 0
            async for piece in response.content.iter_any():
                if done + len(piece) > length:
                    raise _Refused(f"the server gave more than the {length} bytes of the range")
                data[done : done + len(piece)] = piece
                done += len(piece)
            if done < length:
                raise _Transient(f"the answer ended after {done} of {length} bytes")
            return data

        return await self._request(offset, offset + length - 1, take)

    def _range_of(self, response: Any) -> tuple[int, int, int]:
        """(first, last, total) of an answer that is a range, and of the bytes themselves."""
        status = response.status
        if status in _TRANSIENT_STATUS or (status >= 500 and status not in _PERMANENT_5XX):
            raise _Transient(f"HTTP status {status} {response.reason}", _retry_after(response.headers))
        if status == 200:
            raise _Refused("the server gave all of it when asked for a part")
        if status != 206:
            raise _Refused(f"HTTP status {status} {response.reason}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise _Refused("the server encodes what it gives, though asked not to")
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""), re.ASCII)
        if found is None:
            raise _Refused(f"the server gave a range {response.headers.get('Content-Range')!r}: of what size?")
        first, last, total = map(int, found.groups())
        return first, last, total


def _retry_after(headers: Mapping[str, str]) -> float:
    value = headers.get("Retry-After", "")
    if re.fullmatch(r"\d+", value, re.ASCII):
        return float(value)
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0


class _S3(_OnLoop):
    def __init__(self, fs: Any, path: str, traits: Traits) -> None:
        super().__init__(fs, traits)
        self.bucket, self.key, self.version_id = fs.split_path(path)
        fs.retries = 1  # retries are ours, not those of s3fs or botocore
        self.version: tuple[int, str] | None = None

    def open(self) -> tuple[int, Hashable]:
        self.version = self._run(self._head())
        return self.version[0], self.version

    def current(self) -> tuple[int, Hashable]:
        now = self._run(self._head())
        return now[0], now

    def read(self, offset: int, length: int) -> bytes:
        return self._run(self._get(offset, length))

    def _object(self) -> dict[str, str]:
        chosen = {"Bucket": self.bucket, "Key": self.key}
        return chosen | ({"VersionId": self.version_id} if self.version_id else {})

    async def _head(self) -> tuple[int, str]:
        answer = await self._call("head_object", **self._object())
        return int(answer["ContentLength"]), str(answer["ETag"])

    async def _get(self, offset: int, length: int) -> bytes:
        assert self.version is not None
        size, etag = self.version
        last = offset + length - 1
        answer = await self._call("get_object", **self._object(), Range=f"bytes={offset}-{last}", IfMatch=etag)
        try:
            data: bytes = await asyncio.wait_for(answer["Body"].read(), _WHOLE * self.traits.timeout)
        except Exception as error:
            raise _s3_error(error) from error
        finally:
            answer["Body"].close()
        if answer["ETag"] != etag:
            raise _Changed
        if answer.get("ContentRange") != f"bytes {offset}-{last}/{size}" or len(data) != length:
            raise _Refused(f"asked for bytes {offset}-{last}, it gave {answer.get('ContentRange')}, {len(data)} bytes")
        return data

    async def _call(self, method: str, **arguments: Any) -> Any:
        try:
            return await asyncio.wait_for(
                self.fs._call_s3(method, self.fs.kwargs, **arguments), _WHOLE * self.traits.timeout
            )
        except Exception as error:
            raise _s3_error(error) from error


def _s3_error(error: Exception) -> Exception:
    """What of s3fs, botocore or aiohttp this is."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status in (412, 416):
            return _Changed()
        if status in _TRANSIENT_STATUS or (status >= 500 and status not in _PERMANENT_5XX):
            return _Transient(str(error), _retry_after(response["ResponseMetadata"].get("HTTPHeaders", {})))
        return _Refused(f"{type(error).__name__}: {error}")
    from botocore import exceptions  # type: ignore[import-untyped]

    passing = (exceptions.HTTPClientError, exceptions.ConnectionError, ConnectionError, TimeoutError)
    if isinstance(error, passing) or "Payload" in type(error).__name__:
        return _Transient(f"{type(error).__name__}: {error}")
    return _Refused(f"{type(error).__name__}: {error}")


class _Any:
    """Whatever else fsspec knows."""

    def __init__(self, fs: Any, path: str, traits: Traits, base: _Remote | None) -> None:
        self.fs = fs
        self.path = path
        self.traits = traits
        self.base = base  # what an archive lies in
        self.version: tuple[int, Hashable] | None = None
        self._cancelled = False

    def open(self) -> tuple[int, Hashable]:
        self.version = self.current()
        return self.version

    def read(self, offset: int, length: int) -> bytes:
        if self._cancelled:
            raise _Refused("it is being closed")
        data: bytes = self._call(self.fs.cat_file, self.path, start=offset, end=offset + length)
        # As it was when it was opened, and is so now: it was so all the time.
        if self.current() != self.version:
            raise _Changed
        if len(data) != length:
            raise _Refused(f"asked for {length} bytes, it gave {len(data)}")
        return data

    def current(self) -> tuple[int, Hashable]:
        base = self.base.current() if self.base is not None else None
        self.fs.invalidate_cache()
        info = self._call(self.fs.info, self.path)
        if info.get("type") == "directory":
            raise _Refused("it is a folder")
        if not isinstance(info.get("size"), int):
            raise Unsupported(f"{plain(self.path)}: the store does not say how large it is")
        known = {key.lower().replace("_", ""): value for key, value in info.items()}
        marks = {key: repr(value) for key, value in known.items() if key not in _NO_MARKS and _is_plain(value)}
        if not _MARKS & marks.keys():
            try:
                marks["modified"] = repr(self._call(self.fs.modified, self.path))
            except _Refused:
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
            raise _Transient(f"{type(error).__name__}: {error}") from error
        except Exception as error:  # of any library
            raise _Refused(f"{type(error).__name__}: {error}") from error


def _is_plain(value: object) -> bool:
    return isinstance(value, (str, bytes, int, float, tuple)) or hasattr(value, "isoformat")


def _remote(url: str, options: dict[str, Any], own: dict[str, Any]) -> _Remote:
    """The store of a URL; `own`: traits that the user asks for."""
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
        limit = replace(_REMOTE, **own).timeout
        patience = {"retries": {"max_attempts": 0}, "connect_timeout": limit, "read_timeout": limit}
        options["config_kwargs"] = patience | options.get("config_kwargs", {})
    try:
        # An instance of our own: others know what was there before.
        fs, path = url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError as error:
        extra = "s3" if plain(url).startswith("s3") else "url"
        raise Unsupported(f"{plain(url)}: {error}; pip install 'k42[{extra}]', or what it names") from error
    except (ConnectionError, TimeoutError) as error:
        raise _Transient(f"{type(error).__name__}: {error}") from error
    except Exception as error:
        raise _Refused(f"{type(error).__name__}: {error}") from error
    kind = type(fs).__name__
    if kind == "HTTPFileSystem":
        return _Http(fs, path, replace(_REMOTE, **own))
    if kind == "S3FileSystem":
        return _S3(fs, path, replace(_REMOTE, **own))
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
            first = replace(_REMOTE, **own)

            def connect() -> tuple[_Remote, int, Hashable]:
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
                except _Transient as error:
                    if n == traits.retries or self.cancelled.is_set():
                        raise StoreError(f"{error} ({n + 1} attempts)", url=self.name, offset=offset) from error
                    # Spread, so that those that failed together do not come again together.
                    pause = max(error.after, traits.backoff * 2**n * random.uniform(0.75, 1.25))
                    self.cancelled.wait(min(pause, _LONGEST_PAUSE))
                except _Changed as error:
                    raise StoreError("it changed since it was opened", url=self.name, offset=offset) from error
                except _Refused as error:
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
            if isinstance(error.__cause__, _Changed):
                return True
            raise

    def traits(self) -> Traits:
        """By the kind of store."""
        return self.root.remote.traits

    def read_range(self, offset: int, length: int) -> bytes | bytearray:
        """Bytes of the version that was opened; see `FileRepresentative.read_range`."""
        root = self.root
        return root.attempt(lambda: root.remote.read(offset, length), offset, root.remote.traits)

    def fill(self, memfd: int, first: int, count: int) -> None:
        """Reads a range; see `FileRepresentative.fill`."""
        offset, end = first * PAGE, (first + count) * PAGE
        wanted = max(0, min(end, self.root.size) - offset)
        data = self.read_range(offset, wanted) if wanted else b""
        _frames.put_padded(memfd, offset, memoryview(data), end)

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
