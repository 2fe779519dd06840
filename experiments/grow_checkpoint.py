"""Grows a run's train state from disk to disk, in bounded memory.

  python -m experiments.grow_checkpoint --config=configs/demo.py --source=runs/demo \
    --target=runs/grown --memory=1073741824

SOURCE is a run whose last finished stage (or --stage) grows into the next one of the config; TARGET
becomes a run that `experiments.grow` with the same config goes on from. Stopped anywhere and
called again, it does what is missing.
"""

from __future__ import annotations

from typing import Any

import ml_collections
import rich.console
from absl import flags
from rich.filesize import decimal

from experiments import cli
from flm_jax.errors import UserError
from flm_jax.runs import grow_on_disk
from flm_jax.runtime import host

SOURCE = flags.DEFINE_string("source", None, "The run to grow.")
TARGET = flags.DEFINE_string("target", None, "The new run's folder.")
STAGE = flags.DEFINE_string("stage", "", "Index or name of the finished stage; '': the last.")
MEMORY = flags.DEFINE_integer("memory", 1 << 30, "Bytes to work with at once.")


def main(config: ml_collections.ConfigDict) -> dict[str, Any]:
    folders = {"source": SOURCE.value, "target": TARGET.value}
    for name, value in folders.items():
        if not value:
            raise UserError(f"--{name} is missing; give a run's folder, as --{name}=runs/NAME")
    if MEMORY.value <= 0:
        raise UserError(f"--memory={MEMORY.value}: give a number of bytes above 0")
    host.keep_freed()
    experiment = cli.experiment(config)
    if experiment.quick_compile:
        host.compile_quickly()
    result = grow_on_disk.grow(
        experiment, str(folders["source"]), str(folders["target"]), STAGE.value, MEMORY.value
    )
    console = rich.console.Console(stderr=cli.json_wanted(), soft_wrap=True)
    if result["bytes"]:
        console.print(
            f"{result['checkpoint']}: {decimal(result['bytes'])}, of which "
            f"{decimal(result['bytes_written'])} were written in {result['seconds']:.1f} s, "
            f"{decimal(int(result['bytes_per_s']))}/s"
        )
    else:
        console.print(f"{result['checkpoint']}: the growth is complete")
    return result


if __name__ == "__main__":
    cli.run(main)
