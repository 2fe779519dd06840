"""Coordinate check of µP: do activations move equally far at every width, or depth?

  flm mup check --config=configs/mup_study.py --workdir=runs/mup
  flm mup check --config=configs/mup_study.py:depth --workdir=runs/mup_depth

The proxy trains for a few steps at each width. Under µP the slopes of log size against log width
are near 0; under the standard parametrisation they are not. Over the depth, CompleteP is compared
with µP. Figure: DIR/report/coordinates.png.
"""

from __future__ import annotations

from typing import Any

import rich.table

from flm_jax.commands import config_files
from flm_jax.commands.command import Call, Command, NoFlags
from flm_jax.runtime import display, paths
from flm_jax.store.files import write_result
from flm_jax.studies import mup, mup_figures, study
from flm_jax.studies.config import MupStudyConfig


def main(call: Call[NoFlags]) -> dict[str, Any]:
    settings = config_files.dataclass_of(MupStudyConfig, call.config)
    folder = paths.of(call.workdir, "workdir")
    console = display.open_console(stderr=True)
    trials = study.Study(settings.experiment, folder / "trials.jsonl")
    coordinates = mup.check_coordinates(trials, settings, console.print)
    write_result(folder / "report" / "coordinates.json", coordinates)
    path = folder / "report" / "coordinates.png"
    mup_figures.draw_coordinates(coordinates, settings.axis, path)
    table = rich.table.Table(f"slope against {settings.axis} of", *coordinates)
    for name in coordinates[settings.parametrisations[0]]["slopes"]:
        errors = [coordinates[p]["slope_errors"][name] for p in coordinates]
        shown = ["" if error is None else f" ± {error:.2f}" for error in errors]
        slopes = [f"{coordinates[p]['slopes'][name]:+.2f}" for p in coordinates]
        table.add_row(name, *(s + e for s, e in zip(slopes, shown, strict=True)))
    table.add_row("steepest", *(f"{coordinates[p]['max_slope']:+.2f}" for p in coordinates))
    call.console().print(table, f"figure: {path}")
    return coordinates


COMMAND = Command(main, NoFlags, workdir="required")
