r"""Forecasts the time of a stage's training step on a pod or cluster; nothing is compiled.

  flm forecast --config=configs/tele_flm_1t_chain.py --topology=v5p:8x8x8
  flm forecast --config=configs/tele_flm_1t_chain.py --stage=2 --search \
      --topology=v6e:16x16@4,v6e:16x16@8
  flm forecast --published

Every stage has the layout that the runner takes on the topology (StageConfig.layouts). `--search`
ranks the meshes, microbatches and rematerialisation that should fit in memory, over all topologies
given; `flm preflight --search` compiles the best. `--published` forecasts published runs, and shows
the error.

The bound is what published peaks allow with perfect overlap. Memory is estimated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import rich.table

from flm_jax.commands import config_files
from flm_jax.commands.command import Call, Command, flag
from flm_jax.config import ExperimentConfig, LayoutConfig
from flm_jax.errors import UserError
from flm_jax.runtime import host


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    topology: tuple[str, ...] = flag(
        (), "Chips, as v5p:8x8x8, v6e:16x16@4 (4 slices) or h100:16x8; several with commas.",
        comma=True,
    )  # fmt: skip
    stage: int | None = flag(None, "Index of one stage; -1: the last.")
    search: bool = flag(False, "Rank the layouts of one stage.")
    best: int = flag(10, "Layouts that --search shows.", lower=1)
    published: bool = flag(False, "Forecast published runs.")


def main(call: Call[Flags]) -> dict[str, Any]:
    host.prefer_cpu()
    flags = call.flags
    if flags.published:
        return _published(call)
    if not call.config:
        raise UserError("--config is missing; give --config=configs/FILE.py, or --published")
    if not flags.topology:
        raise UserError("--topology is missing; give one, as --topology=v5p:8x8x8")
    chain = config_files.experiment(call.config)
    stage = None if flags.stage is None else config_files.stage_index(chain, flags.stage)
    if flags.search:
        rows = _searched(chain, len(chain.stages) - 1 if stage is None else stage, flags)
    else:
        indices = range(len(chain.stages)) if stage is None else [stage]
        rows = [_row(chain, index, name) for name in flags.topology for index in indices]
    call.console(width=150).print(_table(rows))
    return {"layouts": rows}


def _searched(chain: ExperimentConfig, index: int, flags: Flags) -> list[dict[str, Any]]:
    from flm_jax.aot import search

    stage, length = chain.stages[index], chain.data_of(index).sequence_length
    found = search.search_layouts(stage, length, flags.topology)
    return [
        _described(stage.name, stage.batch_size, c.layout, c.forecast, c.memory)
        for c in found[: flags.best]
    ]


def _row(chain: ExperimentConfig, index: int, topology: str) -> dict[str, Any]:
    """A stage in its own layout on a topology."""
    from flm_jax.aot import forecast, places, search, work

    on = chain.on(topology)
    stage, mesh = on.stages[index], on.mesh_of(index)
    where = places.fabric(topology, mesh)
    step = search.step_of(stage, on.data_of(index).sequence_length, mesh, len(where.node))
    if stage.batch_size % (step.size("data", "fsdp") * stage.accumulate):
        raise UserError(
            f"stage {stage.name}: batch_size {stage.batch_size} does not divide over accumulate "
            f"{stage.accumulate} x {step.size('data', 'fsdp')} devices (mesh data x fsdp) on "
            f"{topology}; change one, or look for layouts with --search"
        )
    layout = LayoutConfig(topology, mesh, stage.accumulate, stage.model.remat)
    made = forecast.forecast(step, where)
    return _described(stage.name, stage.batch_size, layout, made, work.memory(step))


def _described(
    stage: str, batch: int, layout: LayoutConfig, made: Any, memory: float
) -> dict[str, Any]:
    mesh = {k: v for k, v in dataclasses.asdict(layout.mesh).items() if k != "rules"}
    return {
        "stage": stage,
        "topology": layout.topology,
        "mesh": mesh,
        "rules": dataclasses.asdict(layout.mesh.rules),
        "batch": batch,
        "accumulate": layout.accumulate,
        "remat": layout.remat,
        "memory_bytes": memory,
        "forecast": made.as_json(),
    }


def _table(rows: Iterable[dict[str, Any]]) -> rich.table.Table:
    table = rich.table.Table(
        "stage", "topology", "mesh", "batch", "remat", "memory", "forecast", "tokens/s/device",
        "exposed", "bound",
    )  # fmt: skip
    for row in rows:
        made = row["forecast"]
        table.add_row(
            row["stage"], row["topology"],
            ",".join(f"{k}={v}" for k, v in row["mesh"].items() if v > 1),
            f"{row['accumulate']} x {row['batch'] // row['accumulate']}", row["remat"],
            f"{row['memory_bytes'] / 1e9:.1f} GB",
            f"{made['step_s']:.3g} s, {made['utilisation']:.1%}", f"{made['tokens_per_s']:.4g}",
            f"{made['exposed_s']:.3g} s", f"{made['bound_s']:.3g} s ({made['bound']})",
        )  # fmt: skip
    return table


def _published(call: Call[Flags]) -> dict[str, Any]:
    from flm_jax.aot import published

    rows = [published.compare(run) for run in published.RUNS]
    table = rich.table.Table(
        "run", "topology", "fsdp, tensor", "published", "forecast", "error", "bound", "", "assumed"
    )
    for row in rows:
        shown = [
            f"{row[name]:.1%}" if row["unit"] == "utilisation" else f"{row[name]:,.0f} tokens/s"
            for name in ("published", "forecast", "bound")
        ]
        table.add_row(
            row["name"], row["topology"], ", ".join(map(str, row["mesh"].values())), *shown[:2],
            f"{row['error']:+.1%}", shown[2], "fitted" if row["fitted"] else "", row["assumed"],
        )  # fmt: skip
    errors = published.errors(rows)
    words = ", ".join(f"{name} {100 * value:.1f}%" for name, value in errors.items())
    call.console(width=170).print(table, f"Mean absolute error: {words}")
    return {"runs": rows, "errors": errors}


COMMAND = Command(main, Flags, config="optional")
