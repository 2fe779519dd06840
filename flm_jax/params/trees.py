"""Nested dictionaries of parameters as paths and leaves, and parts of leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def along(vector: Any, dim: int, ndim: int) -> Any:
    """The vector as an array of `ndim` dimensions that broadcasts along `dim`."""
    return vector.reshape([-1 if d == dim else 1 for d in range(ndim)])


# A part of a leaf: for each dimension the first slot (may be traced) and how many, or None: all.
Window = Sequence[tuple[Any, int] | None]


def window_shape(shape: Sequence[int], window: Window | None) -> tuple[int, ...]:
    cuts = window or (None,) * len(shape)
    return tuple(cut[1] if cut else size for size, cut in zip(shape, cuts, strict=True))


def slots_in(vector: Any, cut: tuple[Any, int] | None) -> Any:
    """The part of a per-slot vector that lies in a window."""
    if cut is None:
        return vector
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(vector), cut[0], cut[1])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, as ("layers/mlp/up", leaf), sorted."""
    for name, value in sorted(tree.items()):
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{path}/")
        else:
            yield path, value


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
