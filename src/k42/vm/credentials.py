"""Who asks for a URL: what a client says of that from its own environment, beside the URL."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

# Variables from which libraries of stores take credentials, or where to send them.
_CREDENTIALS = ("AWS_", "AZURE_", "GOOGLE_", "GCE_", "GCSFS_", "GITHUB_", "HF_", "HUGGING", "FSSPEC_", "OSS_", "ARROW_")
_S3 = {"key": "ACCESS_KEY_ID", "secret": "SECRET_ACCESS_KEY", "token": "SESSION_TOKEN", "profile": "PROFILE"}
_COMPRESSED = "zstd+"


def forget_credentials() -> None:
    """Takes credentials out of the kernel's environment: they are those of the client that started it.

    Each client gives its own beside the URL, see `with_credentials`.
    """
    for name in list(os.environ):
        if name.startswith(_CREDENTIALS):
            del os.environ[name]


def with_credentials(url: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a URL, and for S3, unless they say who asks, what the client's own environment says of that."""
    given = dict(options)
    for n, part in enumerate(url.removeprefix(_COMPRESSED).split("::")):
        scheme = urlsplit(part).scheme
        if scheme not in ("s3", "s3a"):
            continue
        if n == 0:
            return _of_s3(given)
        given[scheme] = _of_s3(given.get(scheme, {}))  # in a chain each has options by its own name
    return given


def _of_s3(options: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(options)
    if not given.keys() & {"key", "secret", "token", "anon", "profile"}:
        found = {name: os.environ.get(f"AWS_{variable}") for name, variable in _S3.items()}
        given |= {name: value for name, value in found.items() if value}
    if "endpoint_url" not in given:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        given |= {"endpoint_url": endpoint} if endpoint else {}
    return given
