"""The study's analysis recovers known answers from made-up results; its rules and its planner."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from flm_jax.studies.growth_study import analysis, planner
from flm_jax.studies.growth_study.analysis import Interval, Losses, Result

SHARES = (0.5, 1.0, 1.5, 2.0)
NOISE = 0.004  # bits per byte between seeds


def target_curve(share):
    """A power law like the pilot's: bits per byte of the target from scratch at share x C."""
    return 0.75 + 0.55 * share**-0.35


def made_up(rng, multiplier, seeds=5, best_fixed=0.0):
    """Results in which an arm has a known multiplier.

    Args:
      rng: draws the noise. A seed's trials share a part of it, as they share data and trunks.
      multiplier: the arm's.
      seeds: number of seeds.
      best_fixed: bits per byte by which M is better than T at C.
    """
    common = NOISE * rng.standard_normal(seeds)

    def noisy(value):
        own = NOISE * rng.standard_normal(seeds)
        return {s: float(value + common[s] + own[s]) for s in range(seeds)}

    target = {share: noisy(target_curve(share)) for share in SHARES}
    fixed = {"S": noisy(1.36), "M": noisy(target_curve(1.0) - best_fixed), "T": target[1.0]}
    return Losses(target, fixed, {"arm": noisy(target_curve(multiplier))})


@pytest.mark.parametrize("multiplier", [2.0, 1.0, 0.7])
def test_intervals_cover_the_true_multiplier_as_often_as_stated(multiplier):
    rng = np.random.default_rng(0)
    found = [analysis.compute_multiplier(made_up(rng, multiplier), "arm") for _ in range(400)]
    covered = np.mean([f.low <= multiplier <= f.high for f in found])
    # 400 draws of a share of 0.95 have a standard error of 0.011.
    assert 0.92 <= covered <= 0.98
    centre = math.exp(np.mean([math.log(f.mean) for f in found]))
    assert centre == pytest.approx(multiplier, rel=0.01)


def test_differences_cover_and_false_savings_are_rare():
    rng = np.random.default_rng(1)
    made = [made_up(rng, 1.0) for _ in range(400)]
    found = [analysis.difference(m.arms["arm"], m.fixed["T"]) for m in made]
    assert 0.92 <= np.mean([f.low <= 0 <= f.high for f in found]) <= 0.98
    # No effect: both one-sided bounds must err at once, each with probability 0.025.
    verdicts = [analysis.judge(m, "arm").verdict for m in made]
    assert verdicts.count(analysis.SAVES) <= 0.05 * 400


@pytest.mark.parametrize(
    "multiplier, best_fixed, wanted",
    [
        (2.0, 0.0, analysis.SAVES),
        (2.0, 0.3, analysis.RIGHT_SIZING),
        (1.0, 0.0, analysis.UNDECIDED),
        (0.6, 0.0, analysis.HARMS),
    ],
)
def test_verdicts_of_known_answers(multiplier, best_fixed, wanted):
    rng = np.random.default_rng(2)
    found = [
        analysis.judge(made_up(rng, multiplier, best_fixed=best_fixed), "arm").verdict
        for _ in range(100)
    ]
    assert found.count(wanted) >= 85


def test_below_the_crossover_nothing_is_said():
    losses = made_up(np.random.default_rng(3), 2.0)
    as_good = {s: v - 0.001 for s, v in losses.fixed["T"].items()}
    losses = dataclasses.replace(losses, fixed={**losses.fixed, "S": as_good})
    assert analysis.judge(losses, "arm").verdict == analysis.VOID


def test_a_multiplier_beyond_the_curve_is_a_bound_and_whole_steps_are_counted():
    losses = made_up(np.random.default_rng(4), 9.0)
    found = analysis.compute_multiplier(losses, "arm")
    assert found.bounds == 5 and found.mean <= analysis.RANGE[1]
    losses = made_up(np.random.default_rng(4), 1.2)
    spent = dataclasses.replace(losses, spent={"arm": 1.05})
    ratio = analysis.compute_multiplier(losses, "arm").mean
    assert analysis.compute_multiplier(spent, "arm").mean == pytest.approx(ratio / 1.05)


def test_one_seed_decides_nothing():
    losses = made_up(np.random.default_rng(5), 2.0, seeds=1)
    found = analysis.judge(losses, "arm")
    assert found.verdict == analysis.VOID and found.multiplier.low == 0


def test_holm_is_monotone_and_never_below_the_raw_value():
    p = {str(n): float(v) for n, v in enumerate(np.random.default_rng(6).uniform(size=9))}
    adjusted = analysis.holm(p)
    order = sorted(p, key=p.get)
    assert all(adjusted[name] >= p[name] for name in p)
    assert all(adjusted[a] <= adjusted[b] for a, b in itertools.pairwise(order))
    assert adjusted[order[0]] == min(1.0, 9 * p[order[0]])


def fit(verdict=analysis.SAVES):
    arm = planner.Tested("a", "msg", ("S", "T"), (0.5,), 0.25, 1.4, 1.1, 1.8, verdict)
    params = {"S": 100_000, "M": 250_000, "T": 500_000}
    return planner.Fit("full", "T", params, 2e13, 8e12, 5, {"S": 1.4, "T": 1.3}, [arm], "a")


def test_the_planner_says_where_it_was_never_tested():
    assert planner.plan([], 500_000, 2e13)["answer"] == "not tested"
    assert planner.plan([fit()], 500_000, 2e13)["answer"] == "grow"
    assert planner.plan([fit(analysis.RIGHT_SIZING)], 500_000, 2e13)["answer"] == "do not grow"
    for params, budget, field in ((5_000_000, 2e13, "target"), (500_000, 2e15, "budget")):
        found = planner.plan([fit()], params, budget)
        assert found["answer"] == "not tested"
        assert [line.split(":")[0] for line in found["outside"]] == [field]
    assert planner.plan([fit()], 500_000, 2e13)["interval"] == [1.1, 1.8]


def test_a_result_needs_every_control():
    value = Interval(-0.1, -0.2, -0.01, 5, 0.01)
    crossed, gain = Interval(-0.1, -0.2, -0.05, 5, 0.01), Interval(1.5, 1.2, 1.9, 5, 0.01)
    weak = dataclasses.replace(value, high=0.01)
    assert analysis.verdict(gain, {"S": value, "M": value, "T": value}, crossed) == analysis.SAVES
    mixed = {"S": value, "M": weak, "T": value}
    assert analysis.verdict(gain, mixed, crossed) == analysis.RIGHT_SIZING
    assert Result("a", gain, mixed, "M", "").best == "M"
