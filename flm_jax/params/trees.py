"""Nested dictionaries of parameters as paths and leaves, and windows of leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def along(vector: Any, dim: int, ndim: int) -> Any:
    """Reshapes a vector to `ndim` dimensions, so that it broadcasts along `dim`.

    >>> along(jnp.arange(3), 1, 3).shape
    (1, 3, 1)
    """
    return vector.reshape([-1 if d == dim else 1 for d in range(ndim)])


# A part of a leaf: for each dimension (first slot, number of slots), or None for all slots. The
# first slot may be traced.
Window = Sequence[tuple[Any, int] | None]


def window_shape(shape: Sequence[int], window: Window | None) -> tuple[int, ...]:
    """The shape of a window of a leaf with this shape.

    >>> window_shape((4, 8), (None, (2, 3)))
    (4, 3)
    """
    cuts = window or (None,) * len(shape)
    return tuple(cut[1] if cut else size for size, cut in zip(shape, cuts, strict=True))


def slots_in(vector: Any, cut: tuple[Any, int] | None) -> Any:
    """The part of a per-slot vector that lies in one dimension of a window."""
    if cut is None:
        return vector
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(vector), cut[0], cut[1])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested dicts as (path, leaf), sorted.

    >>> list(flatten({"layers": {"up": 1}, "head": 2}))
    [('head', 2), ('layers/up', 1)]
    """
    for name, value in sorted(tree.items()):
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{path}/")
        else:
            yield path, value


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Makes nested dicts from leaves by path: the inverse of `flatten`.

    >>> unflatten({"head": 2, "layers/up": 1})
    {'head': 2, 'layers': {'up': 1}}
    """
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
