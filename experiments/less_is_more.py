"""Tests "less is more": size, selection and mix of conversations, several seeds, one report.

  python -m experiments.less_is_more --config=configs/less_is_more.py --workdir=runs/less_is_more

Stopped anywhere and called again, it goes on. Afterwards see DIR/report/less_is_more.md; every
arm's own run is in DIR/arms.
"""

from __future__ import annotations

from typing import Any

import ml_collections
import rich.console

from experiments import cli
from flm_jax.studies import claims, less_is_more
from flm_jax.studies.less_is_more import LessIsMoreConfig


def main(config: ml_collections.ConfigDict) -> dict[str, Any]:
    settings = cli.dataclass_of(LessIsMoreConfig, config)
    rows = less_is_more.run(settings, cli.workdir())
    verdicts = claims.write(settings, rows, cli.workdir())
    console = rich.console.Console(stderr=cli.json_wanted())
    console.print(*map(str, verdicts), f"report: {cli.workdir()}/report/less_is_more.md", sep="\n")
    return {"arms": rows, "verdicts": claims.verdict_rows(verdicts)}


if __name__ == "__main__":
    cli.run(main, needs_workdir=True)
