"""A cache of the keys and values of the tokens so far: a new token costs one token's work.

Shapes: B batch, K key/value heads, S slots, T new tokens, H head size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flm_jax.config import TransformerConfig

KeysValues = tuple[jax.Array, jax.Array]  # keys and values of one layer: [B, K, S or T, H]
Slots = tuple[jax.Array, jax.Array]  # segment ids [B, S], and the slot of the first new token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """S slots in every row; rows fill in lockstep, from slot 0.

    Rows of different lengths start with padding, which has segment 0, so that no token attends to
    it. Heads come before slots, in the order of attention, so that nothing is transposed per token.
    """

    layers: tuple[KeysValues, ...]
    segment_ids_BS: jax.Array  # int32
    length: jax.Array  # int32: number of filled slots

    @classmethod
    def empty(cls, config: TransformerConfig, batch: int, slots: int) -> Cache:
        """Makes a cache without tokens, in the model's compute dtype."""
        shape = (batch, config.kv_heads, slots, config.head_dim)
        layers = tuple(
            (jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
            for _ in range(config.num_layers)
        )
        return cls(layers, jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32))


def write(slots: jax.Array, new: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    """Replaces the entries of `slots` from index `start` on, along `axis`, by `new`."""
    return jax.lax.dynamic_update_slice_in_dim(slots, new, start, axis)


def layer_name(index: int) -> str:
    """The key of a layer in the result of `by_layer`."""
    return f"layer_{index}"


def by_layer(params: Any, config: TransformerConfig) -> dict[str, Any]:
    """Unstacks the layers' parameters for `Transformer.extend`, and casts to the compute dtype.

    A scan over stacked layers copies each layer's slice before it is used. In training this cost is
    negligible; for a single token it is most of the work.

    Args:
      params: the model's parameters.
      config: the model.

    Returns:
      The parameters, with an entry for each layer (`layer_name`) in place of "layers".
    """
    params = jax.tree.map(lambda x: x.astype(config.dtype), params)
    stacked = params.pop("layers")
    layers = {
        layer_name(i): jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(config.num_layers)
    }
    return {**params, **layers}
