"""Prints a run's lineage as a tree, and compares two of its stages.

  flm inspect runs/demo
  flm inspect runs/demo --compare=0,2
  flm inspect runs/demo --json

--compare shows sizes, costs and scores of two stages, and where their configs differ. Runs are
compared by `flm compare RUN RUN...`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import rich.table
import rich.text
import rich.tree

from flm_jax import mapping
from flm_jax.commands.command import Call, Command, flag
from flm_jax.errors import UserError
from flm_jax.store.entries import logit_change
from flm_jax.store.lineage import RunFolder, bits_per_byte, pick_stage


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    compare: tuple[str, ...] = flag((), "Two stage indices, as 0,2.", comma=True)


def _tree(folder: RunFolder, stages: Sequence[dict[str, Any]]) -> rich.tree.Tree:
    """Each stage is a child of the stage that it grew from."""
    root = node = rich.tree.Tree(str(folder.path))
    for s in stages:
        text = rich.text.Text.assemble(
            (f"{s['index']} {s['name']}", "bold"),
            f"  {s['params']:,} parameters  {s['steps']:,} steps  "
            f"bits per byte {bits_per_byte(s['eval'])}",
        )
        node = node.add(text)
        if receipt := s["receipt"]:
            grown = receipt["operator"] != "none"
            growth = f"grown by {receipt['operator']}" if grown else "not grown"
            node.add(
                f"{growth} ({receipt['exactness']}): logits moved by {logit_change(receipt):.1e} "
                f"of their scale, plan {s['plan_digest'][:12]}"
            )
        node.add(f"{s['checkpoint']}  parameters {s['params_digest'][:12]}")
    return root


def _differences(folder: RunFolder, one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    configs = [folder.stage(s["index"], s["name"]).saved() for s in (one, two)]
    return mapping.differences(configs[0], configs[1])


def _comparison(one: dict[str, Any], two: dict[str, Any]) -> rich.table.Table:
    table = rich.table.Table("", one["name"], two["name"], "ratio")
    for key in ("params", "steps", "tokens", "flops", "wall_s"):
        a, b = one[key], two[key]
        table.add_row(key, f"{a:,.4g}", f"{b:,.4g}", f"{b / a:.3g}" if a else "")
    for key in ("bpb_start", "bpb_end"):
        a, b = one["eval"][key], two["eval"][key]
        shown = ["" if bpb is None else f"{bpb:.4f}" for bpb in (a, b)]
        table.add_row(key, *shown, f"{b / a:.3f}" if a and b else "")
    return table


def main(call: Call[Flags]) -> dict[str, Any]:
    folder = RunFolder(call.arguments[0])
    if not folder.path.exists():
        raise UserError(f"{folder.path}: there is no such folder; give the folder of a run")
    stages = folder.stages()
    pick_stage(stages, "", folder.path)  # raises if there is none
    picked = []
    if call.flags.compare:
        if len(call.flags.compare) != 2:
            raise UserError(f"--compare={','.join(call.flags.compare)}: give two stages, as 0,2")
        picked = [pick_stage(stages, wanted, folder.path) for wanted in call.flags.compare]

    console = call.console()
    console.print(_tree(folder, stages))
    result: dict[str, Any] = {"stages": list(stages)}
    if picked:
        differences = _differences(folder, *picked)
        console.print(_comparison(*picked), *differences, sep="\n")
        result["compare"] = {"stages": [s["index"] for s in picked], "config": differences}
    return result


COMMAND = Command(
    main,
    Flags,
    config="none",
    positional=("DIR",),
    unexpected="flm compare RUN RUN... compares runs",
)
