"""Checks a group of processes before a run: devices, mesh, files, versions.

  flm doctor
  flm doctor --config=configs/demo.py --workdir=runs/demo
  srun flm doctor --distributed --config=configs/tele_flm_52b.py --workdir=/shared/run

Start it as the run itself: the same launcher, flags, config and workdir. It prints what each
process sees and one line for each problem, and exits with status 1 if there is one: idle
accelerators, processes that see different numbers of devices, a mesh that does not fit, files that
a process cannot read or write. It creates nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import rich.box
import rich.console
import rich.table

from flm_jax.commands import config_files
from flm_jax.commands.command import Call, Command, Gate
from flm_jax.commands.group_flags import GroupFlags
from flm_jax.runs import doctor
from flm_jax.runtime import processes


def main(call: Call[GroupFlags]) -> dict[str, Any]:
    config = config_files.experiment(call.config) if call.config else None
    with processes.joined(call.flags.group()):
        counts = processes.device_counts()
        seen = doctor.look(doctor.needs_of(config, call.workdir))
        # A collective over unequal processes does not work: each can then describe only itself.
        everyone = [seen] if processes.uneven(counts) else processes.everyone(seen)
        found = doctor.problems(everyone, counts)
        meshes, wrong = doctor.meshes(config) if config else ([], "")
        found += [wrong] if wrong else []
        if processes.first():
            _show(everyone, meshes, found, call.console())
    return {
        "processes": everyone,
        "devices": jax.device_count(),
        "meshes": meshes,
        "problems": found,
    }


def _show(
    seen: list[dict[str, Any]],
    meshes: list[dict[str, int]],
    found: list[str],
    console: rich.console.Console,
) -> None:
    columns = ("process", "host", "launcher", "devices", "kind", "memory")
    table = rich.table.Table(*columns, box=rich.box.SIMPLE)
    for one in seen:
        memory = one["memory_bytes"]
        table.add_row(
            str(one["process"]),
            one["host"],
            one["launcher"],
            f"{one['devices']} of {one['installed']}" if one["installed"] else str(one["devices"]),
            f"{one['platform']} {one['kind']}",
            f"{memory / 1e9:.1f} GB" if memory else "not known",
        )
    console.print(table)
    console.print(", ".join(f"{name} {version}" for name, version in seen[0]["versions"].items()))
    for index, mesh in enumerate(meshes):
        console.print(f"stage {index}: " + " x ".join(f"{axis} {n}" for axis, n in mesh.items()))
    for line in found:
        console.print(f"problem: {line}", highlight=False, soft_wrap=True)
    if not found:
        console.print("no problem found")


COMMAND = Command(
    main, GroupFlags, config="optional", workdir="optional",
    gate=Gate(1, lambda result: "; ".join(result["problems"])),
)  # fmt: skip
