"""How scales follow the width: initial scale, learning rate and decay, from the axis table.

With m = d_model / base width, by the rules of Tensor Programs V (arXiv 2203.03466, table 3, Adam)
as Tele-FLM uses them (arXiv 2404.16645, table 4). "sp" is the standard parametrisation to compare
with: entries scaled to their fan-in, everything else the same at every width. Both agree at m = 1.

    kind      example          µP: std     rate   decay   output        SP: std     rate, decay
    matrix    query, down      s / sqrt m  1 / m  m                     s / sqrt m  1
    vector    embedding, gain  s           1      1                     s           1
    readout   head             s           1      1       output / m    s / sqrt m  1

Decoupled decay acts through the learning rate: the factor m keeps it equally fast at every width.
Attention needs no factor: the head size is fixed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax import threefry
from flm_jax.axes import TABLE, Param, Role, Window, along, multiplier_of, slots_in, window_shape
from flm_jax.config import OptimizerConfig, StageConfig, TransformerConfig

# Standard deviation of the sum of four uniform integers from 0 to 2^16 - 1.
_UNIT = math.sqrt(4 * (2**32 - 1) / 12)


def init_std(param: Param, config: TransformerConfig) -> float:
    """Standard deviation of the parameter's initial entries (0 for a gain, which starts at 1)."""
    if Role.GAIN in param.roles:
        return 0.0
    fan_in = math.sqrt(config.width_mult)
    if not param.matrix_like:
        scaled = param.kind == "readout" and config.parametrisation == "sp"
        return config.vector_init_std / (fan_in if scaled else 1)
    std = config.matrix_init_std / fan_in
    if config.depth_scaled_init and param.residual_writer:
        std /= math.sqrt(2 * max(config.num_layers, 1))
    return std


def _matrix_mult(param: Param, config: TransformerConfig) -> float:
    mup = config.parametrisation == "mup"
    return config.width_mult if mup and param.matrix_like else 1.0


def learning_rate_mult(param: Param, config: TransformerConfig) -> float:
    """Under µP 1/m for matrix-like parameters; else 1."""
    return 1 / _matrix_mult(param, config)


def decay_mult(param: Param, config: TransformerConfig) -> float:
    """Under µP m for matrix-like parameters; else 1; 0 for gains."""
    return 0.0 if Role.GAIN in param.roles else _matrix_mult(param, config)


def table(stage: StageConfig, settings: OptimizerConfig) -> dict[str, dict[str, Any]]:
    """Of each parameter: kind, and std, learning rate, decay and multiplier, at the base width
    and at the stage's own."""
    target = stage.model
    base = dataclasses.replace(target, d_model=target.mup_base_width or target.d_model)

    def at(param: Param, config: TransformerConfig) -> dict[str, float]:
        rate = stage.matrix_learning_rate if param.matrix_like else stage.learning_rate
        return {
            "init_std": init_std(param, config),
            "learning_rate": rate * learning_rate_mult(param, config),
            "weight_decay": settings.weight_decay * decay_mult(param, config),
            "multiplier": multiplier_of(param, config),
        }

    return {
        path: {"kind": param.kind, "base": at(param, base), "target": at(param, target)}
        for path, param in TABLE.items()
    }


Initializer = Callable[..., jax.Array]


def initializer(param: Param, config: TransformerConfig) -> Initializer:
    """Draws fresh entries, (key, shape, dtype, window=None): ones for a gain, else `unit_normal`
    times `init_std`."""
    std = init_std(param, config)

    def draw(
        key: jax.Array, shape: tuple[int, ...], dtype: Any, window: Window | None = None
    ) -> jax.Array:
        if Role.GAIN not in param.roles:
            return unit_normal(key, shape, dtype, std, window)
        return jnp.ones(window_shape(shape, window), dtype)

    return draw


def unit_normal(
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: Any,
    std: float = 1.0,
    window: Window | None = None,
) -> jax.Array:
    """Draws of mean 0 and the given standard deviation, cut off at 3.46 of it.

    Each is the sum of four uniform 16-bit integers (Irwin-Hall; excess kurtosis -0.3), an exact
    integer until its one multiplication: every compiler, device and sharding gives the same bits.
    (A normal through an inverse error function differs in its last bit from one to the other.)

    An entry depends on the key and its place alone, so that any window can be drawn without the
    rest.
    """

    def slots(dim: int) -> jax.Array:
        return slots_in(jnp.arange(shape[dim], dtype=np.uint32), window[dim] if window else None)

    # The rows' axes are never merged: each keeps its place on a mesh.
    rows: Any = np.zeros((1,) * (len(shape) - 1), np.uint32)
    for dim in range(len(shape) - 1):
        stride = np.uint32(math.prod(shape[dim + 1 : -1]))
        rows = rows + along(slots(dim) * stride, dim, len(shape) - 1)
    fold_in = jax.random.fold_in
    for _ in rows.shape:
        fold_in = jax.vmap(fold_in, (None, 0))
    # A row (all indices but the last) has a key; an entry of it two of the key's numbers.
    keys, length = fold_in(key, rows), np.uint32(shape[-1])
    halves = [
        (bits & np.uint32(0xFFFF)) + (bits >> 16)
        for bits in (threefry.bits(keys, slots(-1)), threefry.bits(keys, slots(-1) + length))
    ]
    sums = (halves[0] + halves[1]).astype(np.int32) - 2 * 0xFFFF
    return sums.astype(dtype) * jnp.asarray(std / _UNIT, dtype)
