"""Checks growth operators against their claims, on random weights or a run.

  flm growth check --operator=all
  flm growth check --operator=tile,layers=stack --noise_db=10
  flm growth check --operator=zero_pad,identity --run=runs/demo
  flm growth check --operator=msg --family=gemma2
  flm growth check --list

Exit status 1 if a measurement contradicts a claim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import rich.table
import rich.text

from flm_jax.commands.command import Call, Command, Gate, flag
from flm_jax.errors import UserError
from flm_jax.runtime import display, host


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    operator: str = flag("all", "A recipe (see docs/growth.md), or `all`.")
    list: bool = flag(False, "Only print the operators, as a Markdown table.")
    run: str | None = flag(
        None, "Run folder whose last checkpoint grows; if not given: random weights."
    )
    family: str = flag(
        "teleflm", "For random weights: the family whose block they have (see docs/interop.md)."
    )
    moments: str = flag("asym", "How Adam moments grow: dual, asym or reset.")
    rates: str = flag("target", "Learning rates after the growth: target or carry.")
    noise_db: float = flag(
        0.0, "Signal-to-noise ratio of the added noise, in decibels; 0: no noise."
    )


def _table(rows: list[dict[str, Any]]) -> rich.table.Table:
    table = rich.table.Table(box=None, header_style="bold")
    for column in ("operator", "axes", "claimed", "f64", "f32", "bf16", "KL", "gradient", "dead",
                   "locked", "first step", ""):  # fmt: skip
        table.add_column(column)
    for r in rows:
        table.add_row(
            r["name"], " ".join(r["axes"]), r["claimed"],
            *(f"{r[f'max_abs_logit_diff_{d}']:.1e}" for d in ("f64", "f32", "bf16")),
            f"{r['kl']:.1e}", f"{r['gradient_error']:.1e}" if r["claimed"] == "EXACT" else "",
            str(r["dead_slots"]),
            str(r["locked_copies"]), f"{r['first_update_over_lr']:.2f}",
            "ok" if r["ok"] else rich.text.Text("CONTRADICTED", "red"),
        )  # fmt: skip
    return table


def _contradicted(result: Mapping[str, Any]) -> str:
    rows = [row["name"] for row in result["operators"] if not row["ok"]]
    return f"a measurement contradicts the claim of {', '.join(rows)}" if rows else ""


def main(call: Call[Flags]) -> dict[str, Any]:
    from flm_jax.growth import operators

    if call.flags.list:
        print(operators.markdown())
        return {"operators": []}
    # Dozens of tiny programs, each run a few times: compilation takes nearly all of the time.
    host.compile_quickly()
    from flm_jax.studies import check_operators

    source = (
        check_operators.run_source(call.flags.run)
        if call.flags.run
        else check_operators.random_source(check_operators.model_of(call.flags.family))
    )
    chosen: dict[str, Any] = {
        "moments": call.flags.moments,
        "rates": call.flags.rates,
        "noise_db": call.flags.noise_db,
    }
    cases: tuple[tuple[str, str, dict[str, Any]], ...] = (
        (call.flags.operator, call.flags.operator, chosen),
    )
    if call.flags.operator == "all":
        cases = check_operators.rows(source.stage.model.num_layers)
    for _, recipe, _ in cases:
        operators.choose(recipe)  # a wrong name is refused before anything is computed
    console = display.open_console(stderr=True)
    rows, refused = [], []
    for number, (name, recipe, options) in enumerate(cases, 1):
        console.print(f"{number}/{len(cases)}  {name}", highlight=False)
        try:
            rows.append(check_operators.check(name, recipe, source, **options))
        except UserError as error:
            # Of all operators, a family's block may forbid some.
            if call.flags.operator != "all" or call.flags.family == "teleflm":
                raise
            refused.append({"name": name, "recipe": recipe, "reason": str(error)})
            console.print(f"refused: {error}", highlight=False)
    call.console(width=160).print(_table(rows))
    return {"operators": rows, "refused": refused}


COMMAND = Command(main, Flags, config="none", gate=Gate(1, _contradicted))
