"""What a run measured, in sentences: from its receipts and its curves, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flm_jax.config import ScheduleConfig
from flm_jax.store import entries

# The largest change of a logit, relative to their scale, that rounding of each dtype explains.
_ROUNDING = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2}
_EQUAL = 5e-4  # bits per byte: what the report's four digits can tell apart


def sentences(
    stages: Sequence[Mapping[str, Any]],
    evals: Sequence[Sequence[Mapping[str, Any]]],
    dtypes: Sequence[str],
    schedule: ScheduleConfig,
) -> list[str]:
    """Says what happened at each growth and in each stage.

    Args:
      stages: the stages' entries in lineage.json.
      evals: the evaluations of each stage, as in its metrics.jsonl.
      dtypes: of each stage's activations.
      schedule: of the last stage's learning rate.
    """
    found = []
    for stage, rows, dtype in zip(stages, evals, dtypes, strict=True):
        if stage["receipt"]:
            found.append(growth(stage, dtype))
        found += [text for text in (_bump(stage, rows), _trained(stage)) if text]
    if decay := _decayed(stages[-1], schedule):
        found.append(decay)
    return found


def growth(stage: Mapping[str, Any], dtype: str) -> str:
    """Says what the growth into a stage did to the function, from its receipt.

    Args:
      stage: name, parent and receipt of the stage.
      dtype: of the model's activations.
    """
    receipt, name = stage["receipt"], stage["name"]
    if receipt["operator"] == "none":
        return f"{name} continues the parameters of {stage['parent']} without a growth."
    moved = entries.logit_change(receipt)
    change = receipt["loss_after"] - receipt["loss_before"]
    numbers = (
        f"logits moved by at most {moved:.2g} of their scale, and the loss by {change:+.2g} nats "
        "per token"
    )
    rounding = _ROUNDING.get(dtype, 1e-4)
    exact = receipt["exactness"] == "EXACT"
    if not moved < float("inf"):
        text = f"The growth to {name} ({receipt['operator']}) was not measured."
    elif moved <= rounding:
        text = f"The growth to {name} ({receipt['operator']}) kept the function: {numbers}."
    else:
        text = f"The growth to {name} ({receipt['operator']}) changed the function: {numbers}."
        if exact:
            text += " Its operator claims EXACT: this is more than rounding explains."
    for key, words in (
        ("dead_slots", "slots do not train"),
        ("locked_copies", "copies stay equal"),
    ):
        if receipt[key]:
            text += f" {receipt[key]} {words}."
    return text


def _bump(stage: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """How far the loss rose after a growth, and when it was back; "" if it never rose."""
    if not stage["receipt"] or len(rows) < 2:
        return ""
    start, later = rows[0], rows[1:]
    worst = max(later, key=lambda row: row["bpb"])
    if worst["bpb"] <= start["bpb"] + _EQUAL:
        return ""
    text = (
        f"In {stage['name']}, the validation loss first rose from {start['bpb']:.4f} to "
        f"{worst['bpb']:.4f} bits per byte, {worst['step'] - start['step']} steps after the growth"
    )
    ramp_end = next((row for row in rows if row.get("mask") is None), None)
    if ramp_end and ramp_end is not start:
        text += f" (the ramp of the masks ends after {ramp_end['step'] - start['step']})"
    back = next((r for r in later if r["step"] > worst["step"] and r["bpb"] <= start["bpb"]), None)
    if back:
        return f"{text}; it was back after {back['step'] - start['step']} steps."
    return f"{text}; it did not come back in this stage."


def _trained(stage: Mapping[str, Any]) -> str:
    """How the loss changed over a stage."""
    start, end = (stage["eval"].get(f"bpb_{when}") for when in ("start", "end"))
    if start is None or end is None or not stage["steps"]:
        return ""
    numbers = f"from {start:.4f} to {end:.4f} bits per byte in {stage['steps']:,} steps"
    if end > start + _EQUAL:
        return f"The validation loss **rose** in {stage['name']}: {numbers}."
    if end < start - _EQUAL:
        return f"The validation loss fell in {stage['name']}: {numbers}."
    return f"The validation loss did not change in {stage['name']}: {numbers}."


def _decayed(stage: Mapping[str, Any], schedule: ScheduleConfig) -> str:
    """Whether the decay of the learning rate may explain a part of the last stage's change."""
    decays = schedule.kind == "cosine" or (schedule.kind == "wsd" and schedule.decay_steps)
    if not decays or not stage["steps"]:
        return ""
    return (
        f"The learning rate decays at the end ({schedule.kind}), which lowers the loss of "
        f"{stage['name']} by itself; the decay is not measured apart."
    )
