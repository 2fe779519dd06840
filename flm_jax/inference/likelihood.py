"""Log-likelihoods of continuations, in batches of similar lengths.

Shapes: B pairs, T tokens, V vocab.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.config import TransformerConfig
from flm_jax.errors import UserError
from flm_jax.inference.generation import bucket
from flm_jax.models import Transformer

Item = TypeVar("Item")
Pair = tuple[Sequence[int], Sequence[int]]  # context, and the continuation that is scored


def loglikelihoods(
    params: Any, config: TransformerConfig, pairs: Sequence[Pair], batch_size: int = 8
) -> list[tuple[float, bool]]:
    """Computes log-likelihoods of continuations, given their contexts.

    Args:
      params: nested dicts of arrays, the model's parameters.
      config: the model's config.
      pairs: contexts and continuations, as token ids. A context has one token or more,
        including the start token.
      batch_size: number of pairs in a batch. Smaller batches are padded, so only one program is
        compiled for each rounded length (`generation.bucket`).

    Returns:
      For each pair log P(continuation | context) in nats, and whether every token of the
      continuation is the most likely one (greedy decoding would give it).

    Raises:
      UserError: a context is empty, so nothing predicts the continuation's first token.
    """
    for index, (context, _) in enumerate(pairs):
        if not len(context):
            raise UserError(f"pair {index} has no context; give at least the model's start token")
    rows = [([*context, *continuation][:-1], continuation) for context, continuation in pairs]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    for T, group in itertools.groupby(order, key=lambda i: bucket(len(rows[i][0]))):
        for chosen in batched(group, batch_size):
            batch = _batch([rows[i] for i in chosen], batch_size, T)
            sums_B, greedy_B = jax.device_get(_score(params, config, *batch))
            for i, nats, greedy in zip(chosen, sums_B, greedy_B, strict=False):
                results[i] = float(nats), bool(greedy)
    return results


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields lists of `size` items; the last may be shorter (Python 3.12's itertools.batched).

    >>> list(batched([1, 2, 3], 2))
    [[1, 2], [3]]
    """
    rest = iter(items)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk


def _batch(rows: Sequence[Pair], size: int, length: int) -> tuple[np.ndarray, ...]:
    """Pads rows on the right.

    Returns:
      Tokens, 1 where a token is real, targets, and 1 where a target is scored: int32 [B, T] each.
    """
    tokens_BT, real_BT, targets_BT, counts_BT = np.zeros((4, size, length), np.int32)
    for row, (tokens, continuation) in enumerate(rows):
        end = len(tokens)
        start = end - len(continuation)
        tokens_BT[row, :end] = tokens
        real_BT[row, :end] = 1
        targets_BT[row, start:end] = continuation
        counts_BT[row, start:end] = 1
    return tokens_BT, real_BT, targets_BT, counts_BT


@functools.partial(jax.jit, static_argnames="config")
def _score(
    params: Any,
    config: TransformerConfig,
    tokens_BT: jax.Array,
    real_BT: jax.Array,
    targets_BT: jax.Array,
    counts_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns log-likelihoods [B] in nats, and whether greedy decoding gives the continuation."""
    logits_BTV: jax.Array = Transformer(config).apply({"params": params}, tokens_BT, real_BT)  # type: ignore[assignment]
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    nats_BT = target_BT - jax.nn.logsumexp(logits_BTV, axis=-1)
    most_likely_BT = jnp.argmax(logits_BTV, axis=-1).astype(targets_BT.dtype) == targets_BT
    counted_BT = counts_BT > 0
    return (
        jnp.sum(jnp.where(counted_BT, nats_BT, jnp.zeros_like(nats_BT)), axis=1),
        jnp.all(most_likely_BT | ~counted_BT, axis=1),
    )
