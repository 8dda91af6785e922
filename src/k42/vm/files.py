"""From a URL to its store, in the kernel."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

import k42
from k42.vm.errors import StoreError, Unsupported
from k42.vm.fr import CompressedFR, FileFR, FileRepresentative, UrlFR, UserFR
from k42.vm.fr import user as user_stores

_COMPRESSED = "zstd+"


def open_store(url: str, mode: str, options: Mapping[str, Any]) -> FileRepresentative:
    """The FR of a URL. May take as long as the store takes to answer: not for a fault server's thread.

    Args:
        url: ``file:``, what an installed package announces (see `k42.vm.fr.user`), what fsspec knows, or ``zstd+`` and
            one of these.
        mode: ``r`` or ``c``, for which the store is only read, or ``r+``.
        options: what the store is given beside the URL.

    Raises:
        StoreError: it cannot be opened.
        Unsupported: it cannot be written, or a library is missing, which the message names.
        ValueError: that is no URL, or no option of its store.
    """
    scheme, colon, rest = url.partition(":")
    if not colon or "\0" in url:
        raise ValueError(f"not a URL: {url!r}")
    if url.startswith(_COMPRESSED):
        _refuse_to_write(url, mode)
        inner = open_store(url.removeprefix(_COMPRESSED), "r", options)
        try:
            return CompressedFR.create(inner)
        except BaseException:
            inner.close()
            k42.destroy(inner)
            raise
    fr: FileRepresentative
    if (made := user_stores.find(scheme)) is not None:
        fr = UserFR.create(made, url, options)
        if mode == "r+" and not fr.writable():
            fr.close()
            k42.destroy(fr)
            _refuse_to_write(url, mode)
        return fr
    if scheme == "file" and "::" not in rest:
        return _open_file(url, mode)
    _refuse_to_write(url, mode)
    try:
        return UrlFR.create(url, options)
    except TypeError as error:
        raise ValueError(f"{url}: {error}") from error


def _refuse_to_write(url: str, mode: str) -> None:
    if mode not in ("r", "c"):
        raise Unsupported(f"{url} is read-only: open it with mode 'r', or with 'c' for changes of your own")


def _open_file(url: str, mode: str) -> FileRepresentative:
    split = urlsplit(url)
    if split.netloc not in ("", "localhost") or split.query or split.fragment:
        raise ValueError(f"not a file of this machine: {url!r}")
    path = unquote(split.path)
    try:
        flags = os.O_RDWR if mode == "r+" else os.O_RDONLY
        # Not to wait for who writes into a named pipe.
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise StoreError.of(error, path) from error
    try:
        if not os.path.isfile(f"/proc/self/fd/{descriptor}"):
            raise StoreError("it is no regular file", url=path)
        return FileFR.create(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
