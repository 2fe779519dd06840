"""Bits per byte: comparable between vocabularies, unlike loss per token."""

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
from flm_jax.growth import Plan
from flm_jax.params import sharding
from flm_jax.train.train_step import summed_loss


@functools.partial(jax.jit, static_argnames=("config", "plan"))
def _nats(
    params: Any,
    batch: dict[str, jax.Array],
    config: TransformerConfig,
    plan: Plan | None,
    mask_value: jax.Array | None,
) -> jax.Array:
    masks = None if plan is None or mask_value is None else plan.masks(mask_value)
    return summed_loss(params, batch, config, masks)[0]


@dataclasses.dataclass(frozen=True)
class Score:
    """The negative log-likelihood of some text, and how much text it was."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


def score(
    params: Any,
    config: TransformerConfig,
    batches: Iterable[dict[str, np.ndarray]],
    token_bytes: np.ndarray,
    mesh: Mesh,
    plan: Plan | None = None,
    mask_value: float | None = None,
) -> Score:
    """Scores the targets of all batches; their bytes are what `token_bytes` adds up to.

    Args:
      params: of `config`.
      config: the model's.
      batches: packed batches as `flm_jax.data` makes them.
      token_bytes: int [vocabulary], bytes that a token stands for.
      mesh: where to compute.
      plan, mask_value: evaluate behind the plan's masks at this value; None: the plain model.
    """
    nats, tokens, count = 0.0, 0, 0
    value = None if mask_value is None else np.float32(mask_value)
    for batch in batches:
        placed = sharding.place_batch(batch, mesh)
        nats += float(_nats(params, placed, config, plan if value is not None else None, value))
        real = batch["weights"] > 0
        tokens += int(real.sum())
        count += int((token_bytes[batch["targets"]] * real).sum())
    return Score(nats, tokens, count)


def bits_per_byte(
    params: Any,
    config: TransformerConfig,
    batches: Iterable[dict[str, np.ndarray]],
    token_bytes: np.ndarray,
    mesh: Mesh,
    plan: Plan | None = None,
    mask_value: float | None = None,
) -> float:
    """Negative log2-likelihood of the batches over their bytes; arguments as of `score`."""
    return score(params, config, batches, token_bytes, mesh, plan, mask_value).bits_per_byte
