"""The entry of a finished stage in lineage.json, from the files of its folder."""

from __future__ import annotations

from typing import Any

from flm_jax import growth, mapping
from flm_jax.params import counts
from flm_jax.store.lineage import StageFolder


def entry_of(
    folder: StageFolder, parent: str | None, plan: growth.Plan | None, start: int, step: int
) -> dict[str, Any]:
    """Returns the entry, without what only the running process knows.

    Args:
      folder: the stage's folder, with config, metrics and receipt.
      parent: the name of the stage that it grew out of; None: none.
      plan: its growth; None: none.
      start: the global step at which it started.
      step: the step of the checkpoint that is its result.
    """
    experiment, saved = folder.experiment(), folder.saved()
    stage, length = experiment.stages[0], experiment.data_of(0).sequence_length
    tokens = stage.steps * stage.batch_size * length
    damage = folder.metrics.rows("damage")
    numerics = {kind: len(folder.metrics.rows(kind)) for kind in ("skipped", "rollback")}
    return {
        "index": folder.index,
        "name": folder.name,
        "parent": parent,
        "config_digest": mapping.digest(saved),
        "plan_digest": plan.digest() if plan else None,
        "params": counts.params(stage.model),
        "tokens": tokens,
        "flops": tokens * counts.flops_per_token_train(stage.model, length),
        "steps": stage.steps,
        "eval": _scores(folder, start, step),
        "receipt": folder.saved_receipt() if plan else None,
        "data_fingerprint": saved["data_fingerprint"],
        **({"damage": damage} if damage else {}),
        **({"numerics": numerics} if any(numerics.values()) else {}),
    }


def _scores(folder: StageFolder, start: int, step: int) -> dict[str, float | None]:
    """The measurements at the stage's start and at a step; None: metrics.jsonl has none."""
    rows = {row["step"]: row for row in folder.metrics.rows("eval")}
    names = dict.fromkeys(["bpb", *(name for row in rows.values() for name in row)])
    return {
        f"{name}_{when}": rows.get(at, {}).get(name)
        for name in names
        if name not in ("kind", "step", "mask")
        for when, at in (("start", start), ("end", step))
    }
