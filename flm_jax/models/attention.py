"""Causal attention inside packed documents.

Shapes: B batch, T queries, S keys, K key/value heads, G query heads per key/value head,
H head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flm_jax.precision import wide


def attention(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """Softmax attention to earlier tokens of the same segment; returns [B, T, K, G, H].

    Scores are divided by sqrt(H); the softmax's statistics are float32 or wider.
    """
    scale = q_BTKGH.shape[-1] ** -0.5
    T = q_BTKGH.shape[1]
    stats = wide(q_BTKGH.dtype)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH * jnp.asarray(scale, q_BTKGH.dtype), k_BSKH,
        preferred_element_type=stats,
    )  # fmt: skip
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    causal_TS = jnp.tril(jnp.ones((T, T), bool))
    allowed_BTS = same_BTS & causal_TS[None]
    scores_BKGTS = jnp.where(allowed_BTS[:, None, None], scores_BKGTS, jnp.finfo(stats).min)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH)
