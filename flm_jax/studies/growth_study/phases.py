"""The study's phases: gate, tuning, freeze, arms, ablations; each follows from the results so far.

Every function here is pure. `pool.py` trains what a phase asks for, then asks for the next one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flm_jax.errors import UserError
from flm_jax.studies.growth_study.config import ArmConfig
from flm_jax.studies.growth_study.histories import History, Lab, closure, parent

TUNING_SEED = 1000  # of gate and tuning; no arm has it
Bits = Callable[[History], float | None]  # bits per byte of a finished history; None: it diverged


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trained model whose result is compared.

    Attributes:
      phase: "gate", "tuning", "growth tuning", "arms" or "ablations".
      arm: the arm, or the name of the model that does not grow.
      seed: the seed.
      flops: the FLOPs that it was given.
      share: these over C; 0 in the gate.
      rate: factor on the learning rates of its last model.
      history: what it trains.
    """

    phase: str
    arm: str
    seed: int
    flops: float
    share: float
    rate: float
    history: History


@dataclasses.dataclass(frozen=True)
class Gate:
    """What the gate found.

    Attributes:
      crossover: FLOPs at which the target catches up with the source; None: not in the range.
      budget: C.
      margin: bits per byte by which the target beats the source at C; None: outside the range.
      passed: whether it is large enough.
    """

    crossover: float | None
    budget: float
    margin: float | None
    passed: bool


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The decisions of tuning, written before any test seed runs.

    Attributes:
      budget: C, in FLOPs.
      rates: model -> factor on its learning rates.
      arm_rates: arm -> factors of every model of its chain.
      primary: the arm that is tested.
      tuning_flops: FLOPs of gate and tuning, each piece once.
      edges: models and arms whose best rate is the lowest or highest that was tried.
      analysis: digest of the analysis (`analysis.py`).
      gate: what the gate found; None: it had no budgets.
    """

    budget: float
    rates: Mapping[str, float]
    arm_rates: Mapping[str, Sequence[float]]
    primary: str
    tuning_flops: float
    edges: tuple[str, ...]
    analysis: str
    gate: Mapping[str, Any] | None = None


def gate_trials(lab: Lab) -> list[Trial]:
    """Source, between and target, decayed at every gate budget, at the untuned learning rate."""
    config = lab.config
    return [
        Trial("gate", name, TUNING_SEED, b, 0.0, 1.0, lab.fixed(name, TUNING_SEED, 1.0, b))
        for name in dict.fromkeys((config.source, config.between, config.target))
        for b in config.gate_budgets
    ]


def gate(lab: Lab, bits: Bits) -> Gate | None:
    """Decides the budget from the gate's results; None: the config fixes it and has no gate.

    Differences of bits per byte are interpolated in the logarithm of FLOPs.

    Raises:
      UserError: the gate does not give a budget that it can check.
    """
    config = lab.config
    if not config.gate_budgets:
        return None
    by_name: dict[str, list[float]] = {}
    for trial in gate_trials(lab):
        value = bits(trial.history)
        if value is None:
            raise UserError(
                f"gate: {trial.history.name()} diverged; lower learning_rate, in a new --workdir"
            )
        by_name.setdefault(trial.arm, []).append(value)
    logs = np.log(config.gate_budgets)
    ahead = np.array(by_name[config.source]) - np.array(by_name[config.target])
    crossover = _zero(logs, ahead)
    budget = config.budget or config.gate_ratio * (crossover or math.nan)
    if not math.isfinite(budget):
        raise UserError(
            f"gate: {config.target} is ahead of {config.source} by "
            f"{', '.join(f'{d:+.3f}' for d in ahead)} bits per byte at gate_budgets "
            f"{', '.join(f'{b:.3g}' for b in config.gate_budgets)}, so that there is no crossover "
            "in the range; change the budgets, or the sizes of the models"
        )
    inside = config.gate_budgets[0] <= budget <= config.gate_budgets[-1] * (1 + 1e-9)
    margin = float(np.interp(math.log(budget), logs, ahead)) if inside else None
    enough = margin is not None and margin >= config.gate_margin
    passed = enough or not config.gated
    return Gate(crossover, budget, margin, passed)


def _zero(x: np.ndarray, y: np.ndarray) -> float | None:
    """exp of the last x at which y rises through zero, linearly between points; None: nowhere."""
    for n in range(len(x) - 1, 0, -1):
        if y[n - 1] < 0 <= y[n]:
            return float(np.exp(x[n - 1] + (x[n] - x[n - 1]) * -y[n - 1] / (y[n] - y[n - 1])))
    return None


def tuning_trials(lab: Lab, budget: float) -> list[Trial]:
    """Every fixed model, at every rate."""
    config = lab.config
    flops = config.tuning_share * budget
    names = dict.fromkeys((*config.controls, *(n for a in config.arms for n in a.chain)))
    for change in config.changes:
        names |= dict.fromkeys(change.chain)
    return [
        Trial(
            "tuning", n, TUNING_SEED, flops, config.tuning_share, r,
            lab.fixed(n, TUNING_SEED, r, flops),
        )
        for n in names
        for r in config.tuning_rates
    ]  # fmt: skip


def best_rates(trials: Sequence[Trial], bits: Bits) -> dict[str, float]:
    """The rate with the lowest loss, for each name among the trials.

    Raises:
      UserError: all rates of a name diverged.
    """
    best: dict[str, tuple[float, float]] = {}
    for trial in trials:
        value = bits(trial.history)
        if value is not None:
            best[trial.arm] = min(best.get(trial.arm, (math.inf, 0.0)), (value, trial.rate))
    lost = {t.arm for t in trials} - set(best)
    if lost:
        raise UserError(
            f"tuning: all learning rates of {', '.join(sorted(lost))} diverged; lower "
            "learning_rate, in a new --workdir"
        )
    return {name: rate for name, (_, rate) in best.items()}


def growth_tuning_trials(lab: Lab, budget: float, rates: Mapping[str, float]) -> list[Trial]:
    """Every growth, at every rate of what follows it; the first model has its own rate."""
    config = lab.config
    flops = config.tuning_share * budget
    return [
        Trial(
            "growth tuning", arm.name, TUNING_SEED, flops, config.tuning_share, r,
            lab.grown(arm, TUNING_SEED, chain_rates(arm, rates, r), flops),
        )
        for arm in config.arms
        for r in config.tuning_rates
    ]  # fmt: skip


def chain_rates(arm: ArmConfig, rates: Mapping[str, float], after: float) -> tuple[float, ...]:
    """Rates of an arm's models: the first one's own, then `after`."""
    return (rates[arm.chain[0]], *[after] * (len(arm.chain) - 1))


def freeze(lab: Lab, bits: Bits, found: Gate | None, analysis: str) -> Frozen:
    """Makes the decisions from the results of gate and tuning.

    The primary arm is the candidate with the lowest loss at its best rate.

    Args:
      lab: the study.
      bits: results.
      found: the gate's, if there is one.
      analysis: digest of the analysis.

    Raises:
      UserError: as in `best_rates`.
    """
    config = lab.config
    budget = found.budget if found else config.budget
    fixed = tuning_trials(lab, budget)
    rates = best_rates(fixed, bits)
    grown = growth_tuning_trials(lab, budget, rates)
    after = best_rates(grown, bits)
    losses = {
        t.arm: value
        for t in grown
        if t.rate == after[t.arm] and (value := bits(t.history)) is not None
    }
    primary = min((a.name for a in config.arms if a.candidate), key=lambda name: losses[name])
    ends = {min(config.tuning_rates), max(config.tuning_rates)}
    return Frozen(
        budget=budget,
        rates=rates,
        arm_rates={a.name: chain_rates(a, rates, after[a.name]) for a in config.arms},
        primary=primary,
        tuning_flops=cost(lab, [t.history for t in (*gate_trials(lab), *fixed, *grown)]),
        edges=tuple(n for n, r in (rates | after).items() if r in ends),
        analysis=analysis,
        gate=dataclasses.asdict(found) if found else None,
    )


def arm_trials(lab: Lab, frozen: Frozen) -> list[Trial]:
    """The test: fixed models, then growths, for every seed."""
    config, c = lab.config, frozen.budget
    trials = []
    for seed in range(config.seeds):
        for name in config.controls:
            rate = frozen.rates[name]
            for share in config.multiples if name == config.target else (1.0,):
                history = lab.fixed(name, seed, rate, share * c)
                trials.append(Trial("arms", name, seed, share * c, share, rate, history))
        for arm in config.arms:
            if not (arm.tested or arm.name == frozen.primary):
                continue
            rates = tuple(frozen.arm_rates[arm.name])
            history = lab.grown(arm, seed, rates, c)
            trials.append(Trial("arms", arm.name, seed, c, 1.0, rates[-1], history))
    return trials


def ablation_trials(lab: Lab, frozen: Frozen) -> list[Trial]:
    """The primary arm with one thing changed, at the primary arm's rates."""
    config, c = lab.config, frozen.budget
    primary = config.arm(frozen.primary)
    trials = []
    for seed in range(config.change_seeds):
        for change in config.changes:
            arm = change.of(primary)
            rates = chain_rates(arm, frozen.rates, frozen.arm_rates[primary.name][-1])
            history = lab.grown(arm, seed, rates, c)
            trials.append(Trial("ablations", arm.name, seed, c, 1.0, rates[-1], history))
    return trials


def wanted(
    lab: Lab, bits: Bits, finished: Callable[[Sequence[Trial]], bool], frozen: Frozen | None
) -> Iterator[list[Trial]]:
    """Yields the trials of each phase, as far as they are known.

    Args:
      lab: the study.
      bits: results of finished histories.
      finished: whether all these trials have results.
      frozen: the decisions, once they are written. None: stops after tuning.
    """
    trials = gate_trials(lab)
    yield trials
    if not finished(trials):
        return
    found = gate(lab, bits)
    budget = found.budget if found else lab.config.budget
    trials = tuning_trials(lab, budget)
    yield trials
    if not finished(trials):
        return
    trials = growth_tuning_trials(lab, budget, best_rates(trials, bits))
    yield trials
    if not finished(trials) or frozen is None:
        return
    yield arm_trials(lab, frozen)
    yield ablation_trials(lab, frozen)


def cost(lab: Lab, histories: Sequence[History]) -> float:
    """FLOPs of all pieces that these histories need, each piece once."""
    nodes = closure(histories)
    total = 0.0
    for node in nodes:
        start = parent(node, nodes)
        total += lab.flops(node) - (lab.flops(start) if start else 0)
    return total


def check_corpus(lab: Lab, available: int, budget: float | None) -> None:
    """Checks that the corpus can feed every trial, before anything runs.

    Args:
      lab: the study.
      available: tokens that training may read.
      budget: C, if it is known; else only the gate is checked.

    Raises:
      UserError: it cannot; names the trial, the tokens and the largest budget that it can feed.
    """
    config = lab.config
    needs = [(f"{t.arm} at gate budget {t.flops:.3g}", t.history) for t in gate_trials(lab)]
    if budget:
        for name in config.controls:
            share = max(config.multiples) if name == config.target else 1.0
            needs.append((f"{name} at {share:g} C", lab.fixed(name, 0, 1.0, share * budget)))
        for arm in (*config.arms, *(c.of(config.arms[0]) for c in config.changes)):
            rates = (1.0,) * len(arm.chain)
            needs.append((f"arm {arm.name}", lab.grown(arm, 0, rates, budget)))
    for what, history in needs:
        tokens = lab.tokens(history)
        if tokens > available:
            raise UserError(
                f"{what} reads {tokens} tokens, and the corpus has {available} for training "
                f"(passes {config.corpus.passes}); lower the budget to "
                f"{available / tokens:.0%} of it, or add text (corpus.packages, corpus.path)"
            )
