"""The Tele-FLM decoder (arXiv 2404.16645, section 3.1): Llama's block and two µP multipliers.

Letters in names are shapes, here and in the files beside this one:
  B batch   T length   S keys   D embed   F mlp   V vocab   L layers
  K key/value heads   G query heads per key/value head   H head size
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flm_jax.config import TransformerConfig
from flm_jax.models import layers as nn_layers
from flm_jax.models.cache import Cache, layer_name, write
from flm_jax.params.axes import Param, nested_table
from flm_jax.params.dtypes import wide
from flm_jax.params.sharding import BATCH_AXES, constrain

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Transformer(nn.Module):
    """Tokens to logits. `Transformer(config).apply({"params": params}, tokens)`."""

    config: TransformerConfig

    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        masks: nn_layers.Masks | None = None,
    ) -> jax.Array:
        """Logits [B, T, V], float32 (float64 with dtype float64).

        Args:
          tokens_BT: int32 token ids.
          segment_ids_BT: which packed document a token is of, 0 for padding; None: all the same.
          positions_BT: position inside the document; None: 0 .. T-1.
          masks: axis -> [size], run-time growth masks (see `layers.py`); None: the plain model.
        """
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        return self._forward(tokens_BT, segment_ids_BT, positions_BT, masks, None)[0]

    def extend(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """Logits of tokens that follow those in the cache, and the cache with them.

        `Transformer(config).apply({"params": by_layer(params, config)}, tokens, segment_ids,
        positions, cache, method="extend")`. The cache must have T free slots.
        """
        logits_BTV, extended = self._forward(tokens_BT, segment_ids_BT, positions_BT, None, cache)
        assert extended is not None
        return logits_BTV, extended

    @nn.compact
    def _forward(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        masks: nn_layers.Masks | None,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache | None]:
        config = self.config
        own = {name: p for name, p in nested_table(config).items() if isinstance(p, Param)}
        w = nn_layers.create(self, own, config)
        masks = dict(masks or {})
        layer_mask_L = masks.pop("layers", None)

        # A device looks up its part of every row: split by token, the lookup would bring all
        # sequences, or the whole table, to every device.
        embedding_VD = constrain(w["embedding"], None, "tensor")
        x_BTD = constrain(embedding_VD[tokens_BT], BATCH_AXES, None, "tensor")
        x_BTD = x_BTD * jnp.asarray(config.input_mult, config.dtype)
        x_BTD = constrain(x_BTD, BATCH_AXES, "tensor", None)
        angles = nn_layers.rotary_angles(positions_BT, config)
        if cache is None:
            x_BTD, _ = self._layers()(x_BTD, layer_mask_L, segment_ids_BT, angles, masks)
        else:
            x_BTD, cache = self._cached_layers(x_BTD, segment_ids_BT, angles, cache)
        x_BTD = nn_layers.rms_norm(x_BTD, w["final_norm"], config.rms_norm_eps, masks.get("embed"))
        stats = wide(config.dtype)
        logits_BTV = nn_layers.linear(constrain(x_BTD, BATCH_AXES, None, None), w["head"], stats)
        logits_BTV = constrain(logits_BTV, BATCH_AXES, None, "tensor")
        logits_BTV = logits_BTV * jnp.asarray(config.logit_mult, stats)
        if "vocab" in masks:
            # A token's probability is multiplied by its mask, up to the normaliser.
            hidden_V = jnp.log(masks["vocab"].astype(stats))
            logits_BTV += jnp.maximum(hidden_V, jnp.finfo(stats).min / 2)[None, None]
        return logits_BTV, cache

    def _layers(self) -> Any:
        """All layers as one scanned module: parameters and layer mask are stacked on axis 0."""
        config = self.config
        layer: Any = nn_layers.Layer
        if config.remat != "none":
            layer = nn.remat(layer, policy=_REMAT_POLICIES[config.remat], prevent_cse=False)
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=config.num_layers,
            unroll=config.scan_unroll,
        )
        return scanned(config, nested_table(config)["layers"], name="layers")

    def _cached_layers(
        self,
        x_BTD: jax.Array,
        segment_ids_BT: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """All layers one after the other, each with its own parameters and its own cache."""
        ids_BS = write(cache.segment_ids_BS, segment_ids_BT, cache.length, axis=1)
        slots, layers = (ids_BS, cache.length), list(cache.layers)
        table = nested_table(self.config)["layers"]
        for index, past in enumerate(cache.layers):
            layer = nn_layers.Layer(self.config, table, name=layer_name(index))
            x_BTD, extended = layer(x_BTD, None, segment_ids_BT, angles, {}, past, slots)
            assert extended is not None  # there is a cache
            layers[index] = extended
        return x_BTD, Cache(tuple(layers), ids_BS, cache.length + x_BTD.shape[1])
