"""Packed documents as offsets and lengths.

Shapes: B batch, T length, M documents of a row at most.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Spans(NamedTuple):
    """Where the documents of each row are.

    Attributes:
      starts_BM: int32 [B, M + 1], first token of each document; then -1.
      lengths_BM: int32 [B, M], tokens of each document; then -1.
      too_many_B: bool, whether a row has more than M documents; its last one then holds the rest.
    """

    starts_BM: jax.Array
    lengths_BM: jax.Array
    too_many_B: jax.Array


def document_spans(segment_ids_BT: jax.Array, documents: int) -> Spans:
    """Finds the runs of equal numbers in each row; padding is a document, too.

    Args:
      segment_ids_BT: int32 number of each token's document.
      documents: M.
    """
    T = segment_ids_BT.shape[1]
    starts_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)),
                        constant_values=True)  # fmt: skip

    def of_row(starts_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        starts_M = jnp.nonzero(starts_T, size=documents, fill_value=T)[0].astype(jnp.int32)
        ends_M = jnp.append(starts_M[1:], jnp.int32(T))
        real_M = starts_M < T
        starts_M = jnp.append(jnp.where(real_M, starts_M, -1), jnp.int32(-1))
        return starts_M, jnp.where(real_M, ends_M - starts_M[:-1], -1)

    starts_BM, lengths_BM = jax.vmap(of_row)(starts_BT)
    return Spans(starts_BM, lengths_BM, starts_BT.sum(1) > documents)
