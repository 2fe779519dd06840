"""One pre-norm decoder layer: RMSNorm, rotary grouped-query attention, SwiGLU.

Shapes: B batch, T length, S slots of a cache, D embed, F mlp, K key/value heads, G queries per
key/value head, H head size.

Every layer takes `masks`: axis -> [size] values in [0, 1], only for axes that are growing under a
run-time mask (Masked Structural Growth, arXiv 2305.02869, adapted to pre-norm). A masked slot is
hidden from its readers: inside the norms for `embed`, after attention for heads, after the gating
for `mlp`, on a layer's branches for `layers`, and as log(mask) on the logits for `vocab`. With
masks at 0 the model equals the smaller one exactly; with masks at 1 it is the plain model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flm_jax.config import TransformerConfig
from flm_jax.models.attention import attention, in_slots
from flm_jax.models.cache import KeysValues, Slots, write
from flm_jax.params import mup
from flm_jax.params.axes import Param, axis_sizes
from flm_jax.params.draws import initial
from flm_jax.params.dtypes import wide
from flm_jax.params.sharding import BATCH_AXES, constrain, head_axes

Masks = Mapping[str, jax.Array]


def create(
    module: nn.Module, table: Mapping[str, Param], config: TransformerConfig
) -> dict[str, jax.Array]:
    """Creates a module's parameters from the axis table.

    A stacked parameter is created one layer at a time; `nn.scan` adds the `layers` axis.

    Args:
      module: the module that gets the parameters.
      table: the module's part of the axis table, by name.
      config: gives sizes and dtypes.

    Returns:
      The parameters by name, cast to the compute dtype.
    """
    sizes = axis_sizes(config)
    created = {}
    for name, param in table.items():
        shape = param.shape(sizes)[param.stacked :]
        draw = functools.partial(initial, mup.scale(param, config))
        created[name] = module.param(name, draw, shape, wide(config.dtype)).astype(config.dtype)
    return created


def linear(x_BTI: jax.Array, w_IO: jax.Array, dtype: Any = None) -> jax.Array:
    """Multiplies activations by a weight: x @ w, over all axes of x after B and T.

    On one device, tokens are flattened first: the gradient of a plain matrix product runs at the
    machine's peak, while that of a batched product copies the transposed activations (measured on
    the CPU backend). On several devices, axes that are split over different mesh axes must not be
    merged, because the partitioner would bring all of them to every device.

    Args:
      x_BTI: activations; I is one or more axes.
      w_IO: the weight: the same axes I, then the axes O of the output.
      dtype: accumulate in, and return, this dtype; None: JAX's default.

    Returns:
      [B, T, *O].
    """
    B, T = x_BTI.shape[:2]
    inputs = math.prod(x_BTI.shape[2:])
    split = x_BTI.ndim - 2
    if jax.sharding.get_abstract_mesh().size > 1:
        return jnp.tensordot(x_BTI, w_IO, axes=split, preferred_element_type=dtype)
    flat = jnp.matmul(
        x_BTI.reshape(B * T, inputs), w_IO.reshape(inputs, -1), preferred_element_type=dtype
    )
    return flat.reshape(B, T, *w_IO.shape[split:])


def rms_norm(
    x_BTD: jax.Array, gain_D: jax.Array, eps: float, mask_D: jax.Array | None = None
) -> jax.Array:
    """RMSNorm: gain * x / sqrt(mean(x^2) + eps), with statistics in float32 or wider.

    Args:
      x_BTD: activations.
      gain_D: the norm's gain.
      eps: added to the mean square.
      mask_D: run-time mask; None: all ones. It weights the mean and multiplies the output, so that
        a coordinate masked at 0 has no effect.
    """
    x2_BTD = jnp.square(x_BTD.astype(wide(x_BTD.dtype)))
    if mask_D is None:
        mean_square_BT1 = jnp.mean(x2_BTD, axis=-1, keepdims=True)
    else:
        mask_D = mask_D.astype(x2_BTD.dtype)
        mean_square_BT1 = (x2_BTD @ mask_D)[..., None] / mask_D.sum()
        gain_D = gain_D * mask_D.astype(gain_D.dtype)
    scale_BT1 = jax.lax.rsqrt(mean_square_BT1 + jnp.asarray(eps, x2_BTD.dtype))
    return x_BTD * scale_BT1.astype(x_BTD.dtype) * gain_D[None, None]


def rotary_angles(
    positions_BT: jax.Array, config: TransformerConfig
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, T, H/2] of position * theta^(-2i/H), float32 or wider."""
    dtype = wide(config.dtype)
    half = config.head_dim // 2
    inverse_frequency_i = config.rope_theta ** (-jnp.arange(half, dtype=dtype) / half)
    angle_BTi = positions_BT.astype(dtype)[..., None] * inverse_frequency_i[None, None]
    return jnp.cos(angle_BTi), jnp.sin(angle_BTi)


def rotate(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding: rotates the halves of the last axis against each other (Llama's layout)."""
    cos_BT1i, sin_BT1i = (a[:, :, None].astype(x_BTNH.dtype) for a in angles)
    a, b = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([a * cos_BT1i - b * sin_BT1i, b * cos_BT1i + a * sin_BT1i], axis=-1)


class Attention(nn.Module):
    """The attention branch of a layer."""

    config: TransformerConfig
    table: Mapping[str, Param]

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        segment_ids_BT: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        masks: Masks,
        past: KeysValues | None = None,
        slots: Slots | None = None,
    ) -> tuple[jax.Array, KeysValues | None]:
        """The branch's output, and the layer's cache (if `past` is given) with the new tokens."""
        w = create(self, self.table, self.config)
        B, T, _ = x_BTD.shape
        y_BTD = rms_norm(x_BTD, w["norm"], self.config.rms_norm_eps, masks.get("embed"))
        y_BTD = constrain(y_BTD, BATCH_AXES, None, None)
        q_BTKGH = linear(y_BTD, w["query"])
        k_BTKH = rotate(linear(y_BTD, w["key"]), angles)
        v_BTKH = linear(y_BTD, w["value"])
        K, G, H = q_BTKGH.shape[2:]
        q_BTKGH = rotate(q_BTKGH.reshape(B, T, K * G, H), angles).reshape(B, T, K, G, H)
        groups, queries = head_axes(K, G)
        q_BTKGH = constrain(q_BTKGH, BATCH_AXES, None, groups, queries, None)
        k_BTKH, v_BTKH = (constrain(x, BATCH_AXES, None, groups, None) for x in (k_BTKH, v_BTKH))
        if past is None or slots is None:
            out_BTKGH = attention(q_BTKGH, k_BTKH, v_BTKH, segment_ids_BT, self.config.attention)
        else:
            segment_ids_BS, start = slots
            k_BKSH, v_BKSH = past = (
                write(past[0], k_BTKH.transpose(0, 2, 1, 3), start, axis=2),
                write(past[1], v_BTKH.transpose(0, 2, 1, 3), start, axis=2),
            )
            out_BTKGH = in_slots(q_BTKGH, k_BKSH, v_BKSH, segment_ids_BT, segment_ids_BS, start)
        out_BTKGH = constrain(out_BTKGH, BATCH_AXES, None, groups, queries, None)
        if "kv_heads" in masks:
            out_BTKGH *= masks["kv_heads"].astype(out_BTKGH.dtype)[None, None, :, None, None]
        if "q_per_kv" in masks:
            out_BTKGH *= masks["q_per_kv"].astype(out_BTKGH.dtype)[None, None, None, :, None]
        return linear(out_BTKGH, w["out"]), past


class MLP(nn.Module):
    """The SwiGLU branch of a layer."""

    config: TransformerConfig
    table: Mapping[str, Param]

    @nn.compact
    def __call__(self, x_BTD: jax.Array, masks: Masks) -> jax.Array:
        w = create(self, self.table, self.config)
        y_BTD = rms_norm(x_BTD, w["norm"], self.config.rms_norm_eps, masks.get("embed"))
        y_BTD = constrain(y_BTD, BATCH_AXES, None, None)
        a_BTF = jax.nn.silu(linear(y_BTD, w["gate"])) * linear(y_BTD, w["up"])
        a_BTF = constrain(a_BTF, BATCH_AXES, None, "tensor")
        if "mlp" in masks:
            a_BTF *= masks["mlp"].astype(a_BTF.dtype)[None, None]
        return linear(a_BTF, w["down"])


class Layer(nn.Module):
    """Adds the attention branch, then the MLP branch, to x. Under `nn.scan`, x is the carry.

    Both branches are multiplied by `branch_mult`, which is 1 except under CompleteP (`mup.py`).
    Also returns the layer's cache, and sows its `relative_distance`.
    """

    config: TransformerConfig
    table: Mapping[str, Any]

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        layer_mask: jax.Array | None,
        segment_ids_BT: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        masks: Masks,
        past: KeysValues | None = None,
        slots: Slots | None = None,
    ) -> tuple[jax.Array, KeysValues | None]:
        def scaled(branch_BTD: jax.Array) -> jax.Array:
            if self.config.branch_mult != 1:
                branch_BTD = branch_BTD * jnp.asarray(self.config.branch_mult, branch_BTD.dtype)
            if layer_mask is None:
                return branch_BTD
            return branch_BTD * layer_mask.astype(branch_BTD.dtype)

        attend = Attention(self.config, self.table["attention"], name="attention")
        feed_forward = MLP(self.config, self.table["mlp"], name="mlp")
        # Between the branches the stream is also split over its tokens: norms and sums are local,
        # and each device keeps only its part of the stream for the gradient.
        stream = (BATCH_AXES, "tensor", None)
        branch_BTD, past = attend(x_BTD, segment_ids_BT, angles, masks, past, slots)
        h_BTD = constrain(x_BTD + scaled(branch_BTD), *stream)
        out_BTD = constrain(h_BTD + scaled(feed_forward(h_BTD, masks)), *stream)
        self.sow("intermediates", "distance", relative_distance(x_BTD, out_BTD, segment_ids_BT))
        return out_BTD, past


def relative_distance(x_BTD: jax.Array, out_BTD: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Mean of ||out - x|| / ||x|| over tokens that are not padding.

    It measures how far a layer is from the identity.
    """
    x_BTD, out_BTD = (a.astype(wide(a.dtype)) for a in (x_BTD, out_BTD))
    ratio_BT = jnp.linalg.norm(out_BTD - x_BTD, axis=-1) / jnp.linalg.norm(x_BTD, axis=-1)
    real_BT = (segment_ids_BT > 0).astype(ratio_BT.dtype)
    return jnp.sum(ratio_BT * real_BT) / jnp.sum(real_BT)
