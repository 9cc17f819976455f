"""Object stores by URL, through fsspec: which ones, what they need, and how one is opened."""

from __future__ import annotations

import importlib.util
from typing import Any
from urllib.parse import urlsplit

from ablate.errors import CheckpointError, suggest
from ablate.records.masking import masked_url

CHECKPOINTS = "ABLATE_CHECKPOINTS"
"""Environment variable of a worker: where its trial's checkpoints are copied to."""

PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
"""Scheme -> the package that speaks it."""

# A request that hangs must not hold a checkpoint for minutes; botocore waits 60 s to connect.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "config_kwargs": {
            "connect_timeout": 10,
            "read_timeout": 60,
            "retries": {"max_attempts": 3, "mode": "standard"},
        }
    },
    "gs": {},
}


def check_url(url: str) -> str:
    """`url` without a slash at its end, if it names a place in an object store.

    Credentials in it are refused: it is written into records and logs. The stores' libraries find
    them in the environment (``AWS_ACCESS_KEY_ID``, ``GOOGLE_APPLICATION_CREDENTIALS``), in their
    own files, or ask the machine.

    Raises:
        ValueError: another scheme, no bucket, or more in it than a bucket and a prefix.
    """
    shown = masked_url(url)
    parts = urlsplit(url)
    if parts.scheme not in PACKAGES:
        raise ValueError(
            f"{shown!r} is no place in an object store; "
            f"{suggest(parts.scheme, PACKAGES)}, e.g. s3://bucket/prefix"
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"{shown!r} holds more than a bucket and a prefix. Credentials and endpoints come from "
            "the environment, never from the URL, which is written into records"
        )
    path = parts.path.split("/")
    if not parts.netloc or ".." in path or "." in path or "\\" in url or not url.isprintable():
        raise ValueError(f"{shown!r} is no bucket with a prefix; write e.g. s3://bucket/prefix")
    return url.rstrip("/")


def open_store(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path of the URL in it. Nothing is sent yet.

    Raises:
        CheckpointError: the package for its scheme is not installed.
    """
    scheme = urlsplit(check_url(url)).scheme
    package = PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise CheckpointError(
            f"{scheme}:// needs the package {package}, on every machine: "
            f"pip install 'ablate-runner[{scheme}]'"
        )
    import fsspec  # validating a study file does without it

    store = fsspec.filesystem(
        scheme, skip_instance_cache=True, use_listings_cache=False, **_OPTIONS[scheme]
    )
    return store, str(store._strip_protocol(url)).rstrip("/")


def probe(url: str) -> str:
    """Write, read and delete a small object under `url`; what is wrong, or nothing."""
    try:
        store, root = open_store(url)
        name = f"{root}/.ablate-probe"
        store.pipe_file(name, b"ablate")
        found = store.cat_file(name)
        store.rm_file(name)
    except CheckpointError as error:
        return str(error)
    except Exception as error:  # every store has exceptions of its own
        return f"{type(error).__name__}: {masked_url(str(error))}"
    return "" if found == b"ablate" else "what was written did not come back"
