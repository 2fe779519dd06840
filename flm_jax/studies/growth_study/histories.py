"""What a trial trains: a history of legs. Trials share the prefixes of their histories.

A leg trains one model at a constant learning rate, or lowers it to zero. A history is a node of a
graph: its state is reached from any finished history that is a prefix of it (the same legs, or the
same with a shorter last leg). So a trunk is trained once, and decays and growths branch off.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

from flm_jax import growth, mapping
from flm_jax.config import GrowthConfig, TransformerConfig
from flm_jax.params import counts
from flm_jax.studies.growth_study.config import ArmConfig, GrowthStudyConfig


@dataclasses.dataclass(frozen=True)
class Leg:
    """A stretch of training.

    Attributes:
      model: the model's name.
      steps: optimizer steps.
      rate: factor on the learning rates.
      decay: whether the learning rate falls to zero over the leg; else it stays, after a rise.
      growth: how it grows out of the leg before; None: it does not.
      placement, shared_steps: see `ArmConfig`; of a leg that grows.
    """

    model: str
    steps: int
    rate: float
    decay: bool = False
    growth: GrowthConfig | None = None
    placement: str = "distance"
    shared_steps: bool = False


@dataclasses.dataclass(frozen=True)
class History:
    """Legs one after the other, and what is the same in all of them.

    Attributes:
      legs: one or more.
      seed: of the parameters, the data's order and new slots.
      b2: Adam's beta2.
    """

    legs: tuple[Leg, ...]
    seed: int
    b2: float

    @property
    def last(self) -> Leg:
        """The leg that ends it."""
        return self.legs[-1]

    @property
    def end(self) -> int:
        """Optimizer steps of all legs: the position in the data."""
        return sum(leg.steps for leg in self.legs)

    @property
    def leg_start(self) -> int:
        """The global step at which the last leg begins."""
        return self.end - self.last.steps

    @property
    def before(self) -> History | None:
        """The history without its last leg; None if that is all."""
        return dataclasses.replace(self, legs=self.legs[:-1]) if len(self.legs) > 1 else None

    @property
    def grown(self) -> History | None:
        """Up to the end of the leg that grew last: it holds the growth in force; None: none."""
        for count in range(len(self.legs), 0, -1):
            if self.legs[count - 1].growth:
                return dataclasses.replace(self, legs=self.legs[:count])
        return None

    def extends(self, other: History) -> bool:
        """Whether training the last leg from the other one's end reaches this one."""
        if (self.seed, self.b2) != (other.seed, other.b2) or len(other.legs) > len(self.legs):
            return False
        *head, tail = other.legs
        if tuple(head) != self.legs[: len(head)]:
            return False
        mine = self.legs[len(head)]
        if len(other.legs) < len(self.legs):
            return mine == tail and len(other.legs) == len(self.legs) - 1
        shorter = dataclasses.replace(mine, steps=tail.steps) == tail
        return shorter and mine.steps > tail.steps and not tail.decay

    def name(self) -> str:
        """A short text for people: models with their steps, the last one decayed ("v")."""
        parts = (f"{leg.model}{leg.steps}{'v' if leg.decay else ''}" for leg in self.legs)
        return f"{'>'.join(parts)} seed {self.seed} rate {self.last.rate:g}"


@dataclasses.dataclass(frozen=True)
class Lab:
    """The study's settings and its corpus: what turns a history into numbers and names.

    Attributes:
      config: the study.
      corpus: the corpus's digest.
    """

    config: GrowthStudyConfig
    corpus: str

    def model_of(self, history: History) -> TransformerConfig:
        """The last leg's model, with the fields that follow from growths (`growth.derived`)."""
        return _model_of(self.config, history.legs)

    def flops_per_step(self, name: str) -> int:
        """Training FLOPs of one step. Masks do not make a step cheaper."""
        model, length = self.config.model(name), self.config.sequence_length
        return self.config.tokens_per_step * counts.flops_per_token_train(model, length)

    def steps(self, name: str, flops: float) -> int:
        """Steps of a model that come closest to these FLOPs, in whole calls."""
        call = self.config.steps_per_call
        return max(call, call * round(flops / self.flops_per_step(name) / call))

    def flops(self, history: History) -> int:
        """Training FLOPs of all legs, and of the forward pass before each growth."""
        return sum(leg.steps * self.flops_per_step(leg.model) for leg in history.legs) + sum(
            leg.growth.calibration_sequences
            * self.config.sequence_length
            * counts.flops_per_token_forward(
                self.config.model(before.model), self.config.sequence_length
            )
            for before, leg in zip(history.legs, history.legs[1:], strict=False)
            if leg.growth
        )

    def tokens(self, history: History) -> int:
        """Tokens that the history reads."""
        return history.end * self.config.tokens_per_step

    @functools.cached_property
    def common(self) -> str:
        """Digest of all settings that every result depends on, besides its history."""
        fields = (
            "sequence_length", "batch_size", "steps_per_call", "warmup_steps", "learning_rate",
            "matrix_learning_rate", "optimizer", "quick_compile",
        )  # fmt: skip
        settings = mapping.to_dict(self.config)
        return mapping.digest({"corpus": self.corpus, **{f: settings[f] for f in fields}})

    def identity(self, history: History) -> str:
        """The history's name on disk: equal for histories that give the same state."""
        models = [mapping.to_dict(self.config.model(leg.model)) for leg in history.legs]
        described: dict[str, Any] = {
            "common": self.common,
            "history": mapping.to_dict(history),
            "models": models,
        }
        return mapping.digest(described)[:20]

    def fixed(self, name: str, seed: int, rate: float, budget: float, b2: float = 0.0) -> History:
        """A model that does not grow, trained for a budget in FLOPs, decay included."""
        share = self.config.decay_share
        trunk = Leg(name, self.steps(name, (1 - share) * budget), rate)
        decay = Leg(name, self.steps(name, share * budget), rate, decay=True)
        return History((trunk, decay), seed, b2 or self.config.optimizer.b2)

    def grown(self, arm: ArmConfig, seed: int, rates: tuple[float, ...], budget: float) -> History:
        """An arm's history for a budget in FLOPs.

        Args:
          arm: the arm.
          seed: the seed.
          rates: factor on the learning rates of each model of its chain.
          budget: FLOPs of all legs.
        """
        ends = [*arm.shares, 1 - self.config.decay_share]
        legs = []
        for index, name in enumerate(arm.chain):
            spent = ends[index - 1] if index else 0.0
            more: dict[str, Any] = {}
            if index:
                more = {
                    "growth": arm.growth,
                    "placement": arm.placement,
                    "shared_steps": arm.shared_steps,
                }
            steps = self.steps(name, (ends[index] - spent) * budget)
            legs.append(Leg(name, steps, rates[index], **more))
        decay = self.steps(arm.chain[-1], self.config.decay_share * budget)
        legs.append(Leg(arm.chain[-1], decay, rates[-1], decay=True))
        return History(tuple(legs), seed, arm.b2 or self.config.optimizer.b2)


@functools.lru_cache(maxsize=256)
def _model_of(config: GrowthStudyConfig, legs: tuple[Leg, ...]) -> TransformerConfig:
    leg = legs[-1]
    if len(legs) == 1:
        return config.model(leg.model)
    before = _model_of(config, legs[:-1])
    if leg.growth is None:
        return before
    target = dataclasses.replace(config.model(leg.model), rms_norm_eps=before.rms_norm_eps)
    return growth.derived(before, target, leg.growth.recipe)


def closure(histories: Iterable[History]) -> list[History]:
    """The histories and all that they branch off, each once, the shortest first."""
    found: dict[History, None] = {}
    for history in histories:
        node: History | None = history
        while node is not None and node not in found:
            found[node] = None
            node = node.before
    return sorted(found, key=lambda h: h.end)


def parent(history: History, nodes: Iterable[History]) -> History | None:
    """The longest of the nodes that the history extends; None: it starts from scratch."""
    shorter = [node for node in nodes if history.extends(node)]
    return max(shorter, key=lambda h: h.end, default=None)
