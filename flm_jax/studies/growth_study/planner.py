"""Whether to grow a model, from which size, when and how: as far as a study has tested it.

What is known is the compute multiplier of each arm at one target, one budget and one text. A plan
transfers it at equal C over the crossover, and says how far from the tested range a question is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from flm_jax.errors import UserError
from flm_jax.studies.growth_study import analysis
from flm_jax.studies.growth_study.results import Results

SIZE_RANGE = 1.5  # factor on the target's parameters within which a study counts as a test
BUDGET_RANGE = 1.5  # likewise on C


@dataclasses.dataclass(frozen=True)
class Tested:
    """An arm of a study.

    Attributes:
      arm, recipe, chain, shares: how it grows.
      source_share: FLOPs per token of its first model over the target's.
      multiplier, low, high: compute multiplier with its 95% interval.
      verdict: the study's.
    """

    arm: str
    recipe: str
    chain: Sequence[str]
    shares: Sequence[float]
    source_share: float
    multiplier: float
    low: float | None
    high: float | None
    verdict: str


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a study knows, as `flm plan` reads it.

    Attributes:
      study: its name.
      target: the target's name.
      params: model -> parameters.
      budget: C.
      crossover: FLOPs at which the target catches up with the source; None: not measured.
      seeds: number of seeds.
      fixed: model -> mean bits per byte at C.
      arms: what each growth gave.
      primary: the arm that was tested.
    """

    study: str
    target: str
    params: Mapping[str, int]
    budget: float
    crossover: float | None
    seeds: int
    fixed: Mapping[str, float]
    arms: Sequence[Tested]
    primary: str


def fitted(results: Results) -> Fit | None:
    """Reads a study's results; None before its arms are finished."""
    losses, frozen, config = results.losses(), results.frozen, results.config
    if losses is None or frozen is None or frozen["primary"] not in losses.arms:
        return None
    models = results.header["models"]
    arms = []
    for arm in config.arms:
        if arm.name not in losses.arms:
            continue
        found = analysis.judge(losses, arm.name)
        m = found.multiplier
        low, high = ((v if m.seeds > 1 else None) for v in (m.low, m.high))
        share = models[arm.chain[0]]["flops_per_token"] / models[config.target]["flops_per_token"]
        arms.append(
            Tested(
                arm.name, arm.growth.recipe, arm.chain, arm.shares, share, m.mean, low, high,
                found.verdict,
            )
        )  # fmt: skip
    gate = frozen["gate"] or {}
    return Fit(
        results.name,
        config.target,
        {name: m["params"] for name, m in models.items()},
        frozen["budget"],
        gate.get("crossover"),
        len(losses.fixed[config.target]),
        {n: sum(v.values()) / len(v) for n, v in losses.fixed.items()},
        arms,
        frozen["primary"],
    )


def read(path: pathlib.Path) -> list[Fit]:
    """Reads docs/study/plans.json; [] if it does not exist."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [Fit(**{**row, "arms": [Tested(**arm) for arm in row["arms"]]}) for row in rows]
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path}: no plans of this version; run `flm study --report`") from error


def plan(fits: Sequence[Fit], params: int, budget: float) -> dict[str, Any]:
    """Answers whether to grow.

    Args:
      fits: what studies know.
      params: the target's parameters.
      budget: training FLOPs.

    Returns:
      answer: "grow", "do not grow" or "not tested"; why; and, as far as known, the study, the
      recipe, the source's share of the target's FLOPs per token, the shares of the budget at which
      to grow, the multiplier and its interval, the fixed size that did best, and `outside`: in what
      the question is outside the tested range.
    """
    if not fits:
        return {
            "answer": "not tested",
            "why": "no study has finished its arms (docs/study); run flm study first",
            "outside": ["everything"],
        }
    nearest = min(fits, key=lambda f: abs(math.log(f.params[f.target] / params)))
    size, c = nearest.params[nearest.target], nearest.budget
    outside = []
    if not 1 / SIZE_RANGE <= params / size <= SIZE_RANGE:
        outside.append(
            f"target: {params} parameters; tested: {size / SIZE_RANGE:.3g} to "
            f"{size * SIZE_RANGE:.3g}"
        )
    if not 1 / BUDGET_RANGE <= budget / c <= BUDGET_RANGE:
        outside.append(
            f"budget: {budget:.3g} FLOPs; tested: {c / BUDGET_RANGE:.3g} to {c * BUDGET_RANGE:.3g}"
        )
    arm = next(a for a in nearest.arms if a.arm == nearest.primary)
    best = min(nearest.fixed, key=lambda name: nearest.fixed[name])
    advice = {
        analysis.SAVES: ("grow", "the arm beat the target from scratch and every fixed size"),
        analysis.RIGHT_SIZING: (
            "do not grow",
            f"the fixed size {best} ({nearest.params[best]} parameters) did as well at this budget",
        ),
        analysis.HARMS: ("do not grow", "the target from scratch needed fewer FLOPs"),
        analysis.UNDECIDED: ("do not grow", "no saving was shown; the interval includes 1"),
        analysis.VOID: (
            "do not grow",
            "below the crossover the source itself is as good at this budget; train the source",
        ),
    }
    answer, why = advice[arm.verdict]
    return {
        "answer": "not tested" if outside else answer,
        "why": f"outside the tested range; nearest study: {answer}, {why}" if outside else why,
        "outside": outside,
        "study": nearest.study,
        "seeds": nearest.seeds,
        "recipe": arm.recipe,
        "chain": list(arm.chain),
        "source_share": round(arm.source_share, 3),
        "grow_at": list(arm.shares),
        "multiplier": arm.multiplier,
        "interval": [arm.low, arm.high],
        "best_fixed": best,
        "crossover": nearest.crossover,
    }
