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

# Standard deviation of a unit normal cut off at two: drawn values are divided by it.
_TRUNCATED_STD = 0.87962566103423978


def init_std(param: Param, config: TransformerConfig) -> float:
    """Standard deviation of the parameter's initial entries (0 for a gain, which starts at 1)."""
    if Role.GAIN in param.roles:
        return 0.0
    if not param.matrix_like:
        return config.vector_init_std
    std = config.matrix_init_std / math.sqrt(config.width_mult)
    if config.depth_scaled_init and param.residual_writer:
        std /= math.sqrt(2 * config.num_layers)
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
    """Draws fresh entries: ones for a gain, else a truncated normal of `init_std`.

    The entries of a row (all indices but the last) depend on the key and the row's number alone,
    so that any block of rows can be drawn without the others.
    """
    if Role.GAIN in param.roles:
        return lambda key, shape, dtype: jnp.ones(shape, dtype)
    scale = init_std(param, config) / _TRUNCATED_STD

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        rows = jnp.arange(math.prod(shape[:-1]), dtype=np.uint32)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
        values = jax.vmap(lambda k: jax.random.truncated_normal(k, -2, 2, shape[-1:], dtype))(keys)
        return (values * jnp.asarray(scale, dtype)).reshape(shape)

    return draw
