"""Prints a run's lineage as a tree, compares two of its stages, finds and repairs damage.

  flm inspect runs/demo
  flm inspect runs/demo --compare=0,2
  flm inspect runs/demo --json
  flm inspect runs/demo --verify
  flm inspect runs/demo --repair

--compare shows sizes, costs and scores of two stages, and where their configs differ. Runs are
compared by `flm compare RUN RUN...`.
--verify reads all files of the run, and compares them with the digests that were recorded. --repair
rebuilds lineage.json, config.json, plan.json and receipt.json as far as the other files determine
them, then verifies. Both end with status 65 if something is damaged or missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import rich.table
import rich.text
import rich.tree

from flm_jax import mapping
from flm_jax.commands.command import Call, Command, Gate, flag
from flm_jax.errors import Exit, UserError
from flm_jax.runs import repair, verify
from flm_jax.store.entries import logit_change
from flm_jax.store.lineage import RunFolder, bits_per_byte, pick_stage


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    compare: tuple[str, ...] = flag((), "Two stage indices, as 0,2.", comma=True)
    verify: bool = flag(False, "Check all files of the run against their digests.")
    repair: bool = flag(False, "Rebuild missing and damaged small files, then verify.")


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


def _verified(call: Call[Flags], folder: RunFolder) -> dict[str, Any]:
    """Repairs if asked to, verifies, and prints a table of each."""

    console, result = call.console(), dict[str, Any]()
    if call.flags.repair:
        done = repair.repair(folder)
        table = rich.table.Table("file", "rebuilt", "how")
        for each in done:
            table.add_row(each.file, "yes" if each.rebuilt else "no", rich.text.Text(each.detail))
        console.print(table if done else "nothing to repair")
        result["repair"] = [dataclasses.asdict(each) for each in done]
    found = verify.verify(folder)
    table = rich.table.Table("file", "what", "verdict", "detail")
    for finding in found:
        table.add_row(finding.file, finding.what, finding.verdict, rich.text.Text(finding.detail))
    console.print(table)
    bad = sorted({finding.file for finding in found if finding.bad})
    return result | {"verify": [dataclasses.asdict(finding) for finding in found], "bad": bad}


def _failure(result: Mapping[str, Any]) -> str:
    """What is wrong with a run that was verified."""
    if not (bad := result.get("bad")):
        return ""
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"damaged or missing: {', '.join(bad[:3])}{more}; see the table above"


def main(call: Call[Flags]) -> dict[str, Any]:
    folder = RunFolder(call.arguments[0])
    if call.flags.verify or call.flags.repair:
        return _verified(call, folder)
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
    gate=Gate(Exit.DAMAGE, _failure),
)
