"""What a run says before it trains: its devices, and how its text compares with what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from flm_jax.config import ExperimentConfig
from flm_jax.params.sharding import Layout
from flm_jax.runtime import host

if TYPE_CHECKING:
    from flm_jax.data.pipeline import Corpus

MOST_PASSES = 4  # over the same text; more help less and less (arXiv 2305.16264)
_NAMED = 3  # files that were not read


def lines(config: ExperimentConfig, layouts: Sequence[Layout], corpus: Corpus) -> list[str]:
    """Returns the lines to print before the first step.

    Args:
      config: the chain, as it runs on its devices.
      layouts: mesh of each stage.
      corpus: the chain's data, opened.
    """
    return [devices(config, layouts), *text(config, corpus)]


def devices(config: ExperimentConfig, layouts: Sequence[Layout]) -> str:
    """One line: devices, kind, memory, mesh, precision; of each stage where stages differ."""
    found = jax.devices()
    # Only a process's own devices tell their memory.
    stats = jax.local_devices()[0].memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        memory = f"{limit / 1e9:.1f} GB each"
    else:
        memory = f"{host.memory_bytes() / 1e9:.1f} GB in this machine"
    meshes = [" x ".join(f"{axis} {n}" for axis, n in mesh.shape.items()) for mesh, _ in layouts]
    dtypes = [stage.model.dtype for stage in config.stages]
    kinds = dict.fromkeys((found[0].platform, found[0].device_kind))
    return (
        f"devices: {len(found)} x {' '.join(kinds)}, {memory}; "
        f"mesh: {_of_stages(config, meshes)}; precision: {_of_stages(config, dtypes)}"
    )


def _of_stages(config: ExperimentConfig, values: Sequence[str]) -> str:
    """The value of all stages, or of each if they differ."""
    if len(set(values)) == 1:
        return values[0]
    return ", ".join(f"{v} ({s.name})" for v, s in zip(values, config.stages, strict=True))


def text(config: ExperimentConfig, corpus: Corpus) -> list[str]:
    """Documents, bytes, tokens, passes and share for validation; and what is unusual about them.

    Nothing for data whose size is not known: C4, registered tasks and mixtures.
    """
    if not corpus.num_bytes:
        return []
    documents, size = corpus.num_texts, corpus.num_bytes
    tokens, read = corpus.num_tokens("train"), tokens_of(config)
    share = size["validation"] / (size["train"] + size["validation"])
    passes = read / tokens
    found = [
        f"text: {documents['train']:,} documents, {size['train']:,} bytes, {tokens:,} tokens for "
        f"training; {documents['validation']:,} documents, {size['validation']:,} bytes for "
        f"validation ({share:.1%})",
        f"passes: the run reads {read:,} tokens, {passes:.2f} times its training text",
    ]
    if corpus.unread:
        more = ", ..." if len(corpus.unread) > _NAMED else ""
        names = ", ".join(corpus.unread[:_NAMED]) + more
        found.append(f"not read: {len(corpus.unread)} other files: {names}")
    batch = max(stage.batch_size for stage in config.stages) * corpus.config.window
    if tokens < batch:
        found.append(
            f"warning: the training text has {tokens:,} tokens, and one batch {batch:,}; give more "
            "text"
        )
    if passes > MOST_PASSES:
        found.append(
            f"warning: {passes:.1f} passes over the training text are more than {MOST_PASSES}, and "
            "the model will learn it by heart; give more text, or fewer steps"
        )
    return found


def tokens_of(config: ExperimentConfig) -> int:
    """Tokens that all stages of a chain read."""
    return sum(
        stage.steps * stage.batch_size * config.data_of(index).sequence_length
        for index, stage in enumerate(config.stages)
    )
