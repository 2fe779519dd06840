"""Checks every family of models against transformers: imported, exported, grown.

  flm families
  flm families --family=gemma2 --json
  flm families --markdown

For each family, transformers makes a tiny model with random weights. The table has the largest
difference of two logits, over their root mean square: to ours after the import, and to the model's
own after it is exported again, as it is and grown by three recipes. Needs the extra flm_jax[hf].
Exit status 1 if a distance is above 1e-4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import rich.table
import rich.text

from flm_jax import extras
from flm_jax.commands.command import Call, Command, Gate, flag
from flm_jax.runtime import display, host


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    family: str = flag("all", "A model_type, such as gemma2, or `all`.")
    seed: int = flag(0, "Of weights and tokens.")
    markdown: bool = flag(False, "Print the table as in docs/interop.md.")


def _too_far(result: Mapping[str, Any]) -> str:
    names = [row["name"] for row in result["families"] if not row["ok"]]
    return f"the logits of {', '.join(names)} are too far from transformers'" if names else ""


def main(call: Call[Flags]) -> dict[str, Any]:
    extras.require("torch", "transformers")
    host.compile_quickly()  # tiny programs, each run once
    from flm_jax.studies import check_families

    names = check_families.chosen(call.flags.family)
    console = display.open_console(stderr=True)
    rows = []
    for number, name in enumerate(names, 1):
        console.print(f"{number}/{len(names)}  {name}", highlight=False)
        rows.append(check_families.check(name, call.flags.seed))
    if call.flags.markdown:
        print(check_families.markdown(rows))
        return {"families": rows}
    table = rich.table.Table(box=None, header_style="bold")
    for column in ("model", *check_families.COLUMNS, ""):
        table.add_column(column)
    for row in rows:
        distances = (f"{row[column]:.1e}" for column in check_families.COLUMNS)
        verdict = "ok" if row["ok"] else rich.text.Text("TOO FAR", "red")
        table.add_row(row["name"], *distances, verdict)
    call.console(width=120).print(table)
    return {"families": rows}


COMMAND = Command(main, Flags, config="none", gate=Gate(1, _too_far))
