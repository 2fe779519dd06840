"""Causal attention inside packed documents: one function, with a kernel for each platform.

Shapes: B batch, T length, Q queries of one chunk, S keys (slots of a cache, or those that a chunk
can see), K key/value heads, G query heads per key/value head, H head size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flm_jax.config import TransformerConfig
from flm_jax.execution import SplashConfig
from flm_jax.models.documents import document_spans
from flm_jax.params.dtypes import wide
from flm_jax.params.sharding import BATCH_AXES, constrain, head_axes

# Queries are cut into at most this many chunks, and each chunk uses only the keys up to its end.
# With 8 chunks, 44% of the score matrix is never computed.
_CHUNKS = 8
_SMALLEST_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How scores are made, and which tokens a query sees.

    Attributes:
      mult: factor on the product of query and key.
      softcap: scores s become softcap * tanh(s / softcap); 0: unchanged.
      window: a query sees this many tokens, its own among them; 0: all earlier ones.
    """

    mult: float
    softcap: float = 0.0
    window: int = 0

    @classmethod
    def of(cls, config: TransformerConfig, kind: str) -> Scoring:
        """That of a layer of this kind."""
        window = config.window if kind.startswith("sliding") else 0
        return cls(config.score_mult, config.attention_softcap, window)


def soft_capped(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap); x itself where cap is 0."""
    return x if cap == 0 else cap * jnp.tanh(x / cap)


def attention(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    scoring: Scoring,
    config: TransformerConfig,
) -> jax.Array:
    """Softmax attention of each token to itself and to earlier tokens of its segment.

    Scores and softmax are float32 or wider.

    Args:
      q_BTKGH: queries.
      k_BTKH: keys.
      v_BTKH: values.
      segment_ids_BT: int32 document of each token, 0 for padding.
      scoring: factor, cap and window.
      config: gives the implementation and its settings. `attention` is "plain"; "splash", the TPU's
        Pallas kernel; "cudnn", the GPU's; "auto": the platform's own. A kernel needs lengths and
        head sizes that are multiples of its tiles, and cuDNN's has no cap; for others "plain" is
        used.

    Returns:
      [B, T, K, G, H], in the dtype of the values.

    Raises:
      UserError: the tiles of splash do not divide the length.
    """
    implementation = config.attention
    if implementation == "auto":
        implementation = {"tpu": "splash", "gpu": "cudnn"}.get(jax.default_backend(), "plain")
    T, H = q_BTKGH.shape[1], q_BTKGH.shape[-1]
    supported = {
        "splash": T % SplashConfig.TILE == 0 and H % SplashConfig.TILE == 0,
        "cudnn": T % 64 == 0
        and H % 8 == 0
        and H <= 128
        and q_BTKGH.dtype == jnp.bfloat16
        and scoring.softcap == 0,
    }
    if not supported.get(implementation, False):
        implementation = "plain"
    arrays = (q_BTKGH, k_BTKH, v_BTKH, segment_ids_BT)
    if implementation == "splash":
        return splash(*arrays, scoring, config.splash)
    if implementation == "cudnn":
        return cudnn(*arrays, scoring, config.cudnn_documents)
    return plain(*arrays, scoring)


def splash(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    scoring: Scoring,
    tiles: SplashConfig,
    interpret: bool = False,
) -> jax.Array:
    """JAX's Pallas kernel for TPUs, on each device's own sequences and heads.

    Shapes as in `attention`; `tiles` are the kernel's blocks; `interpret` runs the kernel step by
    step on any platform, for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    T = q_BTKGH.shape[1]
    blocks = tiles.blocks(T)
    sizes = kernels.BlockSizes(
        block_q=blocks["block_q"],
        block_kv=blocks["block_kv"],
        block_kv_compute=blocks["block_kv_compute"],
        block_q_dkv=blocks["block_q_backward"],
        block_kv_dkv=blocks["block_kv_backward"],
        block_kv_dkv_compute=blocks["block_kv_compute_backward"],
        use_fused_bwd_kernel=True,
    )

    def local(
        q_BTKGH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array
    ) -> jax.Array:
        G = q_BTKGH.shape[3]  # on this device
        seen: Any = masks.CausalMask((T, T))
        if scoring.window:
            seen = masks.LocalMask((T, T), window_size=(scoring.window - 1, 0), offset=0)
        kernel = kernels.make_splash_mqa_single_device(
            mask=masks.MultiHeadMask([seen] * G),
            block_sizes=sizes,
            # A policy that keeps the result keeps what the backward kernel needs with it.
            residual_checkpoint_name="attended",
            attn_logits_soft_cap=scoring.softcap or None,
            interpret=interpret,
        )

        def one_sequence(
            q_TKGH: jax.Array, k_TKH: jax.Array, v_TKH: jax.Array, ids_T: jax.Array
        ) -> jax.Array:
            ids = kernels.SegmentIds(q=ids_T, kv=ids_T)
            heads = jax.vmap(lambda q_GTH, k_TH, v_TH: kernel(q_GTH, k_TH, v_TH, ids))
            out_KGTH: jax.Array = heads(
                q_TKGH.transpose(1, 2, 0, 3), k_TKH.transpose(1, 0, 2), v_TKH.transpose(1, 0, 2)
            )
            return out_KGTH.transpose(2, 0, 1, 3)

        return jax.vmap(one_sequence)(q_BTKGH, k_BTKH, v_BTKH, segment_ids_BT)

    scaled_BTKGH = q_BTKGH * jnp.asarray(scoring.mult, q_BTKGH.dtype)
    if jax.sharding.get_abstract_mesh().empty:
        return local(scaled_BTKGH, k_BTKH, v_BTKH, segment_ids_BT)
    groups, queries = head_axes(*q_BTKGH.shape[2:4])
    heads = PartitionSpec(BATCH_AXES, None, groups, queries)
    keys = PartitionSpec(BATCH_AXES, None, groups)
    specs = (heads, keys, keys, PartitionSpec(BATCH_AXES))
    # The kernel does not declare how its results vary over the mesh, so this cannot be checked.
    mapped = jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)
    out_BTKGH: jax.Array = mapped(scaled_BTKGH, k_BTKH, v_BTKH, segment_ids_BT)
    return out_BTKGH


def cudnn(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    scoring: Scoring,
    documents: int = 0,
) -> jax.Array:
    """cuDNN's flash attention. Shapes as in `attention`.

    Documents are told apart by their offsets in each row, at most so many of them; 0: by a mask,
    which cuDNN takes as a bias [B, 1, T, T].
    """
    B, T, K, G, H = q_BTKGH.shape
    q_BTNH = q_BTKGH.reshape(B, T, K * G, H)
    if documents > 1:
        # jax 0.10 multiplies the offsets of keys by the number of query heads (its PR 39521), so
        # that keys of several query heads are repeated.
        k_BTNH, v_BTNH = (jnp.repeat(x, G, axis=2) for x in (k_BTKH, v_BTKH))
        out_BTNH = by_offsets(q_BTNH, k_BTNH, v_BTNH, segment_ids_BT, scoring, documents)
        return out_BTNH.reshape(B, T, K, G, H)
    same_B1TT = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
    # cuDNN refuses a bias that is split along its tokens, which XLA does if nothing else is said.
    same_B1TT = constrain(same_B1TT, BATCH_AXES, None, None, None)
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        mask=same_B1TT,
        scale=scoring.mult,
        is_causal=True,
        local_window_size=(scoring.window - 1, 0) if scoring.window else None,
        implementation="cudnn",
    )
    return out_BTNH.reshape(B, T, K, G, H)


def by_offsets(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    segment_ids_BT: jax.Array,
    scoring: Scoring,
    documents: int,
) -> jax.Array:
    """cuDNN's flash attention inside documents that are given by their offsets: [B, T, N, H].

    A row with more documents gives NaN, so that training stops at it.
    """
    # jax.nn's function has no offsets.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    spans = document_spans(segment_ids_BT, documents)
    out_BTNH: jax.Array = dot_product_attention(
        q_BTNH,
        k_BTNH,
        v_BTNH,
        q_seqlen=spans.lengths_BM,
        kv_seqlen=spans.lengths_BM,
        q_offsets=spans.starts_BM,
        kv_offsets=spans.starts_BM,
        scale=scoring.mult,
        mask_type=MaskType.PADDING_CAUSAL,
        sliding_window_length=scoring.window or None,
    )
    nan = jnp.asarray(jnp.nan, out_BTNH.dtype)
    return jnp.where(spans.too_many_B[:, None, None, None], nan, out_BTNH)


def plain(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    scoring: Scoring,
) -> jax.Array:
    """Attention without a kernel: any platform, length and dtype. Shapes as in `attention`."""
    k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    return in_slots(q_BTKGH, k_BKTH, v_BKTH, segment_ids_BT, segment_ids_BT, 0, scoring)


def in_slots(
    q_BTKGH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segment_ids_BT: jax.Array,
    segment_ids_BS: jax.Array,
    start: int | jax.Array,
    scoring: Scoring,
) -> jax.Array:
    """Attention to keys and values in slots.

    Query t is in slot start + t, and attends to this slot and to earlier slots of its segment, all
    or those in its window. It is computed in chunks of queries. If `start` is known at compile
    time, a chunk uses only the slots that its queries can see.

    Args:
      q_BTKGH: queries.
      k_BKSH: keys by slot.
      v_BKSH: values by slot.
      segment_ids_BT: int32 document of each query.
      segment_ids_BS: int32 document of each slot.
      start: slot of the first query.
      scoring: factor, cap and window.

    Returns:
      [B, T, K, G, H], in the dtype of the values.
    """
    T, S, window = q_BTKGH.shape[1], k_BKSH.shape[2], scoring.window
    # Heads come before tokens, so that the batch axes of every product lead.
    q_BKGTH = (q_BTKGH * jnp.asarray(scoring.mult, q_BTKGH.dtype)).transpose(0, 2, 3, 1, 4)
    chunk = max(_SMALLEST_CHUNK, -(-T // _CHUNKS))
    out = []
    for first in range(0, T, chunk):
        end = min(first + chunk, T)
        known = isinstance(start, int)
        lead = max(0, start + first - window + 1) if known and window else 0
        seen = start + end if known else S
        scores_BKGQS = jnp.einsum(
            "BKGQH,BKSH->BKGQS",
            q_BKGTH[:, :, :, first:end],
            k_BKSH[:, :, lead:seen],
            preferred_element_type=wide(q_BTKGH.dtype),
        )
        scores_BKGQS = soft_capped(scores_BKGQS, scoring.softcap)
        slots_Q = start + jnp.arange(first, end, dtype=jnp.int32)
        slots_S = jnp.arange(lead, seen, dtype=jnp.int32)
        visible_QS = slots_Q[:, None] >= slots_S[None]
        if window:
            visible_QS &= slots_Q[:, None] - slots_S[None] < window
        same_BQS = segment_ids_BT[:, first:end, None] == segment_ids_BS[:, None, lead:seen]
        # A bias is added, not selected: it costs one cheap pass forward and none backward.
        lowest = jnp.asarray(jnp.finfo(scores_BKGQS.dtype).min / 2, scores_BKGQS.dtype)
        bias_BQS = jnp.where(visible_QS[None] & same_BQS, jnp.zeros_like(lowest), lowest)
        scores_BKGQS += bias_BQS[:, None, None]
        probs_BKGQS = jax.nn.softmax(scores_BKGQS, axis=-1).astype(v_BKSH.dtype)
        out.append(jnp.einsum("BKGQS,BKSH->BKGQH", probs_BKGQS, v_BKSH[:, :, lead:seen]))
    return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4)
