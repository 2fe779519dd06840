"""Keys and values of the tokens so far, so that a new token costs one token's work.

Shapes: L layers, B batch, K key/value heads, S slots, T new tokens, H head size.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flm_jax.config import TransformerConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """S slots in every row, filled from slot 0 on, in all rows alike.

    Rows of different lengths begin with padding, which is of segment 0: nothing else sees it.
    Heads come before slots, as attention reads them: nothing is transposed per token.
    """

    keys_LBKSH: jax.Array
    values_LBKSH: jax.Array
    segment_ids_BS: jax.Array  # int32
    length: jax.Array  # int32: slots that are filled

    @classmethod
    def empty(cls, config: TransformerConfig, batch: int, slots: int) -> Cache:
        """A cache without tokens, in the model's compute dtype."""
        shape = (config.num_layers, batch, config.kv_heads, slots, config.head_dim)
        return cls(
            jnp.zeros(shape, config.dtype),
            jnp.zeros(shape, config.dtype),
            jnp.zeros((batch, slots), jnp.int32),
            jnp.zeros((), jnp.int32),
        )

    def with_segments(self, segment_ids_BT: jax.Array) -> Cache:
        """With the new tokens' segments in their slots; `length` stays until `extended`."""
        ids_BS = write(self.segment_ids_BS, segment_ids_BT, self.length, axis=1)
        return dataclasses.replace(self, segment_ids_BS=ids_BS)

    def extended(self, keys_LBKTH: jax.Array, values_LBKTH: jax.Array) -> Cache:
        """With the new tokens' keys and values in the next slots."""
        return dataclasses.replace(
            self,
            keys_LBKSH=write(self.keys_LBKSH, keys_LBKTH, self.length, axis=3),
            values_LBKSH=write(self.values_LBKSH, values_LBKTH, self.length, axis=3),
            length=self.length + keys_LBKTH.shape[3],
        )


def write(slots: jax.Array, new: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    """`slots` with `new` from index `start` on along `axis`."""
    return jax.lax.dynamic_update_slice_in_dim(slots, new, start, axis)
