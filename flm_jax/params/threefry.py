"""Threefry-2x32 (Random123: Salmon et al., SC 2011), the generator of `jax.random`, unrolled.

The bits are those of `jax.random.bits` (with `jax_threefry_partitionable`). JAX's own lowering for
CPUs is a loop over the rounds that goes through memory in each; written out, the rounds become one
loop over the entries: 2.1 CPU seconds for 10^9 bytes of `mup.unit_normal` instead of 13.6, and the
fresh state of `configs/demo.py` compiles in 4.5 CPU seconds instead of 11.2 (two CPU cores).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


@jax.jit  # traced once for each shape: flax asks every parameter's initializer at every trace
def bits(keys: jax.Array, places: jax.Array) -> jax.Array:
    """uint32 [*keys.shape, *places.shape]: those places of `jax.random.bits` of every key.

    Args:
      keys: typed threefry keys, of any shape.
      places: uint32 [n]: of numbers in C order, whatever shape is drawn.
    """
    data = jax.random.key_data(keys)
    counters = places.reshape((1,) * keys.ndim + (-1,))
    high, low = _block(data[..., :1], data[..., 1:], jnp.zeros_like(counters), counters)
    return high ^ low


def _block(
    key0: jax.Array, key1: jax.Array, x0: jax.Array, x1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Twenty rounds."""
    keys = (key0, key1, key0 ^ key1 ^ _PARITY)
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for n in range(5):
        for distance in _ROTATIONS[n % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << distance) | (x1 >> (32 - distance)))
        x0 = x0 + keys[(n + 1) % 3]
        x1 = x1 + keys[(n + 2) % 3] + np.uint32(n + 1)
    return x0, x1
