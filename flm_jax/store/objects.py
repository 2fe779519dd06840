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
    return ts.KvStore.open(kvstore(path.parent)).result(timeout=_TIMEOUT_S), path.name


def read(path: pathlib.Path) -> tuple[bytes, bytes]:
    """Returns an object's content and generation; b"" and a generation if it is missing."""
    store, key = _open(path)
    found = store.read(key).result(timeout=_TIMEOUT_S)
    return bytes(found.value), bytes(found.stamp.generation)


def write(path: pathlib.Path, content: bytes, generation: bytes) -> bytes:
    """Replaces an object of a known generation; returns the new generation.

    Raises Changed if it has another one.
    """
    store, key = _open(path)
    written = store.write(key, content, if_equal=generation).result(timeout=_TIMEOUT_S)
    if not written.generation:
        raise Changed(path)
    return bytes(written.generation)


def delete(path: pathlib.Path, generation: bytes) -> None:
    """Deletes an object of a known generation. Raises Changed if it has another one."""
    store, key = _open(path)
    deleted = store.write(key, None, if_equal=generation).result(timeout=_TIMEOUT_S)
    if not deleted.generation:
        raise Changed(path)
