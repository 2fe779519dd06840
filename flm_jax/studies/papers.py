"""The benchmarks of the Tele-FLM papers, and the scores that they report.

Sources: 2404.16645 is the Tele-FLM report (its tables of English and Chinese benchmarks and of
bits per byte), 2309.03852 is FLM-101B, "model card" that of FLM-2-52B-Instruct-2407. No scores of
the 1T model were published.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flm_jax.sft.alignbench import CATEGORIES, REPORTED


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One row.

    Attributes:
      scores: model -> reported score, in percent; AlignBench's are 1 to 10, bits per byte are that.
      task, metric: the nearest of lm-evaluation-harness and the metric to compare; "" if it has
        none. Prompts and numbers of examples may differ from the paper's.
      lower_is_better: for bits per byte.
    """

    group: str
    name: str
    scores: Mapping[str, float]
    source: str
    task: str = ""
    metric: str = ""
    lower_is_better: bool = False


TELE_FLM = "Tele-FLM-52B"


def _tele_flm(group: str, name: str, score: float, task: str = "", metric: str = "") -> Benchmark:
    return Benchmark(group, name, {TELE_FLM: score}, "2404.16645", task, metric)


def _bits_per_byte(name: str, *scores: float | None) -> Benchmark:
    models = (TELE_FLM, "Llama2-70B", "Llama3-70B", "Qwen1.5-72B")
    given = {m: s for m, s in zip(models, scores, strict=True) if s is not None}
    return Benchmark("bits per byte", name, given, "2404.16645", lower_is_better=True)


BENCHMARKS: tuple[Benchmark, ...] = (
    _tele_flm("English", "ARC", 59.47, "arc_challenge", "acc_norm"),
    _tele_flm("English", "HellaSwag", 82.25, "hellaswag", "acc_norm"),
    _tele_flm("English", "MMLU", 64.00, "mmlu", "acc"),
    _tele_flm("English", "TruthfulQA", 43.09, "truthfulqa_mc2", "acc"),
    _tele_flm("English", "WinoGrande", 79.40, "winogrande", "acc"),
    _tele_flm("English", "GSM8K", 45.19, "gsm8k", "exact_match"),
    _tele_flm("English", "HumanEval", 34.76, "humaneval", "pass@1"),
    _tele_flm("English", "BBH", 44.60, "bbh_fewshot", "exact_match"),
    Benchmark(
        "English", "average of the 8",
        {TELE_FLM: 56.60, "Llama-65B": 56.98, "Llama2-70B": 63.39}, "2404.16645",
    ),
    _tele_flm("Chinese", "C-Eval", 65.48, "ceval-valid", "acc"),
    _tele_flm("Chinese", "CMMLU", 66.98, "cmmlu", "acc"),
    _tele_flm("Chinese", "C3", 66.25),
    _tele_flm("Chinese", "CHID", 92.57),
    _tele_flm("Chinese", "CSL", 64.38),
    _tele_flm("Chinese", "average of the 5", 71.13),
    _bits_per_byte("English, weights of Llama's mix", 0.550, 0.576, 0.528, 0.620),
    _bits_per_byte("English, weights of its own mix", 0.516, 0.547, 0.502, 0.586),
    _bits_per_byte("Chinese, average", 0.650, None, 0.873, 0.764),
    _bits_per_byte("Chinese, weighted", 0.646, None, 0.897, 0.759),
    Benchmark(
        "Open LLM Leaderboard", "average, by stage of growth",
        {"FLM-16B": 39.19, "FLM-51B": 41.79, "FLM-101B": 44.41}, "2309.03852",
    ),
    *(
        Benchmark(
            "AlignBench", name, {model: scores[name] for model, scores in REPORTED.items()},
            "model card of FLM-2-52B-Instruct-2407; README of AlignBench",
        )
        for name in ("Overall", *CATEGORIES)
    ),
)  # fmt: skip


def own_score(benchmark: Benchmark, results: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The same benchmark's score in what `flm harness` found, in percent; None: not run.

    The harness names a metric with the filter that its answers went through, as "acc,none".
    """
    for name, value in results.get(benchmark.task, {}).items():
        metric = name.split(",")[0]
        if metric == benchmark.metric and isinstance(value, int | float):
            return 100 * float(value)
    return None
