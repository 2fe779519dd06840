"""Grows a run's train state from disk to disk, in bounded memory.

  flm growth checkpoint --config=configs/demo.py --source=runs/demo \
    --target=runs/grown --memory=1073741824

SOURCE is a run whose last finished stage (or --stage) grows into the next one of the config; TARGET
becomes a run that `flm train` with the same config continues. Stopped anywhere and called again, it
resumes. A path may be on a bucket (gs://).

On several hosts, start the same command on each with the processes' flags, as for `flm train`: each
writes its share. If one is lost, the same command with any number of processes continues.

SOURCE may also be the `source` of the config's first stage: a folder of Hugging Face files, or any
run or checkpoint. It becomes the first stage of TARGET, untrained (steps=0), and grows from there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.filesize import decimal

from flm_jax.commands import config_files
from flm_jax.commands.command import Call, Command, flag
from flm_jax.commands.group_flags import GroupFlags
from flm_jax.errors import UserError
from flm_jax.params import topology
from flm_jax.runs import grow_on_disk
from flm_jax.runtime import host, processes


@dataclasses.dataclass(frozen=True)
class Flags(GroupFlags):
    """The command's own flags."""

    source: str = flag(
        "",
        "The run to grow, or the source of the config's first stage.",
        required="give a run's folder, as --source=runs/NAME, or the first stage's source",
    )
    target: str = flag(
        "", "The new run's folder.", required="give a run's folder, as --target=runs/NAME"
    )
    stage: str = flag("", "Index or name of the finished stage to grow; empty: the last one.")
    memory: int = flag(1 << 30, "Bytes of memory to work in, for each process.")
    topology: str = flag("", "Where the target will train, as v5p:8x8x8: its layouts count.")


def main(call: Call[Flags]) -> dict[str, Any]:
    flags = call.flags
    if flags.memory <= 0:
        raise UserError(f"--memory={flags.memory}: give a number of bytes above 0")
    host.keep_freed()
    experiment = config_files.experiment(call.config)
    if experiment.quick_compile:
        host.compile_quickly()
    if flags.topology:
        topology.parse(flags.topology)
    with processes.joined(flags.group()):
        result = grow_on_disk.grow(
            experiment, flags.source, flags.target, flags.stage, flags.memory, flags.topology
        )
        shows = processes.first()
    console = call.console(soft_wrap=True)
    if not shows:
        pass
    elif result["bytes"]:
        console.print(
            f"{result['checkpoint']}: {decimal(result['bytes'])}; "
            f"{decimal(result['bytes_written'])} were written in {result['seconds']:.1f} s, "
            f"{decimal(int(result['bytes_per_s']))}/s"
        )
    else:
        console.print(f"{result['checkpoint']}: the growth is complete")
    return result


COMMAND = Command(main, Flags)
