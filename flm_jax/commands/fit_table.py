"""The table of what compilers report about a run's programs, for the commands that compile them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import rich.table

Report = Mapping[str, Any]  # see `aot.compiler.report`


def row(report: Report) -> list[str]:
    """The cells of one program."""
    limit, made = report["hbm_limit_bytes"], report.get("forecast")
    steps = f"{report['accumulate']} x {report['batch'] // report['accumulate']}"
    return [
        report["stage"], report["what"], report["topology"],
        ",".join(f"{k}={v}" for k, v in report["mesh"].items() if v > 1),
        steps, report["remat"],
        "yes" if report["fits"] else f"no: {report['missing_bytes'] / 1e9:.1f} GB missing",
        f"{report['hbm_bytes'] / 1e9:.3g} of {limit / 1e9:.1f} GB", report["binds"],
        f"{made['step_s']:.3g} s, {made['utilisation']:.0%}" if made else "",
        f"{made['bound_s']:.3g} s ({made['bound']})" if made else "",
        f"{report['compile_s']:.0f} s",
    ]  # fmt: skip


def table(reports: Sequence[Report]) -> rich.table.Table:
    """The reports of `compiler.report`, a row for each program."""
    table = rich.table.Table(
        "stage", "program", "topology", "mesh", "batch", "remat", "fits", "HBM", "binds",
        "forecast", "bound", "compile",
    )  # fmt: skip
    for report in reports:
        table.add_row(*row(report))
    return table


def failure(result: Mapping[str, Any]) -> str:
    """What does not fit, by stage; "" if all `programs` fit."""
    bad = [r for r in result["programs"] if not r["fits"]]
    return "; ".join(
        f"stage {r['stage']}, {r['what']} on {r['topology']} misses {r['missing_bytes'] / 1e9:.1f} "
        f"GB of {r['hbm_limit_bytes'] / 1e9:.1f} (largest: {r['binds']})"
        for r in bad
    )
