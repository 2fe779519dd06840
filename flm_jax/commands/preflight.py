"""Compiles every program of a run, on a pod or cluster or on its own devices: does it fit?

  flm preflight --config=configs/tele_flm_1t_chain.py --topology=v5p:8x8x8
  flm preflight --config=configs/demo.py --own

Nothing is run, and the accelerators need not be there: TPUs need the extra `[tpu]`, GPU clusters
`[gpu-aot]`. Every stage has the layout that the runner takes on the topology (StageConfig.layouts).
Without `--topology`, every topology that the config has layouts for is compiled. `--own` is for the
devices of this machine.

The table says for each program whether it fits, its memory on one device, and which part of it is
largest: arguments, temporaries, results, or what is held beside the program. Exit status 1 if one
does not fit. With `--results=FILE` each result is kept, and a second call continues.

To try another layout: `--mesh`, `--batch`. `--search` forecasts every mesh, accumulation and
rematerialisation of one stage that should fit (`flm forecast --search`), and compiles its step in
the best ones. `flm compile` is the old name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flm_jax.commands import config_files, fit_table
from flm_jax.commands.command import Call, Command, Gate, flag
from flm_jax.config import ExperimentConfig, MeshConfig
from flm_jax.errors import UserError
from flm_jax.mapping import replaced
from flm_jax.runs.programs import KINDS
from flm_jax.runtime import display, host
from flm_jax.store.trials import Trials

if TYPE_CHECKING:
    from flm_jax.aot.compiler import Job, Report, Target


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    topology: str = flag("", "Chips, as v5p:8x8x8, v6e:16x16@4 (4 slices) or h100:16x8.")
    own: bool = flag(False, "Compile for this machine's devices.")
    stage: int | None = flag(None, "Index of one stage; -1: the last.")
    what: str = flag("", "Programs, with commas, as train,growth; empty: all.")
    mesh: str = flag("", "Another mesh, as fsdp=32,tensor=16.")
    batch: int = flag(0, "Another batch: sequences of one step, in one microbatch.", lower=0)
    quick: bool = flag(False, "Compile with less optimisation: a tenth of the time.")
    search: bool = flag(False, "Forecast all layouts of one stage; compile its step in the best.")
    best: int = flag(3, "Layouts that --search compiles.", lower=1)
    results: str = flag("", "JSONL file that keeps each result; a second call continues.")


def main(call: Call[Flags]) -> dict[str, Any]:
    flags = call.flags
    if not flags.own:
        host.prefer_cpu()
    from flm_jax.aot import compiler, search  # after the setting

    chain = _tried(config_files.experiment(call.config), flags)
    stage = None if flags.stage is None else config_files.stage_index(chain, flags.stage)
    names = tuple(name for name in flags.what.split(",") if name)
    for name in names:
        if name not in KINDS:
            raise UserError(f"--what={name}: choose from {', '.join(KINDS)}")

    def wanted(index: int, name: str) -> bool:
        return stage in (None, index) and (not names or name in names)

    keep = Trials(flags.results).result if flags.results else compiler.kept_nowhere
    console = display.open_console(stderr=True, highlight=False, soft_wrap=True)
    reports: list[Report] = []

    def compile_all(jobs: Iterator[Job]) -> None:
        for job in jobs:
            reports.append(compiler.report(job, keep))
            console.print("  ".join(fit_table.row(reports[-1])))

    for target, last in _targets(chain, flags, stage):
        if flags.search:
            index = len(chain.stages) - 1 if stage is None else stage
            length = chain.data_of(index).sequence_length
            found = search.search_layouts(chain.stages[index], length, [target.topology])
            for candidate in found[: flags.best]:
                tried = search.alone(chain, index, candidate.layout)
                compile_all(compiler.jobs(tried, target, _is_step, quick=flags.quick))
        else:
            compile_all(compiler.jobs(chain, target, wanted, last, flags.quick))
    if not reports:
        raise UserError(f"--what={flags.what}: these stages have no such program: a first stage "
                        "does not grow, and has no masks")  # fmt: skip
    if flags.search:
        reports.sort(key=lambda r: (not r["fits"], r.get("forecast", {}).get("step_s", 0)))
    call.console(width=150).print(fit_table.table(reports))
    # A single program's report is the result itself, too, as it was under the old name.
    alone = reports[0] if len(reports) == 1 else {}
    return {**alone, "programs": reports, "fits": all(r["fits"] for r in reports)}


def _is_step(index: int, name: str) -> bool:
    """Chooses the plain train step; see `compiler.jobs`."""
    return name == "train"


def _tried(chain: ExperimentConfig, flags: Flags) -> ExperimentConfig:
    """The chain with the mesh and the batch of the flags, in all stages."""
    stages = list(chain.stages)
    if flags.mesh:
        rules = chain.mesh.rules
        mesh = replaced(MeshConfig(rules=rules), _mesh(flags.mesh), f"--mesh={flags.mesh}")
        stages = [dataclasses.replace(s, mesh=mesh, layouts=()) for s in stages]
    if flags.batch:
        stages = [
            dataclasses.replace(
                stage,
                batch_size=flags.batch,
                accumulate=1,
                layouts=tuple(dataclasses.replace(x, accumulate=1) for x in stage.layouts),
            )
            for stage in stages
        ]
    return dataclasses.replace(chain, stages=tuple(stages))


def _mesh(text: str) -> dict[str, int]:
    try:
        pairs = [part.split("=") for part in text.split(",") if part]
        return {name: int(size) for name, size in pairs}
    except ValueError:
        raise UserError(f"--mesh={text}: give sizes by axis, as fsdp=32,tensor=16") from None


def _targets(
    chain: ExperimentConfig, flags: Flags, stage: int | None
) -> Iterator[tuple[Target, int | None]]:
    """Yields what to compile for, and the index of the last stage that runs there."""
    from flm_jax.aot import compiler

    if flags.own and flags.search:
        raise UserError("--search needs --topology: it forecasts pods and clusters")
    if flags.own:
        if chain.quick_compile:
            host.compile_quickly()
        yield compiler.own_target(), stage
    elif flags.topology:
        yield compiler.described_target(flags.topology), stage
    else:
        named = dict.fromkeys(x.topology for s in chain.stages for x in s.layouts)
        if not named or flags.mesh or flags.search:
            raise UserError("--topology is missing; give one, as --topology=v5p:8x8x8, or --own")
        for topology in named:
            has = [i for i, s in enumerate(chain.stages) if s.has_layout(topology)]
            if stage in (None, *has):
                last = max(has) if stage is None else stage
                yield compiler.described_target(topology), last


COMMAND = Command(main, Flags, gate=Gate(1, fit_table.failure))
