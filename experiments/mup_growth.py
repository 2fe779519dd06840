"""µP through a growth: the size of each role's updates, against a model of the target's width.

  python -m experiments.mup_growth --config=configs/mup_study.py --workdir=runs/mup

The proxy grows by masks, zero-padding and tiling, with rates "ramp". Figure:
DIR/report/mup_growth.png.
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
    trials = study.Study(settings.experiment, folder / "trials.jsonl")
    found = mup.through_growth(trials, settings, rich.console.Console(stderr=True).print)
    write_json(folder / "report" / "mup_growth.json", found)
    path = folder / "report" / "mup_growth.png"
    mup_figures.draw_growth(found, path)
    roles = list(next(iter(found["arms"].values()))["ratios"])
    table = rich.table.Table("updates over the reference's, after the ramp", *found["arms"])
    for role in roles:
        table.add_row(role, *(f"{arm['ratios'][role]:.2f}" for arm in found["arms"].values()))
    rich.console.Console(stderr=cli.json_wanted()).print(table, f"figure: {path}")
    return found


if __name__ == "__main__":
    cli.run(main, needs_workdir=True)
