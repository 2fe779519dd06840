"""Random numbers that do not depend on compiler, device or sharding."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.params import threefry
from flm_jax.params.axes import Scale
from flm_jax.params.trees import Window, along, slots_in, window_shape

# Standard deviation of the sum of four uniform integers from 0 to 2^16 - 1.
_UNIT = math.sqrt(4 * (2**32 - 1) / 12)


def unit_normal(
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: Any,
    std: float = 1.0,
    window: Window | None = None,
) -> jax.Array:
    """Draws nearly normal numbers with mean 0, bounded by 3.46 standard deviations.

    Each is the sum of four uniform 16-bit integers (Irwin-Hall; excess kurtosis -0.3): an exact
    integer, which is then multiplied once. So every compiler, device and sharding gives the same
    bits. (A normal draw through an inverse error function differs between them in the last bit.)

    An entry depends only on the key and on its index, so any window can be drawn without the rest.

    Args:
      key: a typed threefry key.
      shape: of the whole array, at least one dimension.
      dtype: of the entries.
      std: standard deviation.
      window: the part to draw; None: all of it.

    Returns:
      The entries, of the window's shape.
    """

    def slots(dim: int) -> jax.Array:
        cut = window[dim] if window else None
        places: jax.Array = slots_in(jnp.arange(shape[dim], dtype=np.uint32), cut)
        return places

    # The axes of the rows are never merged, so that each can keep its sharding.
    rows: Any = np.zeros((1,) * (len(shape) - 1), np.uint32)
    for dim in range(len(shape) - 1):
        stride = np.uint32(math.prod(shape[dim + 1 : -1]))
        rows = rows + along(slots(dim) * stride, dim, len(shape) - 1)
    fold_in = jax.random.fold_in
    for _ in rows.shape:
        fold_in = jax.vmap(fold_in, (None, 0))
    # Each row (all indices but the last) has its own key; each entry uses two of the key's words.
    keys, length = fold_in(key, rows), np.uint32(shape[-1])
    halves = [
        (bits & np.uint32(0xFFFF)) + (bits >> 16)
        for bits in (threefry.bits(keys, slots(-1)), threefry.bits(keys, slots(-1) + length))
    ]
    sums = (halves[0] + halves[1]).astype(np.int32) - 2 * 0xFFFF
    entries: jax.Array = sums.astype(dtype) * jnp.asarray(std / _UNIT, dtype)
    return entries


def initial(
    scale: Scale,
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: Any,
    window: Window | None = None,
) -> jax.Array:
    """Draws the initial entries of a parameter: `scale.start` plus `unit_normal` draws.

    Args:
      scale: gives their mean and standard deviation.
      key: the parameter's own.
      shape: of the whole parameter.
      dtype: of the entries.
      window: the part to draw; None: all of it.

    Returns:
      The entries, of the window's shape.
    """
    if not scale.std:
        return jnp.full(window_shape(shape, window), scale.start, dtype)
    drawn = unit_normal(key, shape, dtype, scale.std, window)
    return drawn + jnp.asarray(scale.start, dtype) if scale.start else drawn
