"""Scores that papers report, read from `reported.json`.

They cover the benchmarks of the Tele-FLM papers, and AlignBench. No scores of the 1T model were
published. The data file names the source of each score.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
      group: heading under which it is listed.
      name: the benchmark's name.
      scores: model -> reported score in percent; AlignBench: from 1 to 10; or bits per byte.
      source: a paper's arXiv number, or other pages; see `sources` in the data file.
      task: the nearest task of lm-evaluation-harness; "" if it has none. Prompts and the number of
        examples may differ from the paper's.
      metric: the task's metric to compare.
      lower_is_better: true for bits per byte.
    """

    group: str
    name: str
    scores: Mapping[str, float]
    source: str
    task: str = ""
    metric: str = ""
    lower_is_better: bool = False


@functools.cache
def benchmarks() -> tuple[Benchmark, ...]:
    """Returns all reported benchmarks, group by group."""
    file = importlib.resources.files("flm_jax.studies") / "reported.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
    return tuple(Benchmark(**row) for row in rows)


def own_score(benchmark: Benchmark, results: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Finds a benchmark's score in results of the evaluation harness.

    Args:
      benchmark: the benchmark to look for.
      results: task -> metric -> value, as `flm_jax.inference.harness.run` returns it. The harness
        appends the answers' filter to a metric's name: "acc,none".

    Returns:
      The score in percent; None if the benchmark was not run.
    """
    for name, value in results.get(benchmark.task, {}).items():
        metric = name.split(",")[0]
        if metric == benchmark.metric and isinstance(value, int | float):
            return 100 * float(value)
    return None
