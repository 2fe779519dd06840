"""Runs the study of growth, trial by trial, over as many sittings and machines as it takes.

  flm study --config=configs/study.py:small --workdir=runs/study-small
  flm study --config=configs/study.py:small --workdir=runs/study-small --list
  flm study --workdir=runs/study-small --report

The first command trains with a worker on each of two cores (--processes), and may be stopped and
called again at any time; several machines may share DIR. --until=gate stops after a phase. --list
shows every piece of training, its FLOPs and what is left. --report collects the results into
docs/study/results and writes docs/study from them; without --workdir it only writes docs/study.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import rich.table

from flm_jax.commands import config_files
from flm_jax.commands.command import Call, Command, flag
from flm_jax.errors import UserError
from flm_jax.runtime import display, host
from flm_jax.studies.growth_study import listing, pool, report, results
from flm_jax.studies.growth_study.config import GrowthStudyConfig

PHASES = ("gate", "tuning", "growth tuning", "arms", "ablations")


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    processes: int = flag(
        2, "Workers, each on a core of its own; 0: one, in this process.", lower=0
    )
    core: int | None = flag(None, "Be the worker on this core.", lower=0)
    until: str = flag("", "Stop after this phase.", choices=PHASES)
    other_machine: bool = flag(False, "Continue on a machine that differs from the study's.")
    list: bool = flag(False, "List pieces of training, FLOPs, status and time left; train nothing.")
    report: bool = flag(False, "Write the report from the results; train nothing.")
    docs: str = flag("docs/study", "Folder of the report and of results/NAME.jsonl.")


def main(call: Call[Flags]) -> dict[str, Any]:
    flags = call.flags
    if flags.report:
        return _report(call)
    if not call.workdir:
        raise UserError("--workdir is missing; give the study's folder, as --workdir=runs/NAME")
    if flags.list:
        return _list(call)
    if not call.config:
        raise UserError("--config is missing; give --config=configs/study.py:small")
    config = config_files.dataclass_of(GrowthStudyConfig, call.config)
    if flags.core is not None:
        pool.pin(flags.core)
    if config.quick_compile:
        host.compile_quickly()
    study = pool.begin(config, call.workdir, flags.other_machine)
    console = display.open_console(stderr=True)

    def note(text: str) -> None:
        console.print(text, highlight=False)

    if flags.core is not None or flags.processes == 0:
        pool.work(study, note, flags.until)
    else:
        # The last --json counts: workers leave standard output to this process.
        pool.run(study, flags.processes, [*call.argv, "--nojson"], note)
    return listing.summary(study)


def _list(call: Call[Flags]) -> dict[str, Any]:
    study = pool.reopen(call.workdir)
    found = listing.listed(study)
    table = rich.table.Table("piece", "TFLOP", "status", "bits per byte", "seconds")
    for row in found["pieces"]:
        bits = "" if row["bpb"] is None else f"{row['bpb']:.4f}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        table.add_row(row["name"], f"{row['flops'] / 1e12:.3f}", row["status"], bits, seconds)
    console = call.console(width=120)
    console.print(table)
    console.print(listing.line(found), highlight=False)
    return found


def _report(call: Call[Flags]) -> dict[str, Any]:
    docs = pathlib.Path(call.flags.docs)
    if call.workdir:
        study = pool.reopen(call.workdir)
        results.collect(study, docs / "results" / f"{study.config.name}.jsonl")
    if not any((docs / "results").glob("*.jsonl")):
        raise UserError(
            f"{docs}/results has no results; give --workdir of a study", argument="docs"
        )
    summaries = report.write(docs)
    console = call.console()
    for one in summaries:
        console.print(f"{one.name}: {one.verdict}; {one.page}", highlight=False)
    return {
        "studies": [
            {
                "name": s.name,
                "verdict": s.verdict,
                "arms": [dataclasses.asdict(r) for r in s.results],
            }
            for s in summaries
        ]
    }


COMMAND = Command(main, Flags, config="optional", workdir="optional")
