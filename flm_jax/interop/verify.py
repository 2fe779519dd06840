"""Compares a converted model's logits with transformers', on ragged random sequences.

Distances are the largest difference of two logits, over the root mean square of the first ones.
Both models are whole in memory, one after the other.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax import extras
from flm_jax.config import TransformerConfig
from flm_jax.errors import UserError
from flm_jax.interop import hf_config
from flm_jax.interop.families import FAMILIES
from flm_jax.interop.opening import StoredModel, open_stored_model
from flm_jax.interop.weights import load
from flm_jax.train.train_step import logits_of

# The largest distance between transformers' logits and ours for the same files.
LIMIT = 1e-4
# The largest distance between our logits before and after, for each dtype of the written files.
CHANGE_LIMITS = {"float32": LIMIT, "float16": 0.05, "bfloat16": 0.5}
_LENGTHS = (48, 31, 7)  # tokens of the sequences; fewer in a model with a shorter context


def check_possible(source: str, format: str) -> None:
    """Checks, before a conversion, that `verify` can compare it.

    Args:
      source: the model to convert, as for `convert`.
      format: the format to write.

    Raises:
      UserError: torch or transformers is missing, transformers does not have the family, or neither
        side is a folder of Hugging Face files.
    """
    extras.require("torch", "transformers", purpose="verify", instead="leave verify out")
    import transformers

    if format in FAMILIES:
        model_type = FAMILIES[format].model_type
    else:
        opened = open_stored_model(source)
        if opened.config is not None:
            raise UserError(
                f"verify compares with transformers, but source {source} and format {format!r} are "
                "both runs of this library; leave verify out"
            )
        model_type = hf_config.read(opened.path).family.model_type
    if model_type not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"verify compares with transformers, which has no model_type {model_type!r}; leave "
            "verify out"
        )


def verify(
    source: str, target: str, stage: str = "", step: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Compares the two models of a conversion, and the Hugging Face one with transformers.

    Args:
      source, stage, step: the converted model, as for `convert`.
      target: what `convert` wrote.
      seed: of the tokens.

    Returns:
      JSON values: `distance` between transformers and our decoder, for the target's files (the
      source's if the target is a run), and its `limit`; `change` between our decoder's logits for
      the source and for the target, and its `change_limit`; None: not finite. `ok`: neither is
      above its limit.

    Raises:
      UserError: a model cannot be opened.
    """
    before, after = open_stored_model(source, stage, step), open_stored_model(target)
    files = after if after.config is None else before
    rows = _sequences(before, after, seed)
    logits = {model.path: _decoder_logits(model, rows) for model in (before, after)}
    distance = _finite(relative_distance(torch_logits(files.path, rows), logits[files.path]))
    common = min(before.weights.config.vocab_size, after.weights.config.vocab_size)
    change = _finite(
        relative_distance(*([x[:, :common] for x in logits[m.path]] for m in (before, after)))
    )
    limit = CHANGE_LIMITS.get(after.dtype.name, LIMIT)
    return {
        "distance": distance,
        "limit": LIMIT,
        "change": change,
        "change_limit": limit,
        "ok": distance is not None and distance <= LIMIT and change is not None and change <= limit,
    }


def summary(result: Mapping[str, Any]) -> str:
    """A result of `verify` in one line."""
    return (
        f"logits differ by {_text(result['distance'])} of their scale between transformers and "
        f"this library (limit {result['limit']:g}), and by {_text(result['change'])} between "
        f"source and target (limit {result['change_limit']:g})"
    )


def failure(result: Mapping[str, Any]) -> str:
    """What is wrong with a result of `verify`; "" if nothing is."""
    return "" if result["ok"] else f"verify failed: {summary(result)}"


def torch_logits(folder: pathlib.Path, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """transformers' logits of each sequence, in float32; the batch is padded on the right.

    Args:
      folder: Hugging Face files.
      rows: tokens [T] of each sequence.

    Returns:
      Logits [T, V] of each sequence.
    """
    import torch
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens, mask = (torch.from_numpy(x.astype(np.int64)) for x in _padded(rows))
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits.numpy()
    return [logits[i, : len(row)] for i, row in enumerate(rows)]


def our_logits(
    params: Any, config: TransformerConfig, rows: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Our logits [T, V] of each sequence, from one batch that is padded on the right."""
    tokens, segments = _padded(rows)
    batch = {
        "tokens": jnp.asarray(tokens),
        "segment_ids": jnp.asarray(segments),
        "positions": jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape),
    }
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(jax.jit(logits_of, static_argnums=0)(config, params, batch))
    return [logits[i, : len(row)] for i, row in enumerate(rows)]


def relative_distance(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    """The largest difference, over the first's root mean square; not finite if a logit is not."""
    first, second = (np.concatenate([x.ravel() for x in logits]) for logits in (a, b))
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        return float(np.abs(first - second).max() / np.sqrt(np.mean(first**2)))


def _decoder_logits(model: StoredModel, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Our logits of a stored model in float32, whatever dtype it is stored and trained in."""
    config = dataclasses.replace(model.weights.config, dtype="float32")
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), load(model.weights))
    return our_logits(params, config, rows)


def _sequences(before: StoredModel, after: StoredModel, seed: int) -> list[np.ndarray]:
    """Random sequences of tokens that both models have, not longer than either's context."""
    rng = np.random.default_rng(seed)
    tokens = min(m.weights.config.vocab_size for m in (before, after))
    longest = min(m.context or max(_LENGTHS) for m in (before, after))
    return [rng.integers(0, tokens, min(length, longest)) for length in _LENGTHS]


def _padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """int32 [B, T]: the tokens, and 1 where a sequence has one."""
    shape = (len(rows), max(map(len, rows)))
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, 1
    return tokens, mask


def _finite(distance: float) -> float | None:
    return distance if np.isfinite(distance) else None


def _text(distance: float | None) -> str:
    return "not finite" if distance is None else f"{distance:.1e}"
