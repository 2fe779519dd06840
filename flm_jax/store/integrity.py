"""How a checkpoint notices that its files are not what was written.

Two digests protect it. Every chunk of an array ends in its CRC32C, which tensorstore compares each
time it reads the chunk: slice by slice, in any process and on any mesh. All else that
a checkpoint says (position in the data, time, loss; names, shapes and dtypes of its leaves) has one
SHA-256, the seal, in orbax's custom metadata. Both appear with the checkpoint, in one rename.

Why a CRC for each chunk, and not one digest for each array: a part of an array is checked without
reading the rest, and the threads that write and read the chunks compute it (docs/reliability.md
has the cost). It changes with every flipped bit and with every run of damaged bits up to 32 long;
any other damage passes with a probability of 2^-32 for each chunk.

Checkpoints of earlier versions have neither. They are read as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from flm_jax.errors import DamageError, UserError
from flm_jax.store import objects

CHECKSUM = {"name": "crc32c"}  # the codec of zarr's version 3
_SEAL = "seal"
_VERSION = 1
# Tensorstore's words for a storage that did not answer. What it holds may be intact.
_UNANSWERED = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|CANCELLED|"
    "ABORTED"
)
_GONE = {2, 20, 21}  # ENOENT, ENOTDIR, EISDIR: the files, not the disk

Leaves = Mapping[str, jax.ShapeDtypeStruct]


def damaged(path: pathlib.Path, what: str) -> DamageError:
    """Returns the error of a damaged checkpoint; `what` names the array or file."""
    return DamageError(
        f"{path} is damaged: {what}; restore its files from a copy, or use another checkpoint "
        "(flm inspect RUN --verify checks all)",
        path,
    )


@contextlib.contextmanager
def reading(path: pathlib.Path, what: str) -> Iterator[None]:
    """Turns an error of tensorstore or a parser inside the block into one line.

    Args:
      path: the checkpoint's folder.
      what: what is read, for the message: the array's name, or a part of the checkpoint.

    Raises:
      DamageError: what was read is not a checkpoint's.
      UserError: the disk or bucket did not answer.
    """
    try:
        yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # of any class, on foreign bytes
        errors = list(_causes(error))
        text = " ".join(map(str, errors))
        number = re.search(r"os_error_code='(\d+)'", text)
        code = int(number[1]) if number else getattr(errors[-1], "errno", None)
        if code is not None and code not in _GONE:
            raise UserError(
                f"{path}: {what} cannot be read ({os.strerror(code)}); fix this, then call again"
            ) from error
        if any(_UNANSWERED.match(str(each)) for each in errors):
            raise UserError(
                f"{path}: {what} cannot be read ({text[:200]}); call again once it can"
            ) from error
        raise damaged(path, f"{what} ({_short(errors[-1])})") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and what led to it; the libraries wrap their errors."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _short(error: BaseException) -> str:
    """The first words of a library's message, which may be pages long."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' if len(text) > 160 else ''}"


def check_finite(path: pathlib.Path, name: str, values: np.ndarray) -> None:
    """Raises DamageError if a value is NaN or infinite: no run can continue from it."""
    if np.issubdtype(values.dtype, np.integer) or values.dtype == bool:
        return
    with np.errstate(over="ignore", invalid="ignore"):
        # The sum is finite only if all values are, and takes a tenth of the time.
        if values.dtype.itemsize >= 4 and np.isfinite(np.add.reduce(values, axis=None)):
            return
    if not np.isfinite(values).all():
        raise damaged(path, f"{name} has values that are NaN or infinite")


def text_of(leaf: Any) -> str:
    """Returns dtype and shape.

    >>> text_of(jax.ShapeDtypeStruct((2, 3), "float32"))
    'float32[2, 3]'
    """
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def sealed(metadata: Mapping[str, Any], leaves: Leaves, loss: float | None) -> dict[str, Any]:
    """Returns a checkpoint's JSON values with their seal.

    Args:
      metadata: JSON values.
      leaves: name -> shape and dtype of every leaf.
      loss: the loss that orbax stores beside the state; None: none.
    """
    described = {name: text_of(x) for name, x in leaves.items()}
    seal = {"version": _VERSION, "leaves": described, "loss": loss}
    return {**metadata, _SEAL: {**seal, "digest": _digest(metadata, seal)}}


def opened(path: pathlib.Path, metadata: Any, leaves: Leaves, checksums: bool) -> dict[str, Any]:
    """Checks the seal, and takes it off.

    Args:
      path: the checkpoint's folder.
      metadata: orbax's custom metadata.
      leaves: name -> shape and dtype, as the arrays' own descriptions say.
      checksums: whether the arrays have checksums, so that there was a seal.

    Returns:
      The JSON values.

    Raises:
      DamageError: the values or the leaves are not the sealed ones, or the seal is missing.
    """
    values = dict(metadata or {})
    seal = values.pop(_SEAL, None)
    if seal is None:
        if checksums:
            raise damaged(path, "_CHECKPOINT_METADATA has lost its content")
        return values
    if not isinstance(seal, dict) or seal.get("digest") != _digest(values, _without_digest(seal)):
        raise damaged(path, "_CHECKPOINT_METADATA does not have its digest")
    have = {name: text_of(x) for name, x in leaves.items()}
    for name in dict.fromkeys([*seal["leaves"], *have]):
        if have.get(name) != seal["leaves"].get(name):
            raise damaged(
                path,
                f"{name} was saved as {seal['leaves'].get(name, 'no leaf')}, and its description "
                f"is {have.get(name, 'missing or unreadable')}",
            )
    return values


def is_sealed(metadata: Any) -> bool:
    """Whether a checkpoint has a seal: those of earlier versions have none."""
    return isinstance(metadata, dict) and _SEAL in metadata


def _without_digest(seal: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in seal.items() if name != "digest"}


def _digest(metadata: Mapping[str, Any], seal: Mapping[str, Any]) -> str:
    # As they are after a round trip through the file: keys are strings, tuples are lists.
    plain = json.loads(json.dumps([metadata, seal]))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def kvstore_of(state: pathlib.Path) -> dict[str, Any]:
    """Returns tensorstore's description of the folder of a checkpoint's arrays."""
    kvstore = objects.kvstore(state)
    if (state / "manifest.ocdbt").exists():
        return {"driver": "ocdbt", "base": kvstore, "path": ""}
    return kvstore


def has_checksums(array: ts.TensorStore) -> bool:
    """Whether the chunks of an array end in checksums; those of earlier versions do not."""
    codecs = array.spec().to_json()["metadata"].get("codecs", [])
    if codecs and codecs[0]["name"] == "sharding_indexed":
        codecs = codecs[0]["configuration"]["codecs"]
    return CHECKSUM["name"] in [codec["name"] for codec in codecs]
