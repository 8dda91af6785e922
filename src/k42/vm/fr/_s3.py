"""Ranges of an object in S3, through s3fs: by ``IfMatch`` on its ETag, and each answer's ETag is looked at, too."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine, Hashable
from typing import Any, TypeVar

from k42.vm.fr._remote import WHOLE, Changed, Put, Refused, Transient, may_pass, retry_after
from k42.vm.fr.interface import Traits

T = TypeVar("T")


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
                raise Refused("it is being closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self.fs.loop)
            self._pending.add(future)
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise Refused("it is being closed") from error
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


class S3(_OnLoop):
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

    def read(self, offset: int, length: int, put: Put) -> None:
        put(offset, self._run(self._get(offset, length)))

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
            data: bytes = await asyncio.wait_for(answer["Body"].read(), WHOLE * self.traits.timeout)
        except Exception as error:
            raise _s3_error(error) from error
        finally:
            answer["Body"].close()
        if answer["ETag"] != etag:
            raise Changed
        if answer.get("ContentRange") != f"bytes {offset}-{last}/{size}" or len(data) != length:
            raise Refused(f"asked for bytes {offset}-{last}, it gave {answer.get('ContentRange')}, {len(data)} bytes")
        return data

    async def _call(self, method: str, **arguments: Any) -> Any:
        try:
            return await asyncio.wait_for(
                self.fs._call_s3(method, self.fs.kwargs, **arguments), WHOLE * self.traits.timeout
            )
        except Exception as error:
            raise _s3_error(error) from error


def _s3_error(error: Exception) -> Exception:
    """What of s3fs, botocore or aiohttp this is."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status in (412, 416):
            return Changed()
        if may_pass(status):
            return Transient(
                str(error), retry_after(response["ResponseMetadata"].get("HTTPHeaders", {}).get("retry-after", ""))
            )
        return Refused(f"{type(error).__name__}: {error}")
    from botocore import exceptions  # type: ignore[import-untyped]

    passing = (exceptions.HTTPClientError, exceptions.ConnectionError, ConnectionError, TimeoutError)
    if isinstance(error, passing) or "Payload" in type(error).__name__:
        return Transient(f"{type(error).__name__}: {error}")
    return Refused(f"{type(error).__name__}: {error}")
