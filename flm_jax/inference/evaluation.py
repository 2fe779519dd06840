"""Evaluation of a model on text; bits per byte is comparable between vocabularies."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flm_jax.config import TransformerConfig
from flm_jax.params import sharding
from flm_jax.train import loss
from flm_jax.train.train_step import Batch, MasksAt, nats_of


@dataclasses.dataclass(frozen=True)
class Score:
    """The negative log-likelihood of a text, and the text's size.

    Attributes:
      nats: negative log-likelihood of all tokens, in nats.
      tokens: number of tokens that were predicted.
      bytes: number of bytes of text in these tokens.
      weight: sum of their weights.
    """

    nats: float
    tokens: int
    bytes: int
    weight: float

    @property
    def loss(self) -> float:
        """Nats per token, averaged with the tokens' weights."""
        return self.nats / self.weight

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text."""
        return self.nats / math.log(2) / self.bytes


def score(
    params: Any,
    config: TransformerConfig,
    batches: Iterable[dict[str, np.ndarray]],
    token_bytes: np.ndarray,
    mesh: Mesh,
    masks_at: MasksAt | None = None,
    mask_value: float | None = None,
) -> Score:
    """Scores the targets of all batches.

    Args:
      params: nested dicts of arrays, the model's parameters.
      config: the model's config; ids beyond its tokens are not in the softmax.
      batches: packed batches, as `flm_jax.data` makes them.
      token_bytes: int [vocabulary], number of bytes of text in each token.
      mesh: the devices that compute.
      masks_at: mask value -> run-time masks by axis; see `train_step.make_train_step`.
      mask_value: the masks' value, from 0 to 1; None: the model without masks.

    Returns:
      Nats, tokens, bytes and weights, summed over all batches.
    """
    nats, tokens, count, weight = 0.0, 0, 0, 0.0
    value = None if mask_value is None else np.float32(mask_value)
    for batch in batches:
        placed = sharding.place_batch(batch, mesh)
        nats += float(summed_nats(params, placed, config, masks_at, value))
        real = batch["weights"] > 0
        tokens += int(real.sum())
        weight += float(batch["weights"].sum(dtype=np.float64))
        count += int((token_bytes[batch["targets"]] * real).sum())
    return Score(nats, tokens, count, weight)


@functools.partial(jax.jit, static_argnames=("config", "masks_at"))
def summed_nats(
    params: Any,
    batch: Batch,
    config: TransformerConfig,
    masks_at: MasksAt | None,
    mask_value: jax.Array | None,
) -> jax.Array:
    """Returns the summed negative log-likelihood of a batch's targets."""
    masks = None if masks_at is None or mask_value is None else masks_at(mask_value)
    nats_BT = nats_of(config, params, batch, masks, config.tokens)
    return loss.summed(nats_BT, batch["weights"])[0]
