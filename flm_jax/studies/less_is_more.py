"""Is less more? Fine-tunings of one base that differ in number, choice and mix of conversations.

Every arm is a fine-tuning in its own run folder, and resumes by itself. An arm with a row in
arms.jsonl is finished. Arms of one seed share a pool of conversations; what is trained on and what
is scored are disjoint.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import pathlib
import random
from collections.abc import Callable, Sequence
from typing import Any

from flm_jax import data, mapping
from flm_jax.config import require, require_positive
from flm_jax.errors import UserError
from flm_jax.interop.opening import OpenedModel, open_model
from flm_jax.mapping import Checked
from flm_jax.sft import chats, fine_tune, scoring, selection, synthetic
from flm_jax.sft.before_after import few_of_each
from flm_jax.sft.chat_model import ChatModel
from flm_jax.sft.chats import Sample
from flm_jax.sft.config import SftConfig
from flm_jax.store.trials import Trials

SELECTIONS = ("random", "chosen")
BUDGETS = ("steps", "epochs")


@dataclasses.dataclass(frozen=True)
class MixConfig(Checked):
    """Shares of the categories: half of the conversations are of `more`, the others share the rest.

    Without `more` all share evenly.
    """

    name: str
    more: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def check(self, categories: set[str]) -> None:
        """Raises UserError if it names another category."""
        for category in (*self.more, *self.without):
            if category not in categories:
                raise UserError(
                    f"mix {self.name} names category {category!r}; the pool has "
                    f"{', '.join(map(repr, sorted(categories)))}"
                )

    def shares(self, categories: Sequence[str]) -> dict[str, float]:
        """Category -> share of the conversations; adds up to 1."""
        others = [c for c in categories if c not in (*self.more, *self.without)]
        half = 0.5 if self.more else 0.0
        few = dict.fromkeys(self.more, half / max(len(self.more), 1))
        return few | dict.fromkeys(others, (1 - half) / len(others))


@dataclasses.dataclass(frozen=True)
class LessIsMoreConfig(Checked):
    """A grid of fine-tunings.

    The first mix is crossed with sizes, selections and budgets; the others are tried at the largest
    size, chosen. `sft.steps` is the budget of equal steps; with equal epochs an arm's steps are in
    proportion to its number of conversations, so that the largest arms are the same under both
    budgets, and are run once.

    Selections: "random" from the pool with its defects; "chosen" by `selection.py`.
    """

    sft: SftConfig  # its conversations are the pool
    sizes: tuple[int, ...]  # conversations, ascending
    mixes: tuple[MixConfig, ...]
    selection: selection.SelectionConfig  # of the chosen; size and quotas are the arms'
    defects: float = 0.0  # of each kind of spoiled copy, over the pool's number: `synthetic.spoil`
    seeds: int = 3  # of what is made and spoiled, of choice and order
    known: tuple[str, ...] = ("describe", "source", "code")  # categories like the base's own text

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.sizes) and list(self.sizes) == sorted(set(self.sizes)),
            f"LessIsMoreConfig.sizes is {self.sizes}; give one or more, each larger than the one "
            "before",
        )
        require(bool(self.mixes), "LessIsMoreConfig.mixes is empty; give one or more")
        require_positive(self, "seeds")
        require(
            self.sft.steps > 0,
            "LessIsMoreConfig.sft.steps is 0; give the steps of the largest arm",
        )


@dataclasses.dataclass(frozen=True)
class Arm:
    size: int
    selection: str
    mix: str
    budget: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.size}-{self.selection}-{self.mix}-{self.budget}-{self.seed}"


def arms_of(config: LessIsMoreConfig) -> list[Arm]:
    """All arms, seed by seed, so that an unfinished grid has whole seeds.

    The first arm of a seed learns from conversations taken at random: see `Pool`.
    """
    large, first = config.sizes[-1], config.mixes[0].name
    crossed = [
        Arm(size, selection, first, budget, 0)
        for budget in BUDGETS
        for size in reversed(config.sizes)
        for selection in SELECTIONS
        if budget == "steps" or size < large
    ]
    mixed = [Arm(large, "chosen", mix.name, "steps", 0) for mix in config.mixes[1:]]
    return [
        dataclasses.replace(arm, seed=seed)
        for seed in range(config.seeds)
        for arm in [*crossed, *mixed]
    ]


def sides(config: SftConfig) -> tuple[list[Sample], list[Sample]]:
    """The good conversations to train on, and those held out for scores."""
    if not config.paths:
        held_out = synthetic.make(0, config.score_samples, split="evaluation")  # for every seed
        return fine_tune.samples_of(config), held_out
    good, held_out = chats.split(fine_tune.samples_of(config), config.held_out)
    return good, few_of_each(held_out, config.score_samples)


class Losses:
    """A model's response losses; each sample's is computed once."""

    def __init__(self, compute: scoring.Losses):
        self._compute = compute
        self._known: dict[Sample, scoring.ResponseLoss] = {}

    def __call__(self, samples: Sequence[Sample]) -> list[scoring.ResponseLoss]:
        new = list(dict.fromkeys(s for s in samples if s not in self._known))
        self._known |= zip(new, self._compute(new), strict=True)
        return [self._known[s] for s in samples]


class Pool:
    """The conversations that the arms of one seed choose from. All parts are computed when needed.

    Quality is judged by the model of the seed's first arm, which learned from conversations taken
    at random: a base that has never seen the template finds that no question helps. (arXiv
    2308.12032 also lets the model see some of the data first.)
    """

    def __init__(self, config: LessIsMoreConfig, seed: int, judge: Callable[[], ChatModel]):
        """Args: `judge` opens the model of the seed's first arm, once that arm is finished."""
        self._config, self._seed, self._open_judge = config, seed, judge

    def choose(self, arm: Arm) -> list[Sample]:
        """The conversations of an arm. Raises UserError if the pool has too few."""
        (mix,) = (mix for mix in self._config.mixes if mix.name == arm.mix)
        shares = mix.shares(sorted({s.category for s in self._pile}))
        if arm.selection == "random":
            chosen = self._at_random(shares, arm.size)
            wanted = sum(_rooms(shares, arm.size).values())
        else:
            chosen = self._best(shares, arm.size)
            wanted = arm.size
        if len(chosen) < wanted:
            text = ", ".join(f"{c} {share:.0%}" for c, share in shares.items())
            raise UserError(
                f"the pool gives {len(chosen)} conversations where {wanted} are wanted with shares "
                f"{text}; give more (sft.paths, sft.made), or smaller sizes"
            )
        return chosen

    def _at_random(self, shares: dict[str, float], size: int) -> list[Sample]:
        room = _rooms(shares, size)
        taken: collections.Counter[str] = collections.Counter()
        chosen = []
        for sample in random.Random(f"{self._seed} random").sample(self._pile, len(self._pile)):
            if taken[sample.category] < room.get(sample.category, 0):
                taken[sample.category] += 1
                chosen.append(sample)
        return chosen

    def _best(self, shares: dict[str, float], size: int) -> list[Sample]:
        quotas = tuple(selection.Quota(c, share) for c, share in shares.items())
        # The filters ran already.
        settings = dataclasses.replace(
            self._config.selection, size=size, quotas=quotas, near=2.0, verify=False, worst_loss=0.0
        )
        return self._select(self._filtered, settings)

    @functools.cached_property
    def _filtered(self) -> list[Sample]:
        """The pile after the filters: the costly part, shared by all arms."""
        settings = dataclasses.replace(self._config.selection, size=len(self._pile))
        return self._select(self._pile, settings)

    def _select(
        self, samples: Sequence[Sample], settings: selection.SelectionConfig
    ) -> list[Sample]:
        losses, unprompted = self._judged
        _, held_out = self._sides
        settings = dataclasses.replace(settings, seed=self._seed)
        return selection.select(samples, settings, held_out, losses, unprompted).chosen

    @functools.cached_property
    def _judged(self) -> tuple[Losses, Losses]:
        """The judge's losses with and without the questions."""
        model = self._open_judge()
        return Losses(model.losses), Losses(model.unprompted)

    @functools.cached_property
    def _sides(self) -> tuple[list[Sample], list[Sample]]:
        return sides(dataclasses.replace(self._config.sft, seed=self._seed))

    @functools.cached_property
    def _pile(self) -> list[Sample]:
        good, _ = self._sides
        return synthetic.spoil(good, self._seed, self._config.defects)


def _rooms(shares: dict[str, float], size: int) -> dict[str, int]:
    """Conversations of each category."""
    return {category: round(size * share) for category, share in shares.items()}


class Bench:
    """Everything that all arms share: base, data, samples to score, folder, results."""

    def __init__(self, config: LessIsMoreConfig, workdir: str):
        """Raises UserError if base, config or pool do not fit."""
        self.config, self.root = config, pathlib.Path(workdir)
        self.base = fine_tune.open_base(config.sft)
        self.corpus = data.open_corpus(self.base.data)
        good, self.held_out = sides(config.sft)
        for mix in config.mixes:
            mix.check({s.category for s in good})
        self.trials = Trials(self.root / "arms.jsonl")
        decides = mapping.to_dict(config)
        del decides["seeds"], decides["known"]
        del decides["sft"]["checkpoint"], decides["sft"]["mesh"]
        self.key = mapping.digest({"config": decides, "corpus": self.corpus.fingerprint})

    def row(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stored row of this name; computed if there is none."""
        return self.trials.result({"key": self.key, "name": name}, compute)

    def folder(self, arm: Arm) -> pathlib.Path:
        return self.root / "arms" / arm.name

    def model_of(self, arm: Arm) -> ChatModel:
        """The model of a finished arm."""
        return self.chat_model(open_model(str(self.folder(arm)), self.config.sft.name))

    def chat_model(self, model: OpenedModel) -> ChatModel:
        settings = self.config.sft
        return ChatModel(model, settings.template, settings.max_new_tokens, batch_size=64)

    def score(self, model: ChatModel) -> dict[str, Any]:
        scored = scoring.score(self.held_out, model.losses, model.answer)
        return {"scores": scoring.flat(scoring.summarise(scored))}

    def score_base(self) -> dict[str, Any]:
        return self.score(self.chat_model(self.base.model))

    def train_and_score(self, arm: Arm, pool: Pool) -> dict[str, Any]:
        """The fields of an arm's row."""
        sft, samples = self.config.sft, pool.choose(arm)
        share = arm.size / self.config.sizes[-1] if arm.budget == "epochs" else 1.0
        steps = max(round(sft.steps * share), 1)
        settings = dataclasses.replace(sft, steps=steps, seed=arm.seed)
        compiled = self.root / "compiled"
        stage = fine_tune.run(settings, str(self.folder(arm)), samples, self.corpus, compiled).stage
        return {
            **dataclasses.asdict(arm), "steps": steps, "chosen": chats.fingerprint(samples),
            "params_digest": stage["params_digest"], "bpb": stage["eval"],
            **self.score(self.model_of(arm)),
        }  # fmt: skip


def run(config: LessIsMoreConfig, workdir: str) -> list[dict[str, Any]]:
    """Runs what is left of the grid.

    Returns:
      The rows: the base's, then the arms'. A row has name and scores (category -> metric -> value);
      an arm's also the arm's fields, steps, chosen (a digest of the conversations), params_digest
      and bpb (of the base's data).

    Raises:
      UserError: base, config or pool do not fit.
      RunStopped: a signal came; the same call resumes.
    """
    bench = Bench(config, workdir)
    rows = [bench.row("base", bench.score_base)]
    for seed, of_seed in itertools.groupby(arms_of(config), key=lambda arm: arm.seed):
        arms = list(of_seed)
        pool = Pool(config, seed, functools.partial(bench.model_of, arms[0]))
        for arm in arms:
            rows.append(bench.row(arm.name, functools.partial(bench.train_and_score, arm, pool)))
    return rows
