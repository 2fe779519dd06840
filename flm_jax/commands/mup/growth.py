"""Compares updates after a growth with those of a model of the target's width.

  flm mup growth --config=configs/mup_study.py --workdir=runs/mup

The proxy grows by masks, zero-padding and tiling, with rates "ramp". Figure:
DIR/report/mup_growth.png.
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
    trials = study.Study(settings.experiment, folder / "trials.jsonl")
    updates = mup.through_growth(trials, settings, display.open_console(stderr=True).print)
    write_result(folder / "report" / "mup_growth.json", updates)
    path = folder / "report" / "mup_growth.png"
    mup_figures.draw_growth(updates, path)
    roles = list(next(iter(updates["arms"].values()))["ratios"])
    table = rich.table.Table("updates over the reference's, after the ramp", *updates["arms"])
    for role in roles:
        table.add_row(role, *(f"{arm['ratios'][role]:.2f}" for arm in updates["arms"].values()))
    call.console().print(table, f"figure: {path}")
    return updates


COMMAND = Command(main, NoFlags, workdir="required")
