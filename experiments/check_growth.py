"""Holds growth operators to their claims, on a random model or a run's checkpoint.

  python -m experiments.check_growth --operator=all
  python -m experiments.check_growth --operator=tile,layers=stack --noise_db=10
  python -m experiments.check_growth --operator=zero_pad,identity --run=runs/demo
  python -m experiments.check_growth --list

Exit status 1 if a measurement contradicts a claim.
"""

from __future__ import annotations

import sys
from typing import Any

import rich.console
import rich.table
from absl import flags

from experiments import cli
from flm_jax.runtime import host

OPERATOR = flags.DEFINE_string("operator", "all", "`all`, or a recipe: see docs/growth.md.")
LIST = flags.DEFINE_bool("list", False, "Only print the operators, as a Markdown table.")
RUN = flags.DEFINE_string("run", None, "A run folder: grow its last checkpoint.")
MOMENTS = flags.DEFINE_string("moments", "asym", "dual, asym or reset.")
RATES = flags.DEFINE_string("rates", "target", "target or carry.")
NOISE = flags.DEFINE_float("noise_db", 0.0, "Decibels from parameters to noise; 0: no noise.")


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
            "ok" if r["ok"] else "[red]CONTRADICTED[/]",
        )  # fmt: skip
    return table


def main(arguments: list[str]) -> dict[str, Any]:
    del arguments
    from flm_jax.growth import operators

    if LIST.value:
        print(operators.markdown())
        return {"operators": []}
    # Dozens of tiny programs, each run a few times: compiling is all the time there is.
    host.compile_quickly()
    from flm_jax.studies import check_operators

    source = check_operators.run_source(RUN.value) if RUN.value else check_operators.random_source()
    how: dict[str, Any] = {
        "moments": MOMENTS.value, "rates": RATES.value, "noise_db": NOISE.value
    }  # fmt: skip
    cases: tuple[tuple[str, str, dict[str, Any]], ...] = ((OPERATOR.value, OPERATOR.value, how),)
    if OPERATOR.value == "all":
        cases = check_operators.ALL
    for _, recipe, _ in cases:
        operators.choose(recipe)  # a wrong name is refused before anything is computed
    console = rich.console.Console(stderr=True)
    rows = []
    for number, (name, recipe, options) in enumerate(cases, 1):
        console.print(f"{number}/{len(cases)}  {name}", highlight=False)
        rows.append(check_operators.check(name, recipe, source, **options))
    rich.console.Console(stderr=cli.json_wanted(), width=160).print(_table(rows))
    return {"operators": rows}


if __name__ == "__main__":
    result = cli.run(main, needs_config=False)
    sys.exit(not all(row["ok"] for row in result["operators"]))
