"""The Tele-FLM decoder (arXiv 2404.16645, section 3.1): Llama's block and two µP multipliers.

Fields of the config change the block into that of other families (docs/interop.md).

The letters at the end of a name give its shape, here and in the other files of this package:
  B batch   T length   S keys   D embed   F mlp   V vocab   L layers
  K key/value heads   G query heads per key/value head   H head size
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flm_jax.checks import require_type
from flm_jax.config import TransformerConfig
from flm_jax.execution import LayerGroup, layer_groups
from flm_jax.models import layers as nn_layers
from flm_jax.models.cache import Cache, layer_name, write
from flm_jax.models.readout import Readout, logits
from flm_jax.models.rope import Angles, angles_by_kind
from flm_jax.params.axes import Param, nested_table
from flm_jax.params.dtypes import wide
from flm_jax.params.sharding import BATCH_AXES, constrain

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _keeping(policy: str) -> Any:
    """What the backward pass keeps under a policy of `execution.py` other than "none"."""
    names = jax.checkpoint_policies.save_only_these_names
    return _REMAT_POLICIES.get(policy) or names(*policy.split("+"))


class Transformer(nn.Module):
    """Maps tokens to logits: `Transformer(config).apply({"params": params}, tokens)`.

    Raises:
      UserError: `config` is not a `TransformerConfig`.
    """

    config: TransformerConfig

    def __post_init__(self) -> None:
        require_type(self.config, TransformerConfig, "Transformer: config")
        super().__post_init__()

    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        masks: nn_layers.Masks | None = None,
    ) -> jax.Array:
        """Computes the logits of every position.

        Args:
          tokens_BT: int32 token ids.
          segment_ids_BT: int32 number of each token's packed document, 0 for padding; None: all
            tokens are of one document.
          positions_BT: int32 position inside the document; None: 0 .. T-1.
          masks: run-time growth masks, axis -> [size] (see `layers.py`); None: the plain model.

        Returns:
          Logits [B, T, V], float32 (float64 with dtype "float64").
        """
        return logits(self.readout(tokens_BT, segment_ids_BT, positions_BT, masks), self.config)

    def readout(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        masks: nn_layers.Masks | None = None,
    ) -> Readout:
        """Computes what the logits are made of, for a loss that does not need all of them at once.

        Arguments as for a call of the model (`method="readout"`).
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
        """Computes the logits of tokens that follow those in the cache.

        Call it as `Transformer(config).apply({"params": by_layer(params, config)}, tokens,
        segment_ids, positions, cache, method="extend")`.

        Args:
          tokens_BT: int32 token ids.
          segment_ids_BT: int32 number of each token's document, 0 for padding.
          positions_BT: int32 position inside the document.
          cache: the tokens so far; it must have T free slots.

        Returns:
          Logits [B, T, V], and the cache with the new tokens.
        """
        readout, extended = self._forward(tokens_BT, segment_ids_BT, positions_BT, None, cache)
        assert extended is not None
        return logits(readout, self.config), extended

    @nn.compact
    def _forward(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        masks: nn_layers.Masks | None,
        cache: Cache | None,
    ) -> tuple[Readout, Cache | None]:
        config = self.config
        own = {name: p for name, p in nested_table(config).items() if isinstance(p, Param)}
        w = nn_layers.create(self, own, config)
        masks = dict(masks or {})
        layer_mask_L = masks.pop("layers", None)

        # Each device looks up its part of every row. If the table were split by token, the lookup
        # would bring all sequences, or the whole table, to every device.
        embedding_VD = constrain(w["embedding"], None, "tensor")
        x_BTD = constrain(embedding_VD[tokens_BT].astype(config.dtype), BATCH_AXES, None, "tensor")
        x_BTD = x_BTD * jnp.asarray(config.input_mult, config.dtype)
        x_BTD = constrain(x_BTD, BATCH_AXES, "tensor", None)
        angles = angles_by_kind(positions_BT, config)
        if cache is None:
            x_BTD = self._scanned_layers(x_BTD, layer_mask_L, segment_ids_BT, angles, masks)
        else:
            x_BTD, cache = self._cached_layers(x_BTD, segment_ids_BT, angles, cache)
        x_BTD = nn_layers.rms_norm(x_BTD, w["final_norm"], config.rms_norm_eps, masks.get("embed"))
        log_mask_V = None
        if "vocab" in masks:
            # A token's probability is multiplied by its mask, up to the normaliser.
            stats = wide(config.dtype)
            hidden_V = jnp.log(masks["vocab"].astype(stats))
            log_mask_V = jnp.maximum(hidden_V, jnp.finfo(stats).min / 2)
        head_DV = w["embedding"].T if config.tied else w["head"]
        return Readout(constrain(x_BTD, BATCH_AXES, None, None), head_DV, log_mask_V), cache

    def _scanned_layers(
        self,
        x_BTD: jax.Array,
        layer_mask_L: jax.Array | None,
        segment_ids_BT: jax.Array,
        angles: Mapping[str, Angles],
        masks: nn_layers.Masks,
    ) -> jax.Array:
        """Applies all layers, each group of them as one scan.

        What differs by layer is stacked on axis 0. The groups share one module, so that they do not
        change the parameters.
        """
        config = self.config
        kinds = list(dict.fromkeys(config.kinds)) or ["full"]
        kind, kind_index_L = kinds[0], None
        if len(kinds) > 1:
            kind, kind_index_L = "", jnp.array([kinds.index(k) for k in config.kinds])
        groups = layer_groups(config.remat, config.num_layers)
        if self.is_initializing() or self.is_mutable_collection("intermediates"):
            # Nothing is differentiated, and what all layers make is stacked.
            groups = (LayerGroup("none", 0, config.num_layers),)
        layers = nn_layers.Layer(config, nested_table(config)["layers"], kind, name="layers")
        stacked = (layer_mask_L, kind_index_L)
        for group in groups:
            scanned = self._scanned(group, alone=len(groups) == 1)
            own = jax.tree.map(lambda x, g=group: x[g.first : g.end], stacked)
            x_BTD = scanned(layers, x_BTD, *own, segment_ids_BT, angles, masks)[0]
        return x_BTD

    def _scanned(self, group: LayerGroup, alone: bool) -> Any:
        """A scan over a group of layers; of the stacked parameters it reads the group's part."""

        def apply(layer: nn_layers.Layer, x_BTD: jax.Array, *inputs: Any) -> Any:
            return layer(x_BTD, *inputs)

        layer: Any = apply
        if group.policy != "none":
            layer = nn.remat(layer, policy=_keeping(group.policy), prevent_cse=False)
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=group.end - group.first,
            unroll=self.config.scan_unroll,
        )
        if alone:
            return scanned

        def part(params: Any) -> Any:
            return jax.tree.map(lambda x_L: x_L[group.first : group.end], params)

        return nn.map_variables(scanned, "params", trans_in_fn=part)

    def _cached_layers(
        self,
        x_BTD: jax.Array,
        segment_ids_BT: jax.Array,
        angles: Mapping[str, Angles],
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """Applies all layers in turn, each with its own parameters and its own cache."""
        ids_BS = write(cache.segment_ids_BS, segment_ids_BT, cache.length, axis=1)
        slots, layers = (ids_BS, cache.length), list(cache.layers)
        table = nested_table(self.config)["layers"]
        for index, (kind, past) in enumerate(zip(self.config.kinds, cache.layers, strict=True)):
            layer = nn_layers.Layer(self.config, table, kind, name=layer_name(index))
            x_BTD, extended = layer(x_BTD, None, None, segment_ids_BT, angles, {}, past, slots)
            assert extended is not None  # there is a cache
            layers[index] = extended
        return x_BTD, Cache(tuple(layers), ids_BS, cache.length + x_BTD.shape[1])
