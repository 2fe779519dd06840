r"""Lists benchmarks of the Tele-FLM papers, with their reported scores.

  flm reported
  flm reported --results=harness.json --json

--results puts your own scores beside them: a file with what `flm harness --json` printed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import rich.table

from flm_jax.commands.command import Call, Command, flag
from flm_jax.data import json_text
from flm_jax.errors import UserError
from flm_jax.runtime import paths, regular
from flm_jax.studies import reported


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    results: str | None = flag(None, "File with the output of `flm harness --json`.")


def _read(path: str) -> dict[str, Any]:
    """The results in a file with the output of `flm harness --json`."""
    try:
        output = json_text.parse(regular.read(paths.of(path)))
        return dict(output["results"])
    except UserError as error:
        raise UserError(f"--results={path}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--results={path} is not what flm harness --json prints ({error!r}); "
            "give a file with that output"
        ) from error


def main(call: Call[Flags]) -> dict[str, Any]:
    results = _read(call.flags.results) if call.flags.results else None
    table = rich.table.Table("", "benchmark", "reported", "source", "harness task")
    if results is not None:
        table.add_column("own", justify="right")
    rows, group = [], ""
    for benchmark in reported.benchmarks():
        row = dataclasses.asdict(benchmark)
        shown = "  ".join(f"{model} {score:g}" for model, score in benchmark.scores.items())
        cells = [
            "" if benchmark.group == group else benchmark.group,
            benchmark.name, shown, benchmark.source,
            f"{benchmark.task} {benchmark.metric}".strip(),
        ]  # fmt: skip
        group = benchmark.group
        if results is not None:
            row["own"] = reported.own_score(benchmark, results)
            cells.append("" if row["own"] is None else f"{row['own']:.2f}")
        table.add_row(*cells)
        rows.append(row)
    call.console().print(table)
    return {"benchmarks": rows}


COMMAND = Command(main, Flags, config="none")
