"""Rotary position embedding, and how its frequencies are changed for long contexts.

Shapes: B batch, T length, N heads, H head size, i pairs of rotated coordinates.

The kinds of scaling follow transformers (`modeling_rope_utils`), which names them so:
  linear   all frequencies divided by the factor (arXiv 2306.15595)
  dynamic  theta raised with the length of the batch's longest sequence ("dynamic NTK")
  yarn     high frequencies kept, low ones divided, a linear ramp between (arXiv 2309.00071)
  llama3   the same with other limits and a ramp in the wavelength (Llama 3.1)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flm_jax.config import RopeConfig, TransformerConfig
from flm_jax.params.dtypes import wide

Angles = tuple[jax.Array, jax.Array]  # cosine and sine, [B, T, i]


def angles_by_kind(positions_BT: jax.Array, config: TransformerConfig) -> dict[str, Angles]:
    """Cosine and sine of each token's rotation, for every kind of layer that rotates.

    Args:
      positions_BT: int32 position of each token in its document.
      config: gives the kinds of layers, theta and scaling.

    Returns:
      Kind of layer -> cosine and sine [B, T, i], float32 or wider.
    """
    local = config.rope.local_theta
    kinds = [kind for kind in dict.fromkeys(config.kinds) if not kind.endswith("_nope")]
    shared = None
    found = {}
    for kind in kinds:
        if kind == "sliding" and local:
            found[kind] = _angles(positions_BT, config, local, RopeConfig())
            continue
        if shared is None:
            shared = _angles(positions_BT, config, config.rope_theta, config.rope)
        found[kind] = shared
    return found


def _angles(
    positions_BT: jax.Array, config: TransformerConfig, theta: float, rope: RopeConfig
) -> Angles:
    """Cosine and sine of position * frequency, times attention's factor."""
    dtype = wide(config.dtype)
    rotated = rotated_size(config)
    inverse_frequency_i, factor = _SCALINGS[rope.kind](theta, rotated, rope, positions_BT, dtype)
    angle_BTi = positions_BT.astype(dtype)[..., None] * inverse_frequency_i[None, None]
    cos_BTi, sin_BTi = jnp.cos(angle_BTi), jnp.sin(angle_BTi)
    return (cos_BTi, sin_BTi) if factor == 1 else (cos_BTi * factor, sin_BTi * factor)


def rotated_size(config: TransformerConfig) -> int:
    """Number of coordinates of a head that are rotated: the first ones."""
    return int(config.head_dim * config.rope.fraction)


def rotate(x_BTNH: jax.Array, angles: Angles) -> jax.Array:
    """Rotates the halves of each head against each other (Llama's layout).

    Coordinates beyond the angles' stay as they are (partial rotary).
    """
    cos_BT1i, sin_BT1i = (a[:, :, None].astype(x_BTNH.dtype) for a in angles)
    rotated = 2 * cos_BT1i.shape[-1]
    if rotated < x_BTNH.shape[-1]:
        turned_BTNi = rotate(x_BTNH[..., :rotated], angles)
        return jnp.concatenate([turned_BTNi, x_BTNH[..., rotated:]], axis=-1)
    a, b = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([a * cos_BT1i - b * sin_BT1i, b * cos_BT1i + a * sin_BT1i], axis=-1)


def _plain(theta: Any, rotated: int, dtype: Any) -> jax.Array:
    """theta^(-2i / rotated) for every pair i."""
    half = rotated // 2
    frequency_i: jax.Array = theta ** (-jnp.arange(half, dtype=dtype) / half)
    return frequency_i


def _default(
    theta: float, rotated: int, rope: RopeConfig, positions_BT: jax.Array, dtype: Any
) -> tuple[jax.Array, float]:
    """Plain RoPE (arXiv 2104.09864)."""
    return _plain(theta, rotated, dtype), 1.0


def _linear(
    theta: float, rotated: int, rope: RopeConfig, positions_BT: jax.Array, dtype: Any
) -> tuple[jax.Array, float]:
    """Positions divided by the factor."""
    return _plain(theta, rotated, dtype) / rope.factor, 1.0


def _dynamic(
    theta: float, rotated: int, rope: RopeConfig, positions_BT: jax.Array, dtype: Any
) -> tuple[jax.Array, float]:
    """Theta grows once a sequence of the batch is longer than the original context."""
    length = jnp.maximum(jnp.max(positions_BT) + 1, rope.original_length).astype(dtype)
    longer = rope.factor * length / rope.original_length - (rope.factor - 1)
    return _plain(theta * longer ** (rotated / (rotated - 2)), rotated, dtype), 1.0


def _yarn(
    theta: float, rotated: int, rope: RopeConfig, positions_BT: jax.Array, dtype: Any
) -> tuple[jax.Array, float]:
    """High frequencies kept, low ones divided, a linear ramp over the pairs between."""

    def pair(turns: float) -> float:
        """The pair that turns so often within the original context."""
        wavelengths = rope.original_length / (turns * 2 * math.pi)
        return rotated * math.log(wavelengths) / (2 * math.log(theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    high = high + 0.001 if low == high else high  # as transformers avoids a division by zero
    ramp_i = jnp.clip((jnp.arange(rotated // 2, dtype=dtype) - low) / (high - low), 0, 1)
    plain_i = _plain(theta, rotated, dtype)
    factor = rope.attention_factor or 0.1 * math.log(rope.factor) + 1
    return plain_i * (1 - ramp_i) + plain_i / rope.factor * ramp_i, factor


def _llama3(
    theta: float, rotated: int, rope: RopeConfig, positions_BT: jax.Array, dtype: Any
) -> tuple[jax.Array, float]:
    """High frequencies kept, low ones divided, a ramp in the number of turns between."""
    plain_i = _plain(theta, rotated, dtype)
    turns_i = rope.original_length * plain_i / (2 * math.pi)
    kept_i = (turns_i - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)
    kept_i = jnp.clip(kept_i, 0, 1)
    return kept_i * plain_i + (1 - kept_i) * plain_i / rope.factor, 1.0


_Scaling = Callable[[float, int, RopeConfig, jax.Array, Any], tuple[jax.Array, float]]
_SCALINGS: Mapping[str, _Scaling] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}
