"""Grows one model by several recipes, trains each for the same FLOPs, and ranks them.

  python -m experiments.probe_growth --config=configs/probe_growth.py --workdir=runs/probe

Stopped anywhere and called again, it goes on. Afterwards see DIR/report/probe.md and probe.png;
every arm's own run is in DIR/arms.
"""

from __future__ import annotations

from typing import Any

import ml_collections
import rich.console
import rich.markdown

from experiments import cli
from flm_jax.studies import probe
from flm_jax.studies.config import ProbeConfig


def main(config: ml_collections.ConfigDict) -> dict[str, Any]:
    settings = cli.dataclass_of(ProbeConfig, config)
    arms = probe.run(settings, cli.workdir())
    path = probe.write_report(arms, cli.workdir())
    console = rich.console.Console(stderr=cli.json_wanted())
    console.print(rich.markdown.Markdown(probe.markdown(arms)), f"report: {path}")
    return {"arms": arms}


if __name__ == "__main__":
    cli.run(main, needs_workdir=True)
