"""What turns the residual stream into logits: the head, its factor, cap and mask.

Shapes: B batch, T length, D embed, V vocab.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flm_jax.config import TransformerConfig
from flm_jax.models.attention import soft_capped
from flm_jax.models.layers import linear
from flm_jax.params.dtypes import wide
from flm_jax.params.sharding import BATCH_AXES, constrain


class Readout(NamedTuple):
    """The end of a forward pass, before any logit is computed.

    Attributes:
      x_BTD: the stream after the final norm, in the compute dtype.
      head_DV: the head, or the transposed embedding, as `layers.create` makes it.
      log_mask_V: logarithm of the run-time mask on the vocabulary, added to the logits; None: there
        is no mask.
    """

    x_BTD: jax.Array
    head_DV: jax.Array
    log_mask_V: jax.Array | None


def scaled_logits(product: jax.Array, config: TransformerConfig) -> jax.Array:
    """Logits from the head's product with the stream: times `logit_mult`, then capped."""
    return soft_capped(
        product * jnp.asarray(config.logit_mult, product.dtype), config.logit_softcap
    )


def logits(readout: Readout, config: TransformerConfig) -> jax.Array:
    """The logits of all ids: [B, T, V], float32 (float64 with dtype "float64")."""
    stats = wide(config.dtype)
    product_BTV = linear(readout.x_BTD, readout.head_DV, stats)
    logits_BTV = scaled_logits(constrain(product_BTV, BATCH_AXES, None, "tensor"), config)
    if readout.log_mask_V is not None:
        logits_BTV += readout.log_mask_V[None, None]
    return logits_BTV
