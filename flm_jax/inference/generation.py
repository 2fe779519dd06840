"""Text generation: one pass over a batch of prompts, then one token per step with a cache.

Shapes: B prompts, T tokens of the longest prompt, S slots of the cache, V vocab.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.config import TransformerConfig
from flm_jax.data.tokenizer import Tokenizer
from flm_jax.errors import UserError
from flm_jax.models import Cache, Transformer, by_layer

# Lengths are rounded up to a power of two times one of these, so that few programs are compiled.
_BUCKETS = (64, 96)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings: how the next token is chosen, and when a text ends.

    Attributes:
      max_new_tokens: the longest continuation, in tokens.
      temperature: the logits are divided by it; 0: the most likely token (greedy decoding).
      top_k: draws only from the k most likely tokens; 0: from all.
      top_p: draws only from the most likely tokens whose probabilities sum to `top_p`.
      stop_tokens: each of them ends the text, and is not part of it.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off)")


def generate(
    params: Any,
    config: TransformerConfig,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    key: jax.Array,
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[list[int]]:
    """Continues each prompt.

    Except for rounding, a continuation does not depend on the other prompts. The programs are
    compiled once for each config, number of prompts and rounded lengths (`bucket`).

    Args:
      params: nested dicts of arrays, the model's parameters.
      config: the model's config; ids beyond its tokens are not drawn.
      prompts: token ids, including the start token, of any lengths.
      sampling: how tokens are chosen.
      key: a random key, used for temperatures above 0. Prompt i draws its n-th token with a key
        that depends only on `key`, i and n.
      on_token: called with a prompt's index and its next token, as soon as the token is known. If
        it returns true, the prompt's text ends with this token.

    Returns:
      The new tokens of each prompt, without the stop token.

    Raises:
      UserError: a prompt is empty or holds an id that the model does not have.
    """
    _check(prompts, config)
    if not prompts:
        return []
    params = by_layer(params, config)
    cache, last_B, padding_B = _read(params, config, prompts, sampling.max_new_tokens)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(prompts)))
    limits = (
        jnp.float32(sampling.temperature),
        jnp.int32(sampling.top_k or config.vocab_size),
        jnp.float32(sampling.top_p),
    )
    greedy = sampling.temperature == 0
    stops = frozenset(sampling.stop_tokens)
    texts: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))

    def take(tokens_B: np.ndarray) -> None:
        for row in sorted(unfinished):
            token = int(tokens_B[row])
            if token in stops:
                unfinished.remove(row)
                continue
            texts[row].append(token)
            if on_token and on_token(row, token):
                unfinished.remove(row)

    pending = None
    for _ in range(sampling.max_new_tokens):
        cache, last_B = decode(params, cache, last_B, padding_B, keys_B, limits, config, greedy)
        if pending is not None:  # read while the next step computes
            take(np.asarray(pending))
            if not unfinished:
                return texts
        pending = last_B
    take(np.asarray(pending))
    return texts


def bucket(length: int) -> int:
    """Rounds a length up to 64, 96, 128, 192, 256, 384, ...

    >>> bucket(65), bucket(97)
    (96, 128)
    """
    scale = 1
    while True:
        for size in _BUCKETS:
            if length <= size * scale:
                return size * scale
        scale *= 2


def _read(
    params: Any, config: TransformerConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[Cache, jax.Array, jax.Array]:
    """Returns a cache of the prompts without their last tokens, these tokens, and the padding.

    Padding is on the left, so that all rows continue in the same slot. `decode` starts with the
    last token: the head is never computed for the prompt.
    """
    T = bucket(max(len(p) for p in prompts) - 1)
    padding_B = np.array([T - (len(p) - 1) for p in prompts], np.int32)
    tokens_BT = np.zeros((len(prompts), T), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, padding_B[row] :] = prompt[:-1]
    cache = Cache.empty(config, len(prompts), bucket(T + max_new_tokens))
    cache = prefill(params, cache, tokens_BT, padding_B, config)
    last_B = np.array([p[-1] for p in prompts], np.int32)
    return cache, jnp.asarray(last_B), jnp.asarray(padding_B)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill(
    params: Any,
    cache: Cache,
    tokens_BT: jax.Array,
    padding_B: jax.Array,
    config: TransformerConfig,
) -> Cache:
    """Fills an empty cache with the prompts.

    Args:
      params: the model's parameters, split by layer (`models.by_layer`).
      cache: an empty cache of T slots or more; donated.
      tokens_BT: int32, the prompts' tokens; each row starts with its padding.
      padding_B: int32, number of padding tokens in each row; they are ignored.
      config: the model's config.

    Returns:
      The cache of T tokens.
    """
    positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None] - padding_B[:, None]
    real_BT = positions_BT >= 0
    return _extend(params, config, tokens_BT, real_BT, jnp.maximum(positions_BT, 0), cache)[1]


@functools.partial(jax.jit, static_argnames=("config", "greedy"), donate_argnames="cache")
def decode(
    params: Any,
    cache: Cache,
    tokens_B: jax.Array,
    padding_B: jax.Array,
    keys_B: jax.Array,
    limits: tuple[jax.Array, jax.Array, jax.Array],
    config: TransformerConfig,
    greedy: bool,
) -> tuple[Cache, jax.Array]:
    """Adds one token to each row, and chooses the next one.

    Args:
      params: the model's parameters, split by layer (`models.by_layer`).
      cache: the tokens so far; donated.
      tokens_B: int32, the tokens to add.
      padding_B: int32, number of padding tokens in each row, as in `prefill`.
      keys_B: a random key for each row; the token's position is folded into it.
      limits: temperature, top_k and top_p, as `sample` takes them.
      config: the model's config.
      greedy: chooses the most likely token, and ignores keys and limits.

    Returns:
      The cache with the added tokens, and the next tokens, int32 [B].
    """
    positions_B = cache.length - padding_B
    real_B1 = jnp.ones_like(tokens_B, bool)[:, None]
    logits_B1V, cache = _extend(
        params, config, tokens_B[:, None], real_B1, positions_B[:, None], cache
    )
    logits_BV = logits_B1V[:, 0, : config.tokens]
    if greedy:
        return cache, jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    keys_B = jax.vmap(jax.random.fold_in)(keys_B, positions_B)
    return cache, sample(logits_BV, keys_B, *limits)


def _extend(
    params: Any,
    config: TransformerConfig,
    tokens_BT: jax.Array,
    real_BT: jax.Array,
    positions_BT: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Adds tokens to the cache; returns their logits [B, T, V] and the cache."""
    extended: tuple[jax.Array, Cache] = Transformer(config).apply(  # type: ignore[assignment]
        {"params": params},
        tokens_BT,
        real_BT.astype(jnp.int32),
        positions_BT,
        cache,
        method="extend",
    )
    return extended


def sample(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
) -> jax.Array:
    """Draws a token for each row, among the tokens that top_k and top_p keep.

    Top-p sorts the tokens by probability (after the temperature) and keeps them up to and including
    the one at which their sum reaches `top_p` (nucleus sampling, arXiv 1904.09751).

    Args:
      logits_BV: the logits.
      keys_B: a random key for each row.
      temperature: float scalar above 0; divides the logits.
      top_k: int scalar, number of most likely tokens to keep.
      top_p: float scalar, above 0 and at most 1 (keeps all).

    Returns:
      The tokens, int32 [B].
    """
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    sorted_BV = sorted_BV / temperature.astype(sorted_BV.dtype)
    rank_V = jnp.arange(logits_BV.shape[-1], dtype=jnp.int32)
    in_k_BV = jnp.broadcast_to(rank_V[None] < top_k, sorted_BV.shape)
    lowest = jnp.asarray(-jnp.inf, sorted_BV.dtype)
    probs_BV = jax.nn.softmax(jnp.where(in_k_BV, sorted_BV, lowest), axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    kept_BV = in_k_BV & ((before_BV < top_p.astype(probs_BV.dtype)) | (rank_V[None] == 0))
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, jnp.where(kept_BV, sorted_BV, lowest))
    return jnp.take_along_axis(order_BV, drawn_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


class TextStream:
    """Decodes one row token by token, and ends its text at a stop text.

    Text is shown as soon as it is final. A possible start of a stop text and an incomplete
    character are held back.

    Attributes:
      stopped: whether a stop text is complete.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        show: Callable[[str], None] | None = None,
    ):
        """Starts an empty text.

        Args:
          tokenizer: decodes the tokens.
          stops: the text ends before the first of them; empty ones are ignored.
          show: called with each new part of the text.
        """
        self._tokenizer = tokenizer
        self._stops = tuple(stop for stop in stops if stop)
        self._show = show
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._shown = 0  # characters that were shown
        self.stopped = False

    def add(self, token: int) -> bool:
        """Adds the next token; returns whether a stop text is complete."""
        self._take(self._decoder.decode(self._tokenizer.decode_bytes([token])), last=False)
        return self.stopped

    def end(self) -> str:
        """Shows the text that was held back; returns the whole text, without the stop text."""
        if not self.stopped:
            self._take(self._decoder.decode(b"", final=True), last=True)
        return self._text

    def _take(self, more: str, last: bool) -> None:
        searched = max(0, len(self._text) - max(map(len, self._stops), default=0))
        self._text += more
        places = [self._text.find(stop, searched) for stop in self._stops]
        places = [place for place in places if place >= 0]
        if places:
            self._text = self._text[: min(places)]
            self.stopped = True
        final = len(self._text)  # characters that cannot be part of a stop text
        if not (last or self.stopped):
            final -= max((_overlap(self._text, stop) for stop in self._stops), default=0)
        if self._show and final > self._shown:
            self._show(self._text[self._shown : final])
        self._shown = max(final, self._shown)


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that is a proper prefix of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


def check_context(prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int) -> None:
    """Checks that each prompt and its continuation fit in the model's context.

    RoPE itself has no limit, but a model is untested beyond the sequence length of its training.

    Args:
      prompts: token ids.
      max_new_tokens: length of the longest continuation, in tokens.
      context: sequence length of the model's training, in tokens; 0: unknown, any length passes.

    Raises:
      UserError: a prompt and its continuation are longer than the context.
    """
    for index, prompt in enumerate(prompts):
        if context and len(prompt) + max_new_tokens > context:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens, with max_new_tokens {max_new_tokens} "
                f"that is more than the model's context of {context}; shorten one, or set context "
                "to go beyond it",
                argument="context",
            )


def _check(prompts: Sequence[Sequence[int]], config: TransformerConfig) -> None:
    """Raises UserError if a prompt is empty or holds an unknown token."""
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {index} is empty; give at least the model's start token")
        wrong = [t for t in prompt if not 0 <= t < config.vocab_size]
        if wrong:
            raise UserError(
                f"prompt {index} holds token {wrong[0]}, but the model's vocab_size is "
                f"{config.vocab_size}; use the tokenizer that it was trained with"
            )
