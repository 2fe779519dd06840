"""Counts of a config's model: parameters, FLOPs per token, bytes. Allocates nothing.

python -m experiments.describe --config=configs/tele_flm_1t.py
python -m experiments.describe --config=configs/tele_flm_1t_chain.py --json
"""

from __future__ import annotations

from typing import Any

import ml_collections
import rich.console
import rich.table
from absl import flags

from experiments import cli
from flm_jax.config import ExperimentConfig
from flm_jax.params import counts, mup

MUP = flags.DEFINE_bool("mup", False, "Print each parameter's role and multipliers instead.")


def _mup(chain: ExperimentConfig) -> dict[str, Any]:
    stages = []
    for stage in chain.stages:
        parameters = mup.summary(stage, chain.optimizer)
        model = stage.model
        about = {"base_width": model.mup_base_width or model.d_model, "width": model.d_model}
        stages.append({"name": stage.name, **about, "parameters": parameters})
        table = rich.table.Table("parameter", "kind", "init std", "learning rate", "weight decay",
                                 "multiplier", title=f"{stage.name}: {model.parametrisation}, "
                                 f"width {about['base_width']} -> {about['width']}")  # fmt: skip
        for path, row in parameters.items():
            pairs = ((row["base"][key], row["target"][key]) for key in row["base"])
            table.add_row(path, row["kind"], *(
                f"{a:.4g}" if a == b else f"{a:.4g} -> {b:.4g}" for a, b in pairs))  # fmt: skip
        if not cli.json_wanted():
            rich.console.Console(width=120).print(table)
    return {"stages": stages}


def main(config: ml_collections.ConfigDict) -> dict[str, Any]:
    chain = cli.experiment(config)
    if MUP.value:
        roles = _mup(chain)
        return roles["stages"][0] if "model" in config else roles
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
    if not cli.json_wanted():
        said = " and ".join(f"{length:,}" for length in dict.fromkeys(lengths))
        rich.console.Console().print(table, f"FLOPs at sequences of {said} tokens")
    if "model" in config:
        return {key: value for key, value in described[0].items() if key != "name"}
    return {"stages": described}


if __name__ == "__main__":
    cli.run(main)
