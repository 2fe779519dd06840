"""Counts parameters, FLOPs per token and bytes of a config's model.

  flm describe --config=configs/tele_flm_1t.py
  flm describe --config=configs/tele_flm_1t_chain.py --json

Nothing is allocated: a model of any size takes seconds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import rich.table

from flm_jax.commands import config_files
from flm_jax.commands.command import Call, Command, flag
from flm_jax.config import ExperimentConfig
from flm_jax.params import counts, mup
from flm_jax.runtime import display


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    mup: bool = flag(False, "Print each parameter's role and multipliers instead.")


def _mup(chain: ExperimentConfig, json: bool) -> dict[str, Any]:
    stages = []
    for stage in chain.stages:
        parameters = mup.summary(stage, chain.optimizer)
        model = stage.model
        sizes = {
            "base_width": model.mup_base_width or model.d_model, "width": model.d_model,
            "base_depth": model.mup_base_depth or model.num_layers, "depth": model.num_layers,
        }  # fmt: skip
        stages.append({"name": stage.name, **sizes, "parameters": parameters})
        table = rich.table.Table("parameter", "kind", "init std", "learning rate", "weight decay",
                                 "multiplier", "Adam's eps",
                                 title=f"{stage.name}: {model.parametrisation}, "
                                 f"width {sizes['base_width']} -> {sizes['width']}, "
                                 f"depth {sizes['base_depth']} -> {sizes['depth']}")  # fmt: skip
        for path, row in parameters.items():
            pairs = ((row["base"][key], row["target"][key]) for key in row["base"])
            table.add_row(path, row["kind"], *(
                f"{a:.4g}" if a == b else f"{a:.4g} -> {b:.4g}" for a, b in pairs))  # fmt: skip
        if not json:
            display.open_console(width=120).print(table)
    return {"stages": stages}


def main(call: Call[Flags]) -> dict[str, Any]:
    chain = config_files.experiment(call.config)
    if call.flags.mup:
        roles = _mup(chain, call.json)
        return roles["stages"][0] if "model" in call.config else roles
    lengths = [chain.data_of(index).sequence_length for index in range(len(chain.stages))]
    described = [
        {"name": stage.name, **counts.describe(stage.model, length)}
        for stage, length in zip(chain.stages, lengths, strict=True)
    ]
    table = rich.table.Table("", *(d["name"] for d in described))
    for key in described[0]:
        if key == "params_by_component":
            for component in described[0][key]:
                table.add_row(f"  {component}", *(f"{d[key][component]:,}" for d in described))
        elif key != "name":
            table.add_row(key, *(f"{d[key]:,}" for d in described))
    if not call.json:
        shown_lengths = " and ".join(f"{length:,}" for length in dict.fromkeys(lengths))
        note = f"FLOPs at sequences of {shown_lengths} tokens"
        display.open_console(highlight=False).print(table, note, sep="\n")
    if "model" in call.config:
        return {key: value for key, value in described[0].items() if key != "name"}
    return {"stages": described}


COMMAND = Command(main, Flags)
