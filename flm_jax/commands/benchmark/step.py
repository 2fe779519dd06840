"""Times the train step of a config, plain and with masks.

  flm benchmark step --config=configs/bench_34m.py
  flm benchmark step --config=configs/demo.py --stage=2 --json

Prints compile time, median step, tokens/s and share of matmul peak. The plain and the masked step
run in turns in one process, so that their ratio holds on a machine that others use too.
`--trace=DIR` writes a profile for TensorBoard or Perfetto.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import rich.table

from flm_jax.commands import config_files
from flm_jax.commands.command import Call, Command, flag
from flm_jax.studies import speed


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    stage: int = flag(0, "Index of the chain's stage.", lower=0)
    steps: int = flag(5, "Timed steps of each variant.", lower=1)
    trace: str = flag("", "Folder for a profile of the timed steps.")


def main(call: Call[Flags]) -> dict[str, Any]:
    chain = config_files.experiment(call.config)
    config_files.stage_index(chain, call.flags.stage)
    tracing = jax.profiler.trace(call.flags.trace) if call.flags.trace else contextlib.nullcontext()
    with tracing:
        result = speed.measure_step(chain, call.flags.stage, call.flags.steps)
    table = rich.table.Table("", "plain", "masked")
    for key, masked in result["masked"].items():
        table.add_row(key, f"{result[key]:.4g}", f"{masked:.4g}")
    note = f"{result['devices']} x {result['device']}; masks cost {result['mask_overhead']:+.1%}"
    call.console().print(table, note, sep="\n")
    return result


COMMAND = Command(main, Flags)
