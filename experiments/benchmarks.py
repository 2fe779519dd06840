r"""Lists the benchmarks of the Tele-FLM papers with the scores that they report.

  python -m experiments.benchmarks
  python -m experiments.benchmarks --results=harness.json --json

--results puts your own scores beside them: a file with what `experiments.harness --json` printed.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.table
from absl import flags

from experiments import cli
from flm_jax.errors import UserError
from flm_jax.studies import reported

RESULTS = flags.DEFINE_string("results", None, "File with the output of experiments.harness.")


def _read(path: str) -> dict[str, Any]:
    try:
        found = json.loads(pathlib.Path(path).expanduser().read_text(encoding="utf-8"))
        return dict(found["results"])
    except OSError as error:
        raise UserError(f"--results={path}: {error.strerror}; give a file") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--results={path} is not what experiments.harness --json prints ({error!r}); give that"
        ) from error


def main(arguments: Sequence[str]) -> dict[str, Any]:
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; options begin with --")
    results = _read(RESULTS.value) if RESULTS.value else None
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
    rich.console.Console(stderr=cli.json_wanted()).print(table)
    return {"benchmarks": rows}


if __name__ == "__main__":
    cli.run(main, needs_config=False)
