"""Trains one run for each combination of values of config fields, and compares them.

  flm sweep --config=configs/demo.py:smoke --workdir=runs/recipes \\
    --sweep='stages[1].growth.recipe=msg;tile,identity' --sweep=seed=0,1

Values are separated by commas, or by ";" where a value has commas. Other fields are set as with
`flm train`. Each run gets DIR/runs/NAME. Finished ones are skipped, so a stopped sweep continues
with the same command, and more values can be added. A run that fails is listed with its error. It
does not stop the others, and the next call tries it again. --list trains nothing. At the end: a
table, best first, and the curves over each other (DIR/compared.png, .svg, .csv); DIR/sweep.json has
all numbers. See docs/experiments.md.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table

from flm_jax.commands import config_files
from flm_jax.commands.command import Call, Command, flag
from flm_jax.config import ExperimentConfig
from flm_jax.runs import comparison
from flm_jax.runtime import display, paths
from flm_jax.runtime.display import short
from flm_jax.studies import sweep


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    sweep: tuple[str, ...] = flag(
        (), "FIELD=VALUE,VALUE,...; repeatable.", required="give FIELD=VALUE,VALUE,..., as seed=0,1"
    )
    list: bool = flag(False, "List the runs and their status; train nothing.")


def main(call: Call[Flags]) -> dict[str, Any]:
    root, console = paths.of(call.workdir, "workdir"), call.console()
    paths.check_bucket(root, "workdir")
    trials = sweep.trials(sweep.parse(call.flags.sweep), lambda values: _config(call, values))
    if call.flags.list:
        rows = sweep.rows(trials, root)
    else:
        rows = sweep.run(trials, root, display.note)
    console.print(_table(rows))
    files = [] if call.flags.list else _figure(rows, root, console)
    return {"runs": rows, "files": files}


def _config(call: Call[Flags], values: Mapping[str, str]) -> Callable[[], ExperimentConfig]:
    """Makes a trial's config; raises UserError at once if a field or a type is wrong."""
    overrides = [f"--config.{field}={value}" for field, value in values.items()]
    config = COMMAND.parse("sweep", [*call.argv, *overrides]).config
    return lambda: config_files.experiment(config)


def _table(rows: Sequence[Mapping[str, Any]]) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE)
    table.add_column("run", overflow="fold")
    for name in ("params", "FLOPs", "time", "final", "best"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("status", overflow="fold")
    for row in rows:
        numbers = [""] * 5
        if row["status"] == "finished":
            numbers = [
                short(row["params"]), f"{row['flops']:.2e}", f"{row['wall_s']:.0f} s",
                f"{row['bpb_final']:.4f}", f"{row['bpb_best']:.4f}",
            ]  # fmt: skip
        status = f"failed: {row['failure']}" if row["status"] == "failed" else row["status"]
        table.add_row(row["name"], *numbers, status)
    table.caption = "final, best: validation bits per byte"
    return table


def _figure(
    rows: Sequence[Mapping[str, Any]], root: pathlib.Path, console: rich.console.Console
) -> list[str]:
    """Draws the curves of the finished runs; returns the files."""
    runs = [comparison.read(row["folder"], row["name"]) for row in rows if "bpb_final" in row]
    if not runs:
        return []
    files = comparison.write(runs, root)
    console.print(f"curves: {', '.join(map(str, files))}")
    return [str(file) for file in files]


COMMAND = Command(main, Flags, workdir="required")
