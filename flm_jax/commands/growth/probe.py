"""Grows a model by several recipes, trains each for equal FLOPs, ranks them.

  flm growth probe --config=configs/probe_growth.py --workdir=runs/probe

Stopped anywhere and called again, it resumes. Afterwards see DIR/report/probe.md and probe.png;
every arm's own run is in DIR/arms.
"""

from __future__ import annotations

from typing import Any

import rich.markdown

from flm_jax.commands import config_files
from flm_jax.commands.command import Call, Command, NoFlags
from flm_jax.studies import probe
from flm_jax.studies.config import ProbeConfig


def main(call: Call[NoFlags]) -> dict[str, Any]:
    settings = config_files.dataclass_of(ProbeConfig, call.config)
    arms = probe.run(settings, call.workdir)
    path = probe.write_report(arms, call.workdir)
    console = call.console()
    console.print(rich.markdown.Markdown(probe.markdown(arms)), f"report: {path}")
    return {"arms": arms}


COMMAND = Command(main, NoFlags, workdir="required")
