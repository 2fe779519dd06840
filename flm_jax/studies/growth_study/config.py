"""The study's config: models, arms, budgets, corpus and schedule."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from flm_jax.checks import require, require_choice, require_positive
from flm_jax.config import GrowthConfig, OptimizerConfig, TransformerConfig
from flm_jax.errors import UserError
from flm_jax.mapping import Checked

PLACEMENTS = ("distance", "even")


@dataclasses.dataclass(frozen=True)
class CorpusConfig(Checked):
    """The text of the study: Python sources, each document once.

    Attributes:
      stdlib: whether the standard library belongs to it.
      packages: installed distributions whose Python files belong to it.
      path: a folder of UTF-8 text that belongs to it; "": none.
      vocabulary: "bytes", or the file of a tokenizer.
      validation_bytes: bytes of text that are held out.
      max_file_bytes: longer files are left out: they are tables written by programs.
      passes: how often training may read the text.
    """

    stdlib: bool = True
    packages: tuple[str, ...] = ()
    path: str = ""
    vocabulary: str = "bytes"
    validation_bytes: int = 300_000
    max_file_bytes: int = 200_000
    passes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "validation_bytes", "max_file_bytes", "passes")


@dataclasses.dataclass(frozen=True)
class NamedModel(Checked):
    """A model of the study. `control`: it is also trained to the end without growing."""

    name: str
    model: TransformerConfig
    control: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.name.replace("-", "").isalnum(),
            f"NamedModel.name is {self.name!r}; use letters, digits and -",
        )


@dataclasses.dataclass(frozen=True)
class ArmConfig(Checked):
    """A model that grows, once or more, and is trained to the budget.

    Attributes:
      name: the arm's name.
      chain: names of the models, the first one trained from scratch.
      shares: for each growth the share of the budget that is spent before it.
      growth: recipe and settings of every growth of the arm.
      candidate: whether tuning may choose it as the primary arm.
      tested: whether the test seeds run it, also if it is not the primary arm.
      placement: where copies of layers go if only some layers are copied: "distance" (beside those
        closest to the identity) or "even".
      shared_steps: whether added slots share the old slots' step count, in place of their own.
      b2: Adam's beta2 in the whole arm, its source included; 0: the study's.
    """

    name: str
    chain: tuple[str, ...]
    shares: tuple[float, ...]
    growth: GrowthConfig = dataclasses.field(default_factory=GrowthConfig)
    candidate: bool = False
    tested: bool = True
    placement: str = "distance"
    shared_steps: bool = False
    b2: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.chain) == len(self.shares) + 1 >= 2,
            f"arm {self.name}: chain has {len(self.chain)} models and shares {len(self.shares)} "
            "values; give one share for each growth",
        )
        require(
            all(a < b for a, b in itertools.pairwise((0.0, *self.shares))),
            f"arm {self.name}: shares are {self.shares}; give rising values above 0",
        )
        require_choice(self, "placement", PLACEMENTS)
        require(0 <= self.b2 < 1, f"arm {self.name}: b2 is {self.b2}; it must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class ChangeConfig(Checked):
    """An ablation: the primary arm with some settings changed. None keeps a setting.

    Attributes:
      name: the ablation's name.
      layers: operator of axis `layers`, added to the recipe.
      ramp_steps, rewarmup_steps, moments, old_rate: of the growth (`GrowthConfig`).
      shared_steps, b2, placement, chain: of the arm (`ArmConfig`).
    """

    name: str
    layers: str | None = None
    ramp_steps: int | None = None
    rewarmup_steps: int | None = None
    moments: str | None = None
    old_rate: float | None = None
    shared_steps: bool | None = None
    b2: float | None = None
    placement: str | None = None
    chain: tuple[str, ...] = ()

    def of(self, arm: ArmConfig) -> ArmConfig:
        """The arm with the changes."""

        def given(*names: str) -> dict[str, Any]:
            return {n: v for n in names if (v := getattr(self, n)) is not None}

        growth = dataclasses.replace(
            arm.growth, **given("ramp_steps", "rewarmup_steps", "moments", "old_rate")
        )
        if self.layers is not None:
            recipe = ",".join(
                part for part in growth.recipe.split(",") if part not in ("identity", "fresh")
            )
            growth = dataclasses.replace(growth, recipe=f"{recipe},layers={self.layers}")
        return dataclasses.replace(
            arm,
            name=self.name,
            growth=growth,
            candidate=False,
            chain=self.chain or arm.chain,
            **given("shared_steps", "b2", "placement"),
        )


@dataclasses.dataclass(frozen=True)
class GrowthStudyConfig(Checked):
    """Does growing a model pay, at equal FLOPs and against every fixed size?

    Attributes:
      name: names the results (docs/study/results/NAME.jsonl).
      models: all models; `target`, `source` and `between` are names of three of them.
      arms: the growths to test.
      changes: ablations of the primary arm.
      corpus: the text.
      budget: C, FLOPs of every arm; 0: `gate_ratio` times the crossover that the gate finds.
      gate_budgets: FLOPs at which source, between and target are decayed to find the crossover,
        rising.
      gate_ratio: C over the crossover.
      gate_margin: bits per byte by which the target must beat the source at C.
      gated: whether the study ends where it does not.
      multiples: of C, at which the target from scratch is decayed.
      decay_share: share of the FLOPs over which every learning rate falls to zero.
      tuning_share: of C, at which learning rates are tried.
      tuning_rates: factors on the learning rates that tuning tries.
      seeds: of every arm.
      change_seeds: of every ablation.
      sequence_length: tokens.
      batch_size: sequences in a step.
      steps_per_call: steps of one compiled program; all lengths are multiples of it.
      warmup_steps: in which the learning rate rises, from scratch.
      learning_rate, matrix_learning_rate: peaks, times the tuned factor.
      optimizer: Adam's settings.
      eval_batch: sequences in a validation batch.
      curve_points: validation measurements on a part of the validation set, in a piece of training.
      save_seconds: between checkpoints inside a piece of training.
      quick_compile: on CPUs, compile faster to slower programs; for tests.
    """

    name: str
    models: tuple[NamedModel, ...]
    arms: tuple[ArmConfig, ...]
    changes: tuple[ChangeConfig, ...] = ()
    corpus: CorpusConfig = CorpusConfig()
    target: str = "T"
    source: str = "S"
    between: str = "M"
    budget: float = 0.0
    gate_budgets: tuple[float, ...] = ()
    gate_ratio: float = 2.5
    gate_margin: float = 0.03
    gated: bool = True
    multiples: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    decay_share: float = 0.2
    tuning_share: float = 0.25
    tuning_rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    seeds: int = 5
    change_seeds: int = 3
    sequence_length: int = 256
    batch_size: int = 8
    steps_per_call: int = 10
    warmup_steps: int = 100
    learning_rate: float = 4e-3
    matrix_learning_rate: float = 4e-3
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    eval_batch: int = 16
    curve_points: int = 8
    save_seconds: float = 120.0
    quick_compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            self, "seeds", "gate_ratio", "sequence_length", "batch_size", "steps_per_call",
            "learning_rate", "matrix_learning_rate", "eval_batch", "curve_points", "save_seconds",
        )  # fmt: skip
        names = [m.name for m in self.models]
        labels = names + [a.name for a in self.arms] + [c.name for c in self.changes]
        require(
            len(set(labels)) == len(labels),
            f"GrowthStudyConfig has names {labels}; give models, arms and changes different names",
        )
        for field in ("target", "source", "between"):
            require_choice(self, field, tuple(names))
        chains = {a.name: a.chain for a in self.arms} | {c.name: c.chain for c in self.changes}
        for owner, chain in chains.items():
            for name in chain:
                require(
                    name in names,
                    f"arm {owner}: chain has {name!r}; the models are {', '.join(names)}",
                )
        for arm in self.arms:
            last = arm.shares[-1]
            require(
                last < 1 - self.decay_share,
                f"arm {arm.name}: its last growth is at share {last}, inside the decay that begins "
                f"at {1 - self.decay_share:g}; grow earlier",
            )
            self._check_multiple(f"arm {arm.name}: ramp_steps", arm.growth.ramp_steps)
        for change in self.changes:
            if change.ramp_steps is not None:
                self._check_multiple(f"change {change.name}: ramp_steps", change.ramp_steps)
        require(
            any(arm.candidate for arm in self.arms),
            "GrowthStudyConfig.arms has no candidate for the primary arm; set `candidate` of one",
        )
        require(
            1.0 in self.multiples and len(self.multiples) >= 3,
            f"GrowthStudyConfig.multiples is {self.multiples}; give 1 and at least two others, so "
            "that the target's curve can be interpolated",
        )
        require(
            self.budget > 0 or len(self.gate_budgets) >= 2,
            f"GrowthStudyConfig.budget is {self.budget} and gate_budgets {self.gate_budgets}; give "
            "a budget, or two or more gate budgets that find one",
        )
        require(
            list(self.gate_budgets) == sorted(set(self.gate_budgets)),
            f"GrowthStudyConfig.gate_budgets is {self.gate_budgets}; give rising values",
        )

    def _check_multiple(self, what: str, value: int) -> None:
        require(
            value % self.steps_per_call == 0,
            f"{what} is {value} and steps_per_call {self.steps_per_call}; make it a multiple",
        )

    def model(self, name: str) -> TransformerConfig:
        """The model of this name, before what follows from a growth."""
        return next(m.model for m in self.models if m.name == name)

    def arm(self, name: str) -> ArmConfig:
        """The arm of this name."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        known = ", ".join(a.name for a in self.arms)
        raise UserError(f"the study has no arm {name!r}; it has {known}")

    @property
    def controls(self) -> tuple[str, ...]:
        """Models that are trained to C without growing."""
        return tuple(m.name for m in self.models if m.control)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_size * self.sequence_length
