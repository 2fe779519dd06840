"""What happened at and after each growth: measurements for the report, from the raw results."""

from __future__ import annotations

import dataclasses
import statistics

import numpy as np

from flm_jax.studies.growth_study.figures import loss_curve
from flm_jax.studies.growth_study.results import Results, Row


@dataclasses.dataclass(frozen=True)
class Growths:
    """An arm's last growth, mean over its seeds.

    Attributes:
      arm: the arm.
      before, after: validation bits per byte just before and after the growth, on a part of the
        validation set, masks at 0.
      recovered: share of C after which the training loss is back at its level before; None: never.
      slope_before, slope_after: change of the training loss, nats per token for a tenth of C.
      dead, locked: added slots without a gradient, and copies that equal their source, right after
        the growth.
      dead_end, locked_end: the same when training ends.
      tokens: tokens that the arm read, over those that the target from scratch read.
    """

    arm: str
    before: float
    after: float
    recovered: float | None
    slope_before: float | None
    slope_after: float | None
    dead: float
    locked: float
    dead_end: float
    locked_end: float
    tokens: float


def measured(results: Results) -> list[Growths]:
    """The growths of all arms and ablations."""
    frozen = results.frozen
    if frozen is None:
        return []
    by_arm: dict[str, list[Row]] = {}
    for phase in ("arms", "ablations"):
        for trial in results.of(phase):
            if any(piece.get("growth") for piece in results.chain(trial)):
                by_arm.setdefault(trial["arm"], []).append(trial)
    target = [
        t["result"]["tokens"]
        for t in results.of("arms")
        if t["arm"] == results.config.target and t["share"] == 1
    ]
    return [
        _of_arm(results, arm, trials, frozen["budget"], target[0] if target else 0)
        for arm, trials in by_arm.items()
    ]


def _of_arm(
    results: Results, arm: str, trials: list[Row], budget: float, target_tokens: int
) -> Growths:
    rows: dict[str, list[float | None]] = {}
    for trial in trials:
        chain = results.chain(trial)
        grown = next(piece for piece in reversed(chain) if piece.get("growth"))
        xs, ys = (np.array(v) for v in loss_curve(results, trial))
        at = results.pieces[grown["started_from"]]["flops"]
        stable = xs <= at + (1 - results.config.decay_share) * budget - at
        old, new = xs <= at, (xs > at) & stable
        level = float(ys[old][-3:].mean())
        back = xs[new][ys[new] <= level]
        stuck = trial["result"].get("stuck", {})
        values = {
            "before": grown["growth"]["bpb_before"],
            "after": grown["growth"]["bpb_after"],
            "recovered": float(back[0] - at) / budget if len(back) else None,
            "slope_before": _slope(xs[old], ys[old], budget),
            "slope_after": _slope(xs[new], ys[new], budget),
            "dead": grown["growth"]["dead_slots"],
            "locked": grown["growth"]["locked_copies"],
            "dead_end": stuck.get("dead_slots", 0),
            "locked_end": stuck.get("locked_copies", 0),
            "tokens": trial["result"]["tokens"] / target_tokens if target_tokens else 0.0,
        }
        for name, value in values.items():
            rows.setdefault(name, []).append(value)
    means: dict[str, float | None] = {
        name: None if None in values else statistics.fmean(v for v in values if v is not None)
        for name, values in rows.items()
    }
    return Growths(arm, **means)  # type: ignore[arg-type]


def _slope(flops: np.ndarray, losses: np.ndarray, budget: float) -> float | None:
    """Slope of the last half of a curve, for a tenth of the budget; None with too few points."""
    half = len(flops) // 2
    if len(flops) - half < 3:
        return None
    return float(np.polyfit(flops[half:] / (0.1 * budget), losses[half:], 1)[0])
