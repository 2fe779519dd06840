"""The negative log-likelihood of tokens, at once or in chunks of the vocabulary.

The logits of a batch can be the largest array of a train step: 8,192 tokens by 128,256 ids are
4.2 GB in float32, and the gradient has as many again. In chunks, no array [tokens, vocab] exists:

    forward    for each chunk of ids: the chunk's logits; a running maximum and sum of exponentials
    backward   for each chunk of ids: its logits again, their gradient, and from it the chunk's
               columns of the head's gradient, and a term of the stream's gradient

The running maximum and sum are those of Milakov and Gimelshein (arXiv 1805.02867, algorithm 3).

Shapes: B batch, T length, D embed, V vocab, P parts of the vocabulary (devices of mesh axis
tensor), N chunks, C ids of one part and chunk: V = P * N * C, in this order, so that each device
computes a part of every chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flm_jax.config import TransformerConfig
from flm_jax.models import readout as readouts
from flm_jax.models.layers import linear
from flm_jax.models.readout import Readout
from flm_jax.params.dtypes import wide
from flm_jax.params.sharding import BATCH_AXES, constrain, vocabulary_parts


def token_nats(
    readout: Readout, targets_BT: jax.Array, config: TransformerConfig, tokens: int | None = None
) -> jax.Array:
    """The negative log-likelihood of each target.

    Args:
      readout: the end of the model's forward pass.
      targets_BT: int32, the correct tokens.
      config: the model; `loss_chunks` says in how many chunks of the vocabulary it is computed.
      tokens: number of ids in the softmax, from id 0 on; None: all.

    Returns:
      [B, T], in nats, float32 (float64 with dtype "float64").

    Raises:
      UserError: the vocabulary cannot be divided into the chunks on this mesh.
    """
    if not config.loss_chunks:
        return nats_of_logits(readouts.logits(readout, config)[..., :tokens], targets_BT)
    columns = _Columns(vocabulary_parts(config), config.loss_chunks, tokens or config.vocab_size)
    return _chunked(config, columns, readout, targets_BT)


def nats_of_logits(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """The negative log-likelihood [B, T] of each target, in nats, from all logits."""
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT


def summed(nats_BT: jax.Array, weights_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums the weighted negative log-likelihoods.

    Both results are sums, so that those of microbatches and devices can be added.

    Args:
      nats_BT: of each target.
      weights_BT: the weight of each target; 0 leaves it out.

    Returns:
      The sum in nats, and the sum of the weights, both in the dtype of `nats_BT`.
    """
    weights_BT = weights_BT.astype(nats_BT.dtype)
    return jnp.sum(nats_BT * weights_BT), jnp.sum(weights_BT)


def cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`summed`, from all logits."""
    return summed(nats_of_logits(logits_BTV, targets_BT), weights_BT)


class _Columns(NamedTuple):
    """How the head's columns are divided into chunks.

    Attributes:
      parts: devices that the vocabulary is split over.
      chunks: number of chunks; each has columns of every part.
      tokens: columns from here on are not in the softmax.
    """

    parts: int
    chunks: int
    tokens: int

    def divided(self, x: jax.Array) -> jax.Array:
        """[.., V] -> [.., P, N, C]."""
        return x.reshape(*x.shape[:-1], self.parts, self.chunks, -1)

    def ids(self, chunk: jax.Array, size: int) -> jax.Array:
        """The ids of a chunk's columns: [P, C] with C = size."""
        first_P = jnp.arange(self.parts, dtype=jnp.int32) * (self.chunks * size) + chunk * size
        return first_P[:, None] + jnp.arange(size, dtype=jnp.int32)[None]


def _chunk_of(x: jax.Array, chunk: jax.Array) -> jax.Array:
    """[.., P, N, C] -> [.., P, C]."""
    part: jax.Array = jax.lax.dynamic_index_in_dim(x, chunk, x.ndim - 2, keepdims=False)
    return part


def _with_chunk(x: jax.Array, part: jax.Array, chunk: jax.Array) -> jax.Array:
    """Writes [.., P, C] into [.., P, N, C]."""
    dim = x.ndim - 2
    whole: jax.Array = jax.lax.dynamic_update_index_in_dim(x, part.astype(x.dtype), chunk, dim)
    return whole


def _finished(
    config: TransformerConfig,
    columns: _Columns,
    ids_PC: jax.Array,
    product_BTPC: jax.Array,
    log_mask_PC: jax.Array | None,
) -> jax.Array:
    """The logits of a chunk, from the head's product; very low for ids outside the softmax."""
    logits_BTPC = readouts.scaled_logits(product_BTPC, config)
    if log_mask_PC is not None:
        logits_BTPC += log_mask_PC[None, None]
    if columns.tokens == config.vocab_size:
        return logits_BTPC
    lowest = jnp.asarray(jnp.finfo(logits_BTPC.dtype).min / 2, logits_BTPC.dtype)
    return jnp.where((ids_PC < columns.tokens)[None, None], logits_BTPC, lowest)


class _Chunk(NamedTuple):
    """A chunk of the vocabulary, and the head's product with it.

    Attributes:
      ids_PC: the ids of its columns.
      head_DPC: its columns.
      log_mask_PC: their mask, if there is one.
      product_BTPC: the stream times the columns.
    """

    ids_PC: jax.Array
    head_DPC: jax.Array
    log_mask_PC: jax.Array | None
    product_BTPC: jax.Array

    @classmethod
    def of(
        cls, config: TransformerConfig, columns: _Columns, readout: Readout, chunk: jax.Array
    ) -> _Chunk:
        head_DPC = _chunk_of(columns.divided(readout.head_DV), chunk)
        # Gathered here, so that a device never has more of the head than this chunk.
        head_DPC = constrain(head_DPC, None, "tensor", None)
        mask_PNC = None if readout.log_mask_V is None else columns.divided(readout.log_mask_V)
        product_BTPC = linear(readout.x_BTD, head_DPC, wide(config.dtype))
        return cls(
            ids_PC=columns.ids(chunk, head_DPC.shape[-1]),
            head_DPC=head_DPC,
            log_mask_PC=None if mask_PNC is None else _chunk_of(mask_PNC, chunk),
            product_BTPC=constrain(product_BTPC, BATCH_AXES, None, "tensor", None),
        )

    def targets(self, targets_BT: jax.Array) -> jax.Array:
        """Which columns are targets: bool [B, T, P, C]."""
        return self.ids_PC[None, None] == targets_BT[..., None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(
    config: TransformerConfig, columns: _Columns, readout: Readout, targets_BT: jax.Array
) -> jax.Array:
    """`token_nats` in chunks."""
    return _chunked_fwd(config, columns, readout, targets_BT)[0]


def _chunked_fwd(
    config: TransformerConfig, columns: _Columns, readout: Readout, targets_BT: jax.Array
) -> tuple[jax.Array, tuple[Readout, jax.Array, jax.Array]]:
    """The result, and what the backward pass needs: the arguments and the log-normalisers."""
    stats = wide(config.dtype)
    Sums = tuple[jax.Array, jax.Array, jax.Array]

    def add(chunk: jax.Array, sums: Sums) -> Sums:
        highest_BTP, sum_BTP, target_BTP = sums
        here = _Chunk.of(config, columns, readout, chunk)
        logits_BTPC = _finished(config, columns, here.ids_PC, here.product_BTPC, here.log_mask_PC)
        higher_BTP = jnp.maximum(highest_BTP, logits_BTPC.max(-1))
        sum_BTP = sum_BTP * jnp.exp(highest_BTP - higher_BTP)
        sum_BTP += jnp.exp(logits_BTPC - higher_BTP[..., None]).sum(-1)
        zero = jnp.zeros((), stats)
        target_BTP += jnp.where(here.targets(targets_BT), logits_BTPC, zero).sum(-1)
        return higher_BTP, sum_BTP, target_BTP

    # Each part keeps its own maximum and sum, so that devices exchange them once, at the end.
    zeros_BTP = jnp.zeros((*targets_BT.shape, columns.parts), stats)
    zeros_BTP = constrain(zeros_BTP, BATCH_AXES, None, "tensor")
    start = (jnp.full_like(zeros_BTP, -jnp.inf), zeros_BTP, zeros_BTP)
    highest_BTP, sum_BTP, target_BTP = jax.lax.fori_loop(0, columns.chunks, add, start)
    highest_BT = highest_BTP.max(-1)
    sum_BT = (sum_BTP * jnp.exp(highest_BTP - highest_BT[..., None])).sum(-1)
    log_normaliser_BT = highest_BT + jnp.log(sum_BT)
    return log_normaliser_BT - target_BTP.sum(-1), (readout, targets_BT, log_normaliser_BT)


def _chunked_bwd(
    config: TransformerConfig,
    columns: _Columns,
    residuals: tuple[Readout, jax.Array, jax.Array],
    grad_BT: jax.Array,
) -> tuple[Readout, None]:
    """The gradient of the readout; the head's is written chunk by chunk."""
    readout, targets_BT, log_normaliser_BT = residuals
    x_BTD, stats = readout.x_BTD, wide(config.dtype)

    def add(chunk: jax.Array, grads: Readout) -> Readout:
        here = _Chunk.of(config, columns, readout, chunk)
        logits_BTPC, pull = jax.vjp(
            functools.partial(_finished, config, columns, here.ids_PC),
            here.product_BTPC,
            here.log_mask_PC,
        )
        probs_BTPC = jnp.exp(logits_BTPC - log_normaliser_BT[..., None, None])
        error_BTPC = probs_BTPC - here.targets(targets_BT).astype(stats)
        dproduct_BTPC, dmask_PC = pull(error_BTPC * grad_BT[..., None, None])
        # Products in the compute dtype with sums in float32, as in the forward pass.
        dproduct_BTPC = dproduct_BTPC.astype(x_BTD.dtype)
        einsum = functools.partial(jnp.einsum, preferred_element_type=stats)
        dx_BTD = einsum("BTPC,DPC->BTD", dproduct_BTPC, here.head_DPC.astype(x_BTD.dtype))
        dhead_DPC = einsum("BTD,BTPC->DPC", x_BTD, dproduct_BTPC)
        dmask = grads.log_mask_V
        return Readout(
            grads.x_BTD + constrain(dx_BTD, BATCH_AXES, None, None),
            _with_chunk(grads.head_DV, dhead_DPC, chunk),
            dmask if dmask is None else _with_chunk(dmask, dmask_PC, chunk),
        )

    # The head's gradient is [D, P, N, C], and the mask's [P, N, C], until the loop is done.
    log_mask_V = readout.log_mask_V
    zeros = Readout(
        jnp.zeros_like(x_BTD, stats),
        jnp.zeros_like(columns.divided(readout.head_DV)),
        None if log_mask_V is None else jnp.zeros_like(columns.divided(log_mask_V)),
    )
    dx_BTD, dhead_DPNC, dmask_PNC = jax.lax.fori_loop(0, columns.chunks, add, zeros)
    grads = Readout(
        dx_BTD.astype(x_BTD.dtype),
        dhead_DPNC.reshape(readout.head_DV.shape),
        None if dmask_PNC is None else dmask_PNC.reshape(-1),
    )
    return grads, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
