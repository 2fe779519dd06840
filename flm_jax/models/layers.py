"""One decoder layer: RMSNorm, rotary grouped-query attention, a gated MLP.

The config says where the norms are, which maps have biases, and what kind of layer it is; the axis
table has the parameters for it.

Shapes: B batch, T length, S slots of a cache, D embed, F mlp, K key/value heads, G queries per
key/value head, H head size.

Every layer takes `masks`: axis -> [size] values in [0, 1], only for axes that are growing under a
run-time mask (Masked Structural Growth, arXiv 2305.02869, adapted to pre-norm). A masked slot is
hidden from its readers: inside the norms for `embed` (or before a branch without one), after
attention for heads, after the gating for `mlp`, on a layer's branches for `layers`, and as
log(mask) on the logits for `vocab`. With masks at 0 the model equals the smaller one exactly; with
masks at 1 it is the plain model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from flm_jax.config import TransformerConfig
from flm_jax.models.attention import Scoring, attention, in_slots
from flm_jax.models.cache import KeysValues, Slots, write
from flm_jax.models.rope import Angles, rotate
from flm_jax.params import mup
from flm_jax.params.axes import Param, axis_sizes
from flm_jax.params.draws import initial
from flm_jax.params.dtypes import wide
from flm_jax.params.sharding import BATCH_AXES, constrain, head_axes

Masks = Mapping[str, jax.Array]

_ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


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
      The parameters by name. They are in the compute dtype; if gradients are reduced in float32
      they are float32, and their uses round them (`linear`, `spread`).
    """
    sizes, reduced = axis_sizes(config), config.gradient_dtype
    dtype = wide(config.dtype) if reduced != config.dtype else np.dtype(config.dtype)
    created = {}
    for name, param in table.items():
        shape = param.shape(sizes)[param.stacked :]
        draw = functools.partial(initial, mup.scale(param, config))
        created[name] = module.param(name, draw, shape, wide(config.dtype)).astype(dtype)
    return created


def linear(x_BTI: jax.Array, w_IO: jax.Array, dtype: Any = None) -> jax.Array:
    """Multiplies activations by a weight: x @ w, over all axes of x after B and T.

    On one device, tokens are flattened first: the gradient of a plain matrix product runs at the
    machine's peak, while that of a batched product copies the transposed activations (measured on
    the CPU backend). On several devices, axes that are split over different mesh axes must not be
    merged, because the partitioner would bring all of them to every device.

    Args:
      x_BTI: activations; I is one or more axes.
      w_IO: the weight: the same axes I, then the axes O of the output. If its dtype is wider than
        that of x it is rounded to it, and its gradient is computed, and added up over devices, in
        its own dtype.
      dtype: accumulate in, and return, this dtype; None: JAX's default.

    Returns:
      [B, T, *O].
    """
    if w_IO.dtype == x_BTI.dtype:
        return _product(dtype, x_BTI, w_IO)
    return _rounded_product(dtype, x_BTI, w_IO)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded_product(dtype: Any, x_BTI: jax.Array, w_IO: jax.Array) -> jax.Array:
    """`_product` with the weight rounded to the dtype of x.

    JAX's own gradient would round the weight's gradient on every device before the sum over them.
    """
    return _product(dtype, x_BTI, w_IO.astype(x_BTI.dtype))


def _rounded_forward(
    dtype: Any, x_BTI: jax.Array, w_IO: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    rounded_IO = w_IO.astype(x_BTI.dtype)
    return _product(dtype, x_BTI, rounded_IO), (x_BTI, rounded_IO)


def _rounded_backward(
    dtype: Any, saved: tuple[jax.Array, jax.Array], g_BTO: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_BTI, w_IO = saved
    _, back = jax.vjp(lambda x: _product(dtype, x, w_IO), x_BTI)
    x, g, tokens = x_BTI, g_BTO, [0, 1]
    if jax.sharding.get_abstract_mesh().size <= 1:  # as in `_product`
        x, g, tokens = x.reshape(-1, *x.shape[2:]), g.reshape(-1, *g.shape[2:]), [0]

    def product(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            x, g, ((tokens, tokens), ([], [])), preferred_element_type=wide(x_BTI.dtype)
        )

    def widened(x: jax.Array, g: jax.Array) -> jax.Array:
        return product(x.astype(wide(x.dtype)), g.astype(wide(x.dtype)))

    # XLA's CPU backend has no product of bfloat16 numbers that is float32.
    grad_IO = jax.lax.platform_dependent(x, g, cpu=widened, default=product)
    return back(g_BTO)[0], grad_IO


_rounded_product.defvjp(_rounded_forward, _rounded_backward)


def _product(dtype: Any, x_BTI: jax.Array, w_IO: jax.Array) -> jax.Array:
    """`linear` with a weight in the dtype of x."""
    B, T = x_BTI.shape[:2]
    inputs = math.prod(x_BTI.shape[2:])
    split = x_BTI.ndim - 2
    if jax.sharding.get_abstract_mesh().size > 1:
        return jnp.tensordot(x_BTI, w_IO, axes=split, preferred_element_type=dtype)
    flat = jnp.matmul(
        x_BTI.reshape(B * T, inputs), w_IO.reshape(inputs, -1), preferred_element_type=dtype
    )
    return flat.reshape(B, T, *w_IO.shape[split:])


def rms_norm(x: jax.Array, gain: jax.Array, eps: float, mask: jax.Array | None = None) -> jax.Array:
    """RMSNorm: gain * x / sqrt(mean(x^2) + eps), with statistics in float32 or wider.

    Args:
      x: activations.
      gain: the norm's gain; the mean is over the last axes of x, as many as the gain has.
      eps: added to the mean square.
      mask: run-time mask, shaped like the gain; None: all ones. It weights the mean and multiplies
        the output, so that a coordinate masked at 0 has no effect.
    """
    x2 = jnp.square(x.astype(wide(x.dtype)))
    own = tuple(range(-gain.ndim, 0))
    if mask is None:
        mean_square = jnp.mean(x2, axis=own, keepdims=True)
    else:
        mask = mask.astype(x2.dtype)
        mean_square = jnp.expand_dims(jnp.tensordot(x2, mask, axes=gain.ndim) / mask.sum(), own)
        gain = gain * mask.astype(gain.dtype)
    scale = jax.lax.rsqrt(mean_square + jnp.asarray(eps, x2.dtype))
    return x * scale.astype(x.dtype) * spread(gain, x)


def spread(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Gives a gain or a bias the number of dimensions and the dtype of an activation.

    A wider vector is rounded only after it is repeated for every token, so that its gradient, the
    sum over tokens and devices, is in its own dtype.
    """
    aligned = vector.reshape((1,) * (x.ndim - vector.ndim) + vector.shape)
    if vector.dtype == x.dtype:
        return aligned
    return jnp.broadcast_to(aligned, x.shape).astype(x.dtype)


def _mapped(w: Mapping[str, jax.Array], name: str, x_BTI: jax.Array) -> jax.Array:
    """Applies a linear map and its bias, if it has one: [B, T, *O]."""
    y_BTO = linear(x_BTI, w[name])
    bias_O = w.get(f"{name}_bias")
    return y_BTO if bias_O is None else y_BTO + spread(bias_O, y_BTO)


def _branch_input(
    w: Mapping[str, jax.Array], x_BTD: jax.Array, config: TransformerConfig, masks: Masks
) -> jax.Array:
    """What a branch reads: the stream, normed if the branch has a norm before it."""
    if "norm" in w:
        x_BTD = rms_norm(x_BTD, w["norm"], config.rms_norm_eps, masks.get("embed"))
    elif "embed" in masks:
        # The root is what folded parameters can do (`growth/folding.py`).
        x_BTD = x_BTD * jnp.sqrt(masks["embed"]).astype(x_BTD.dtype)[None, None]
    return constrain(x_BTD, BATCH_AXES, None, None)


def _branch_output(
    w: Mapping[str, jax.Array], y_BTD: jax.Array, config: TransformerConfig, masks: Masks
) -> jax.Array:
    """What a branch adds to the stream: its last map's output, normed if it has a norm after it."""
    if "after_norm" not in w:
        return y_BTD
    return rms_norm(y_BTD, w["after_norm"], config.rms_norm_eps, masks.get("embed"))


class Attention(nn.Module):
    """The attention branch of a layer.

    `kind` is the layer's (`LAYER_KINDS`). "": it is given at run time, as an index into the
    model's kinds, because a scan over layers of several kinds compiles one layer for all.
    """

    config: TransformerConfig
    table: Mapping[str, Param]
    kind: str

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        kind_index: jax.Array | None,
        segment_ids_BT: jax.Array,
        angles: Mapping[str, Angles],
        masks: Masks,
        past: KeysValues | None = None,
        slots: Slots | None = None,
    ) -> tuple[jax.Array, KeysValues | None]:
        """The branch's output, and the layer's cache (if `past` is given) with the new tokens."""
        config = self.config
        w = create(self, self.table, config)
        y_BTD = _branch_input(w, x_BTD, config, masks)
        q_BTKGH, k_BTKH, v_BTKH = (_mapped(w, name, y_BTD) for name in ("query", "key", "value"))
        if config.qk_norm != "none":
            eps = config.qk_norm_eps or config.rms_norm_eps
            of_q, of_k = (
                _head_masks(masks, q_BTKGH.shape) if config.qk_norm == "all" else (None, None)
            )
            q_BTKGH = rms_norm(q_BTKGH, w["query_norm"], eps, of_q)
            k_BTKH = rms_norm(k_BTKH, w["key_norm"], eps, of_k)
        groups, queries = head_axes(*q_BTKGH.shape[2:4])

        def attend(
            kind: str, q_BTKGH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
        ) -> tuple[jax.Array, KeysValues | None]:
            B, T, K, G, H = q_BTKGH.shape
            if kind in angles:
                k_BTKH = rotate(k_BTKH, angles[kind])
                q_BTKGH = rotate(q_BTKGH.reshape(B, T, K * G, H), angles[kind])
                q_BTKGH = q_BTKGH.reshape(B, T, K, G, H)
            q_BTKGH = constrain(q_BTKGH, BATCH_AXES, None, groups, queries, None)
            k_BTKH, v_BTKH = (
                constrain(x, BATCH_AXES, None, groups, None) for x in (k_BTKH, v_BTKH)
            )
            q_BTKGH, k_BTKH, v_BTKH = (checkpoint_name(x, "qkv") for x in (q_BTKGH, k_BTKH, v_BTKH))
            scoring = Scoring.of(config, kind)
            if past is None or slots is None:
                out_BTKGH = attention(q_BTKGH, k_BTKH, v_BTKH, segment_ids_BT, scoring, config)
                return checkpoint_name(out_BTKGH, "attended"), None
            segment_ids_BS, start = slots
            k_BKSH, v_BKSH = extended = (
                write(past[0], k_BTKH.transpose(0, 2, 1, 3), start, axis=2),
                write(past[1], v_BTKH.transpose(0, 2, 1, 3), start, axis=2),
            )
            out_BTKGH = in_slots(
                q_BTKGH, k_BKSH, v_BKSH, segment_ids_BT, segment_ids_BS, start, scoring
            )
            return out_BTKGH, extended

        if self.kind:
            out_BTKGH, past = attend(self.kind, q_BTKGH, k_BTKH, v_BTKH)
        else:
            each = [functools.partial(attend, kind) for kind in dict.fromkeys(config.kinds)]
            out_BTKGH, past = jax.lax.switch(kind_index, each, q_BTKGH, k_BTKH, v_BTKH)
        out_BTKGH = constrain(out_BTKGH, BATCH_AXES, None, groups, queries, None)
        if "kv_heads" in masks:
            out_BTKGH *= masks["kv_heads"].astype(out_BTKGH.dtype)[None, None, :, None, None]
        if "q_per_kv" in masks:
            out_BTKGH *= masks["q_per_kv"].astype(out_BTKGH.dtype)[None, None, None, :, None]
        return _branch_output(w, _mapped(w, "out", out_BTKGH), config, masks), past


def _head_masks(masks: Masks, shape: tuple[int, ...]) -> tuple[jax.Array | None, jax.Array | None]:
    """The masks of a norm over all queries and of one over all keys: [K, G, H] and [K, H]."""
    if not {"kv_heads", "q_per_kv"} & set(masks):
        return None, None
    K, G, H = shape[2:]
    of_kv = masks.get("kv_heads", jnp.ones(K, jnp.float32))
    of_q = of_kv[:, None] * masks.get("q_per_kv", jnp.ones(G, jnp.float32))[None]
    of_keys = jnp.broadcast_to(of_kv[:, None], (K, H)) if "kv_heads" in masks else None
    return jnp.broadcast_to(of_q[..., None], (K, G, H)), of_keys


class MLP(nn.Module):
    """The gated MLP branch of a layer (SwiGLU with the activation "silu")."""

    config: TransformerConfig
    table: Mapping[str, Param]

    @nn.compact
    def __call__(self, x_BTD: jax.Array, masks: Masks) -> jax.Array:
        w = create(self, self.table, self.config)
        y_BTD = _branch_input(w, x_BTD, self.config, masks)
        activation = _ACTIVATIONS[self.config.activation]
        gate_BTF, up_BTF = (
            checkpoint_name(_mapped(w, name, y_BTD), "gate_up") for name in ("gate", "up")
        )
        a_BTF = activation(gate_BTF) * up_BTF
        a_BTF = constrain(a_BTF, BATCH_AXES, None, "tensor")
        if "mlp" in masks:
            a_BTF *= masks["mlp"].astype(a_BTF.dtype)[None, None]
        return _branch_output(w, _mapped(w, "down", a_BTF), self.config, masks)


class Layer(nn.Module):
    """Adds the attention branch, then the MLP branch, to x. Under `nn.scan`, x is the carry.

    Both branches are multiplied by `branch_mult`: `residual_mult`, and CompleteP's factor.
    Also returns the layer's cache, and sows its `relative_distance`.
    """

    config: TransformerConfig
    table: Mapping[str, Any]
    kind: str = ""  # as in `Attention`

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        layer_mask: jax.Array | None,
        kind_index: jax.Array | None,
        segment_ids_BT: jax.Array,
        angles: Mapping[str, Angles],
        masks: Masks,
        past: KeysValues | None = None,
        slots: Slots | None = None,
    ) -> tuple[jax.Array, KeysValues | None]:
        def scaled(branch_BTD: jax.Array) -> jax.Array:
            branch_BTD = checkpoint_name(branch_BTD, "branches")
            if self.config.branch_mult != 1:
                branch_BTD = branch_BTD * jnp.asarray(self.config.branch_mult, branch_BTD.dtype)
            if layer_mask is None:
                return branch_BTD
            return branch_BTD * layer_mask.astype(branch_BTD.dtype)

        attend = Attention(self.config, self.table["attention"], self.kind, name="attention")
        feed_forward = MLP(self.config, self.table["mlp"], name="mlp")
        # Between the branches the stream is also split over its tokens: norms and sums are local,
        # and each device keeps only its part of the stream for the gradient.
        stream = (BATCH_AXES, "tensor", None)
        branch_BTD, past = attend(x_BTD, kind_index, segment_ids_BT, angles, masks, past, slots)
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
