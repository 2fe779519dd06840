"""Sweeps learning rate, init std and multipliers at several widths: does the best value move?

  python -m experiments.sweep_mup --config=configs/mup_study.py --workdir=runs/mup

Every trial is kept in DIR/trials.jsonl; stopped and called again, the rest is run. Figure:
DIR/report/sweep.png.
"""

from __future__ import annotations

import pathlib
from typing import Any

import ml_collections
import rich.console
import rich.table

from experiments import cli
from flm_jax.store.files import write_json
from flm_jax.studies import mup, mup_figures, study
from flm_jax.studies.config import MupStudyConfig


def main(config: ml_collections.ConfigDict) -> dict[str, Any]:
    settings = cli.dataclass_of(MupStudyConfig, config)
    folder = pathlib.Path(cli.workdir())
    console = rich.console.Console(stderr=True)
    trials = study.Study(settings.experiment, folder / "trials.jsonl")
    rows = mup.sweep(trials, settings, lambda text: console.print(text, highlight=False))
    found = mup.summarise_sweep(rows)
    write_json(folder / "report" / "sweep.json", found)
    path = folder / "report" / "sweep.png"
    mup_figures.draw_sweep(found, path)
    table = rich.table.Table("", "swept", "best value at each width", "moves by, in grid steps")
    for parametrisation, names in found.items():
        for name, result in names.items():
            best = ", ".join(f"{width}: x{value:g}" for width, value in result["best"].items())
            table.add_row(parametrisation, name, best, str(result["shift"]))
    rich.console.Console(stderr=cli.json_wanted()).print(table, f"figure: {path}")
    return {"sweep": found, "trials": len(rows)}


if __name__ == "__main__":
    cli.run(main, needs_workdir=True)
