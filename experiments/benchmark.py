"""Times the train step of a config: compile time, median step, tokens/s, share of matmul peak.

  python -m experiments.benchmark --config=configs/bench_34m.py
  python -m experiments.benchmark --config=configs/demo.py --stage=2 --json

The plain and the masked step run in turns in one process, so that their ratio holds on a machine
that others use too. `--trace=DIR` writes a profile for TensorBoard or Perfetto.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import ml_collections
import rich.console
import rich.table
from absl import flags

from experiments import cli
from flm_jax.errors import UserError
from flm_jax.studies import speed

STAGE = flags.DEFINE_integer("stage", 0, "Which stage of a chain.", lower_bound=0)
STEPS = flags.DEFINE_integer("steps", 5, "Timed steps of each variant.", lower_bound=1)
TRACE = flags.DEFINE_string("trace", "", "Folder for a profile of the timed steps.")


def main(config: ml_collections.ConfigDict) -> dict[str, Any]:
    chain = cli.experiment(config)
    if STAGE.value >= len(chain.stages):
        raise UserError(
            f"--stage={STAGE.value}: the config has stages 0 to {len(chain.stages) - 1}"
        )
    tracing = jax.profiler.trace(TRACE.value) if TRACE.value else contextlib.nullcontext()
    with tracing:
        result = speed.measure_step(chain, STAGE.value, STEPS.value)
    table = rich.table.Table("", "plain", "masked")
    for key, masked in result["masked"].items():
        table.add_row(key, f"{result[key]:.4g}", f"{masked:.4g}")
    note = f"{result['devices']} x {result['device']}; masks cost {result['mask_overhead']:+.1%}"
    rich.console.Console(stderr=cli.json_wanted()).print(table, note, sep="\n")
    return result


if __name__ == "__main__":
    cli.run(main)
