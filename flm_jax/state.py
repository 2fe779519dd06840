"""The train state: all that a step changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Random keys are not kept: a step derives its own from the seed and `step`."""

    step: jax.Array  # int32: optimizer steps done over the whole chain
    params: Any  # nested dicts as in `axes.PARAMS`
    opt_state: Any  # optax
