"""Sweeps hyper-parameters at several widths, or depths: does the best value move?

  flm mup sweep --config=configs/mup_study.py --workdir=runs/mup
  flm mup sweep --config=configs/mup_study.py:depth --workdir=runs/mup_depth

Swept: learning rate, initial std and multipliers. Every trial is saved in DIR/trials.jsonl;
stopped anywhere and called again, the command resumes. Figure: DIR/report/sweep.png.
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
    rows = mup.sweep(trials, settings, lambda text: console.print(text, highlight=False))
    summary = mup.summarise_sweep(rows, settings.axis)
    write_result(folder / "report" / "sweep.json", summary)
    path = folder / "report" / "sweep.png"
    mup_figures.draw_sweep(summary, settings.axis, path)
    best_at = f"best value at each {settings.axis}"
    table = rich.table.Table("", "swept", best_at, "moves by, in grid steps")
    for parametrisation, names in summary.items():
        for name, result in names.items():
            best = ", ".join(f"{size}: x{value:g}" for size, value in result["best"].items())
            table.add_row(parametrisation, name, best, str(result["shift"]))
    call.console().print(table, f"figure: {path}")
    return {"sweep": summary, "trials": len(rows)}


COMMAND = Command(main, NoFlags, workdir="required")
