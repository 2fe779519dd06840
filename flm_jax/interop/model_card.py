"""The model card of an export: README.md with what the model is and where it comes from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from flm_jax.config import TransformerConfig
from flm_jax.interop.opening import StoredModel
from flm_jax.params import counts
from flm_jax.store.lineage import StageFolder
from flm_jax.version import __version__


def text(
    name: str,
    config: TransformerConfig,
    model_type: str,
    dtype: str,
    notes: Sequence[str],
    source: StoredModel | None,
) -> str:
    """Writes the card.

    Args:
      name: of the model.
      config: the exported model.
      model_type: its family.
      dtype: of the files.
      notes: on every difference from the source.
      source: the model that was converted; None: parameters from memory.

    Returns:
      Markdown, for `with_readme`.
    """
    lines = [
        f"# {name}",
        "",
        f"Written by flm_jax {__version__}: {model_type}, {counts.params(config):,} parameters in "
        f"{dtype}.",
        "",
        f"{config.num_layers} layers, width {config.d_model}, {config.num_heads} query heads and "
        f"{config.kv_heads} key/value heads of size {config.head_dim}, MLP of {config.d_ff}, "
        f"vocabulary of {config.vocab_size}{', tied' if config.tied else ''}.",
        "",
    ]
    if source is not None:
        lines += [f"Converted from `{source.name}`.", "", *_stages(source)]
    if notes:
        lines += ["Differences from the source:", "", *(f"- {note}" for note in notes), ""]
    return "\n".join(lines)


def with_readme(card: str, readme: str) -> str:
    """Puts a source's README after the card, and its YAML header, with the licence, first."""
    header = re.match(r"\ufeff?---\s*\n.*?\n---\s*\n", readme, re.DOTALL)
    if header is None:
        return card + readme
    return header[0].lstrip("\ufeff") + "\n" + card + readme[header.end() :]


def _stages(source: StoredModel) -> list[str]:
    """The run's stages up to this model, as a table; nothing for a model without a run."""
    if source.config is None:
        return []
    stages = StageFolder.of_checkpoint(source.path).run.stages()
    if not stages:
        return []
    lines = ["| stage | grown from | recipe | parameters | tokens | bits per byte at its end |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for entry in stages:
        lines.append(_row(entry))
        if entry["name"] == source.name:
            break
    return [*lines, ""]


def _row(entry: dict[str, Any]) -> str:
    receipt, bpb = entry.get("receipt") or {}, (entry.get("eval") or {}).get("bpb_end")
    cells = (entry["name"], entry.get("parent") or "", receipt.get("operator", ""),
             *(f"{entry[key]:,}" if key in entry else "" for key in ("params", "tokens")),
             "" if bpb is None else f"{bpb:.4f}")  # fmt: skip
    return f"| {' | '.join(cells)} |"
