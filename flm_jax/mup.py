"""µP from the axis table: initial scale, learning rate and decay of each parameter.

Rules of Tensor Programs V (arXiv 2203.03466, table 3, Adam), as Tele-FLM uses them (arXiv
2404.16645, table 4): with m = d_model / base width, a matrix-like parameter has standard deviation
std / sqrt(m) and learning rate lr / m; vector-like ones keep both; the head's output is multiplied
by output_mult / m. Decoupled weight decay acts through the learning rate, so a matrix-like
parameter's decay coefficient is multiplied by m to shrink equally fast at every width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.axes import Param, Role
from flm_jax.config import TransformerConfig

# Standard deviation of the sum of four uniform integers from 0 to 2^16 - 1.
_UNIT = math.sqrt(4 * (2**32 - 1) / 12)


def init_std(param: Param, config: TransformerConfig) -> float:
    """Standard deviation of the parameter's initial entries (0 for a gain, which starts at 1)."""
    if Role.GAIN in param.roles:
        return 0.0
    if not param.matrix_like:
        return config.vector_init_std
    std = config.matrix_init_std / math.sqrt(config.width_mult)
    if config.depth_scaled_init and param.residual_writer:
        std /= math.sqrt(2 * max(config.num_layers, 1))
    return std


def learning_rate_mult(param: Param, config: TransformerConfig) -> float:
    """1/m for matrix-like parameters, 1 for others."""
    return 1 / config.width_mult if param.matrix_like else 1.0


def decay_mult(param: Param, config: TransformerConfig) -> float:
    """m for matrix-like parameters, 1 for others, 0 for gains."""
    if Role.GAIN in param.roles:
        return 0.0
    return config.width_mult if param.matrix_like else 1.0


Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def initializer(param: Param, config: TransformerConfig) -> Initializer:
    """Draws fresh entries: ones for a gain, else `unit_normal` times `init_std`."""
    if Role.GAIN in param.roles:
        return lambda key, shape, dtype: jnp.ones(shape, dtype)
    std = init_std(param, config)
    return lambda key, shape, dtype: unit_normal(key, shape, dtype, std)


def unit_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, std: float = 1.0) -> jax.Array:
    """Draws of mean 0 and the given standard deviation, cut off at 3.46 of it.

    Each is the sum of four uniform 16-bit integers (Irwin-Hall; excess kurtosis -0.3), an exact
    integer until its one multiplication: every compiler, device and sharding gives the same bits.
    (A normal through an inverse error function differs in its last bit from one to the other.)

    The entries of a row (all indices but the last) depend on the key and the row's number alone,
    so that any block of rows can be drawn without the others.
    """
    rows = jnp.arange(math.prod(shape[:-1]), dtype=np.uint32)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    bits = jax.vmap(lambda k: jax.random.bits(k, (2, *shape[-1:]), jnp.uint32))(keys)
    halves = (bits & 0xFFFF) + (bits >> 16)
    centred = (halves[:, 0] + halves[:, 1]).astype(np.int32) - 2 * 0xFFFF
    return (centred.astype(dtype) * jnp.asarray(std / _UNIT, dtype)).reshape(shape)
