"""The analysis, fixed before the test seeds run: pure functions from losses to verdicts.

The digest of this file is frozen with the decisions of tuning; the report says whether it still
matches. Change it only with a reason that the report can give.

- **Compute multiplier** (primary): the FLOPs at which the target from scratch, decayed, reaches the
  arm's decayed loss, over C. The target's curve is, seed by seed, the parabola in the logarithm of
  FLOPs that fits its decayed losses best (least squares). It is used from `RANGE[0]` to `RANGE[1]`
  times C; beyond, or beyond the parabola's minimum, the multiplier is set to the limit and counted
  as a bound. Seeds are averaged as logarithms. The arm's FLOPs include its source's.
- **Difference** (co-primary): bits per byte at C, arm minus a fixed model, seed by seed.
- Intervals: 95%, Student's t over seeds.
- Both are required: an arm saves only if its multiplier is above 1 and it beats each of the fixed
  models S, M and T. Each of these intervals must lie on the right side, so that choosing the best
  fixed model after the fact costs nothing (intersection-union test, Berger 1982).
- Everything else is corrected together by Holm's method.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
RANGE = (0.4, 2.5)  # multiples of C
SAVES, RIGHT_SIZING, VOID, HARMS, UNDECIDED = (
    "saves", "only right-sizing", "below the crossover", "harms", "undecided",
)  # fmt: skip
MEANING = {
    SAVES: "the target from scratch needs more FLOPs for the arm's loss, and no fixed size that "
    "was tried is as good at C",
    RIGHT_SIZING: "the target from scratch needs more FLOPs for the arm's loss, but a fixed size "
    "is as good at C, or not shown to be worse: choosing the size would do as well",
    VOID: "the target is not shown to beat the source at C, so nothing can be said; raise C",
    HARMS: "the target from scratch reaches the arm's loss with fewer FLOPs",
    UNDECIDED: "the interval of the multiplier includes 1",
}


def digest() -> str:
    """SHA-256 of this file."""
    return hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95% interval.

    Attributes:
      mean: the mean; of a multiplier the geometric one.
      low, high: ends of the interval; infinite with one seed.
      seeds: number of seeds.
      p: two-sided p-value of no effect (difference 0, multiplier 1); 1 with one seed.
      bounds: seeds whose multiplier is only a bound.
    """

    mean: float
    low: float
    high: float
    seeds: int
    p: float
    bounds: int = 0


def interval(values: Sequence[float]) -> Interval:
    """The mean of values over seeds, by Student's t; the null value is 0.

    >>> interval([1.0, 2.0, 3.0]).mean
    2.0
    """
    x = np.asarray(values, float)
    mean = float(x.mean())
    if len(x) < 2:
        return Interval(mean, -math.inf, math.inf, len(x), 1.0)
    error = float(x.std(ddof=1)) / math.sqrt(len(x))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 1)) * error
    if error == 0:
        return Interval(mean, mean, mean, len(x), float(mean == 0))
    p = 2 * float(stats.t.sf(abs(mean) / error, len(x) - 1))
    return Interval(mean, mean - half, mean + half, len(x), p)


def multiplier(shares: Sequence[float], losses: Sequence[float], loss: float) -> tuple[float, bool]:
    """The share of C at which a curve reaches a loss.

    Args:
      shares: FLOPs of the curve's points over C; three or more.
      losses: their decayed losses.
      loss: the loss to reach.

    Returns:
      The share, and whether it is only a bound.

    >>> round(multiplier((0.5, 1.0, 2.0), (1.2, 1.1, 1.0), 1.0)[0], 6)
    2.0
    """
    a, b, c = np.polyfit(np.log(shares), losses, 2)
    low, high = math.log(RANGE[0]), math.log(RANGE[1])
    if a > 0:
        high = min(high, -b / (2 * a))
    elif a < 0:
        low = max(low, -b / (2 * a))

    def curve(x: float) -> float:
        return float(a * x * x + b * x + c)

    if low >= high:  # the curve rises: it cannot tell
        return 1.0, True
    if loss >= curve(low):
        return math.exp(low), True
    if loss <= curve(high):
        return math.exp(high), True
    for _ in range(80):
        middle = (low + high) / 2
        if curve(middle) > loss:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2), False


@dataclasses.dataclass(frozen=True)
class Losses:
    """The decayed losses of a study.

    Attributes:
      target: share of C -> seed -> bits per byte of the target from scratch.
      fixed: model -> seed -> bits per byte at C; the target is one of them.
      arms: arm -> seed -> bits per byte at C.
      spent: arm -> its FLOPs over C, which whole steps make a little more or less than 1.
      source, between: names of two of the fixed models.
      goal: the target's name.
    """

    target: Mapping[float, Mapping[int, float]]
    fixed: Mapping[str, Mapping[int, float]]
    arms: Mapping[str, Mapping[int, float]]
    spent: Mapping[str, float] = dataclasses.field(default_factory=dict)
    source: str = "S"
    between: str = "M"
    goal: str = "T"


def compute_multiplier(losses: Losses, arm: str) -> Interval:
    """The arm's multiplier over the seeds that it shares with every point of the target's curve."""
    shares = sorted(losses.target)
    mine = losses.arms[arm]
    seeds = sorted(set(mine).intersection(*(set(losses.target[s]) for s in shares)))
    pairs = [
        multiplier(shares, [losses.target[s][seed] for s in shares], mine[seed]) for seed in seeds
    ]
    spent = losses.spent.get(arm, 1.0)
    logs = interval([math.log(m / spent) for m, _ in pairs])
    bounds = sum(bound for _, bound in pairs)
    low, high = math.exp(logs.low), math.exp(min(logs.high, 700.0))
    return Interval(math.exp(logs.mean), low, high, logs.seeds, logs.p, bounds)


def difference(mine: Mapping[int, float], other: Mapping[int, float]) -> Interval:
    """Mine minus the other's, paired by seed."""
    return interval([mine[seed] - other[seed] for seed in sorted(set(mine) & set(other))])


@dataclasses.dataclass(frozen=True)
class Result:
    """What is known of an arm.

    Attributes:
      arm: its name.
      multiplier: compute multiplier.
      versus: fixed model -> difference at C, arm minus model.
      best: the fixed model among S, M and T with the lowest mean.
      verdict: one of the five.
    """

    arm: str
    multiplier: Interval
    versus: Mapping[str, Interval]
    best: str
    verdict: str


def verdict(
    multiplier: Interval, versus: Mapping[str, Interval], target_versus_source: Interval
) -> str:
    """The verdict on an arm.

    Args:
      multiplier: the arm's.
      versus: the arm minus each of S, M and T, at C.
      target_versus_source: the target minus the source, at C.
    """
    if not target_versus_source.high < 0:
        return VOID
    if multiplier.high < 1:
        return HARMS
    if multiplier.low > 1:
        return SAVES if all(d.high < 0 for d in versus.values()) else RIGHT_SIZING
    return UNDECIDED


def judge(losses: Losses, arm: str) -> Result:
    """Applies the rules above to an arm."""
    names = dict.fromkeys((losses.source, losses.between, losses.goal))
    mine = losses.arms[arm]
    versus = {name: difference(mine, losses.fixed[name]) for name in names}
    means = {name: float(np.mean(list(losses.fixed[name].values()))) for name in names}
    made = compute_multiplier(losses, arm)
    crossed = difference(losses.fixed[losses.goal], losses.fixed[losses.source])
    return Result(
        arm, made, versus, min(means, key=lambda n: means[n]), verdict(made, versus, crossed)
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusts p-values for their number (Holm 1979).

    >>> holm({"a": 0.01, "b": 0.04})
    {'a': 0.02, 'b': 0.04}
    """
    adjusted, highest = {}, 0.0
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for n, name in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - n) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def secondary(
    losses: Losses, primary: str, ablations: Mapping[str, Mapping[int, float]]
) -> dict[str, tuple[Interval, float]]:
    """All other comparisons, with p-values adjusted together.

    Args:
      losses: the study's.
      primary: the primary arm, which is left out.
      ablations: ablation -> seed -> bits per byte at C; each is compared with the primary arm.

    Returns:
      Comparison -> interval and adjusted p-value.
    """
    found: dict[str, Interval] = {}
    for arm, values in losses.arms.items():
        if arm == primary:
            continue
        found[f"multiplier of {arm}"] = compute_multiplier(losses, arm)
        for name, fixed in losses.fixed.items():
            found[f"{arm} minus {name}"] = difference(values, fixed)
    for name, values in ablations.items():
        found[f"{name} minus {primary}"] = difference(values, losses.arms[primary])
    adjusted = holm({name: value.p for name, value in found.items()})
    return {name: (value, adjusted[name]) for name, value in found.items()}
