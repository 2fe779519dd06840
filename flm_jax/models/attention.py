"""Causal attention inside packed documents.

Shapes: B batch, T length, Q queries of one chunk, S keys that the chunk can see, K key/value heads,
G query heads per key/value head, H head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flm_jax.precision import wide

# Queries are cut into at most this many chunks, each of which meets only the keys up to its end:
# with 8, 44% of the score matrix is never computed.
_CHUNKS = 8
_SMALLEST_CHUNK = 64


def attention(
    q_BTKGH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """Softmax attention to earlier tokens of the same segment; returns [B, T, K, G, H].

    Scores are divided by sqrt(H); scores and softmax are float32 or wider.
    """
    T, H = q_BTKGH.shape[1], q_BTKGH.shape[-1]
    # Heads before tokens: the batch axes of every product lead, so each is one plain matrix.
    q_BKGTH = (q_BTKGH * jnp.asarray(H**-0.5, q_BTKGH.dtype)).transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    chunk = max(_SMALLEST_CHUNK, -(-T // _CHUNKS))
    out = []
    for start in range(0, T, chunk):
        end = min(start + chunk, T)
        q_BKGQH, k_BKSH, v_BKSH = (
            q_BKGTH[:, :, :, start:end],
            k_BKTH[:, :, :end],
            v_BKTH[:, :, :end],
        )
        scores_BKGQS = jnp.einsum(
            "BKGQH,BKSH->BKGQS", q_BKGQH, k_BKSH, preferred_element_type=wide(q_BTKGH.dtype)
        )
        causal_QS = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None]
        same_BQS = segment_ids_BT[:, start:end, None] == segment_ids_BT[:, None, :end]
        # Added rather than selected: one cheap pass forward, and none backward.
        lowest = jnp.asarray(jnp.finfo(scores_BKGQS.dtype).min / 2, scores_BKGQS.dtype)
        bias_BQS = jnp.where(causal_QS[None] & same_BQS, jnp.zeros_like(lowest), lowest)
        scores_BKGQS += bias_BQS[:, None, None]
        probs_BKGQS = jax.nn.softmax(scores_BKGQS, axis=-1).astype(v_BTKH.dtype)
        out.append(jnp.einsum("BKGQS,BKSH->BKGQH", probs_BKGQS, v_BKSH))
    return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4)
