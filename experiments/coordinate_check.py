"""Trains a proxy for a few steps at several widths: do activations move equally far?

  python -m experiments.coordinate_check --config=configs/mup_study.py --workdir=runs/mup

Under µP the slopes of log size against log width are near 0, under the standard parametrisation
they are not. Figure: DIR/report/coordinates.png.
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
    found = mup.check_coordinates(trials, settings, console.print)
    write_json(folder / "report" / "coordinates.json", found)
    path = folder / "report" / "coordinates.png"
    mup_figures.draw_coordinates(found, path)
    table = rich.table.Table("change of", *found)
    for name in found["mup"]["slopes"]:
        table.add_row(name, *(f"{found[p]['slopes'][name]:+.2f}" for p in found))
    table.add_row("steepest", *(f"{found[p]['max_slope']:+.2f}" for p in found))
    rich.console.Console(stderr=cli.json_wanted()).print(table, f"figure: {path}")
    return found


if __name__ == "__main__":
    cli.run(main, needs_workdir=True)
