"""Keys and values of the tokens so far, so that a new token costs one token's work.

Shapes: B batch, K key/value heads, S slots, T new tokens, H head size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flm_jax.config import TransformerConfig

KeysValues = tuple[jax.Array, jax.Array]  # of one layer, [B, K, S or T, H]
Slots = tuple[jax.Array, jax.Array]  # segment ids [B, S], and the slot of the first new token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """S slots in every row, filled from slot 0 on, in all rows alike.

    Rows of different lengths begin with padding, which is of segment 0: nothing else sees it.
    Heads come before slots, as attention reads them: nothing is transposed for a token.
    """

    layers: tuple[KeysValues, ...]
    segment_ids_BS: jax.Array  # int32
    length: jax.Array  # int32: slots that are filled

    @classmethod
    def empty(cls, config: TransformerConfig, batch: int, slots: int) -> Cache:
        """A cache without tokens, in the model's compute dtype."""
        shape = (batch, config.kv_heads, slots, config.head_dim)
        layers = tuple(
            (jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
            for _ in range(config.num_layers)
        )
        return cls(layers, jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32))


def write(slots: jax.Array, new: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    """`slots` with `new` from index `start` on along `axis`."""
    return jax.lax.dynamic_update_slice_in_dim(slots, new, start, axis)


def layer_name(index: int) -> str:
    return f"layer_{index}"


def by_layer(params: Any, config: TransformerConfig) -> dict[str, Any]:
    """The parameters with every layer's own arrays, for `Transformer.extend`; compute dtype.

    A scan over stacked layers copies each layer's slice before it is used, which nobody notices in
    training; for one token it is most of the work.
    """
    params = jax.tree.map(lambda x: x.astype(config.dtype), params)
    stacked = params.pop("layers")
    layers = {
        layer_name(i): jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(config.num_layers)
    }
    return {**params, **layers}
