"""Objects of a bucket that are replaced only if nobody else replaced them.

Tensorstore's clients do this with the bucket's generation match. Its settings serve arrays and
objects alike (`kvstore`).
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import tensorstore as ts

from flm_jax.runtime import paths

_TIMEOUT_S = 30.0  # a small object takes less than a second


class Changed(Exception):
    """The object is not the one that the caller knows."""


def kvstore(path: pathlib.Path) -> dict[str, Any]:
    """Returns tensorstore's description of a folder, on a disk or a bucket."""
    kind = paths.scheme(path)
    if not kind:
        return {"driver": "file", "path": f"{path.absolute()}/"}
    name, key = paths.bucket(path)
    spec: dict[str, Any] = {"bucket": name, "path": f"{key}/" if key else ""}
    if kind == "gs":
        return {"driver": "gcs", **spec}
    # As boto3 reads it. Tensorstore finds the region itself, but only of Amazon's buckets.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    return {"driver": "s3", **spec}


def _open(path: pathlib.Path) -> tuple[ts.KvStore, str]:
    return _result(ts.KvStore.open(kvstore(path.parent))), path.name


def _result(future: Any) -> Any:
    """Waits for a client's answer. Raises OSError if it refuses or does not answer."""
    try:
        return future.result(timeout=_TIMEOUT_S)
    except (ValueError, TimeoutError, RuntimeError) as error:
        raise OSError(str(error) or f"no answer within {_TIMEOUT_S:g} s") from error


def read(path: pathlib.Path) -> tuple[bytes, bytes]:
    """Returns an object's content and generation; b"" and a generation if it is missing."""
    store, key = _open(path)
    found = _result(store.read(key))
    return bytes(found.value), bytes(found.stamp.generation)


def write(path: pathlib.Path, content: bytes | None, generation: bytes) -> bytes:
    """Replaces an object of a known generation, or deletes it (None); returns the new generation.

    Raises Changed if it has another one.
    """
    store, key = _open(path)
    written = bytes(_result(store.write(key, content, if_equal=generation)).generation)
    if not written:
        raise Changed(path)
    return written
