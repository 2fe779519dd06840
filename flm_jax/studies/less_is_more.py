"""Is less more? Fine-tunes one base on conversations of different number, selection and mix.

Every arm is a fine-tuning in its own run folder, and resumes by itself. An arm with a row in
arms.jsonl is finished. Arms of one seed share a pool of conversations. The conversations to train
on and those to score are disjoint.
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
from flm_jax.checks import require, require_positive
from flm_jax.errors import UserError
from flm_jax.interop.opening import OpenedModel, open_model
from flm_jax.mapping import Checked
from flm_jax.runtime import paths
from flm_jax.sft import chats, fine_tune, scoring, selection, synthetic
from flm_jax.sft.before_after import few_of_each
from flm_jax.sft.chat_model import ChatModel
from flm_jax.sft.chats import BadRows, Sample
from flm_jax.sft.config import SftConfig
from flm_jax.sft.unwritten import writable
from flm_jax.store.trials import Trials

SELECTIONS = ("random", "chosen")
BUDGETS = ("steps", "epochs")


@dataclasses.dataclass(frozen=True)
class MixConfig(Checked):
    """The categories' shares of the conversations.

    Half of the conversations come from the categories `more`, the other half from the remaining
    categories, in equal shares. Without `more`, all categories have the same share.

    Attributes:
      name: the mix's name.
      more: categories that make up half of the conversations.
      without: categories that are left out.
    """

    name: str
    more: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def check(self, categories: set[str]) -> None:
        """Raises UserError if the mix names a category that is not in `categories`."""
        for category in (*self.more, *self.without):
            if category not in categories:
                raise UserError(
                    f"MixConfig {self.name!r} names category {category!r}, but the pool has "
                    f"{', '.join(map(repr, sorted(categories)))}; name one of these"
                )

    def shares(self, categories: Sequence[str]) -> dict[str, float]:
        """Returns category -> share of the conversations; the shares add up to 1.

        >>> MixConfig("m", more=("a",), without=("d",)).shares(["a", "b", "c", "d"])
        {'a': 0.5, 'b': 0.25, 'c': 0.25}
        """
        others = [c for c in categories if c not in (*self.more, *self.without)]
        half = 0.5 if self.more else 0.0
        favoured = dict.fromkeys(self.more, half / max(len(self.more), 1))
        return favoured | dict.fromkeys(others, (1 - half) / len(others))


@dataclasses.dataclass(frozen=True)
class LessIsMoreConfig(Checked):
    """A grid of fine-tunings.

    The first mix is crossed with all sizes, selections and budgets. The other mixes are tried only
    at the largest size, with chosen conversations. The selections are "random" (from the pool with
    its defects) and "chosen" (by `selection.py`).

    With the budget "steps", every arm trains for `sft.steps`. With "epochs", an arm's steps are in
    proportion to its number of conversations. The largest arms are therefore the same under both
    budgets, and run once.
    """

    sft: SftConfig  # its conversations are the pool
    sizes: tuple[int, ...]  # conversations, ascending
    mixes: tuple[MixConfig, ...]
    selection: selection.SelectionConfig  # of chosen conversations; the arms set size, quotas
    defects: float = 0.0  # spoiled copies of each kind, as a share of the pool: `synthetic.spoil`
    seeds: int = 3  # seeds of the synthetic conversations, defects, selection and order
    known: tuple[str, ...] = ("describe", "source", "code")  # categories like the base's text

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
            f"LessIsMoreConfig.sft.steps is {self.sft.steps}; give the steps of the largest arm",
        )


@dataclasses.dataclass(frozen=True)
class Arm:
    """One fine-tuning of the grid; see `LessIsMoreConfig` for the fields' values."""

    size: int
    selection: str
    mix: str
    budget: str
    seed: int

    @property
    def name(self) -> str:
        """The arm's folder, and the name of its row."""
        return f"{self.size}-{self.selection}-{self.mix}-{self.budget}-{self.seed}"


def arms_of(config: LessIsMoreConfig) -> list[Arm]:
    """Returns all arms, seed by seed, so that an unfinished grid has complete seeds.

    The first arm of a seed learns from random conversations, because its model is the pool's judge.
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


def sides(config: SftConfig, base: OpenedModel) -> tuple[list[Sample], list[Sample]]:
    """Returns the good conversations to train on, and those held out to score.

    Args:
      config: names the conversations.
      base: its template must be able to write them; the others are bad rows.
    """
    if not config.paths:
        held_out = synthetic.make(
            0, config.score_samples, split="evaluation"
        )  # the same for every seed
        return fine_tune.samples_of(config), held_out
    bad = BadRows(config.bad_rows)
    samples = fine_tune.samples_of(config, bad)
    samples = writable(samples, base.tokenizer, base.template, bad)
    good, held_out = chats.split(samples, config.held_out)
    return good, few_of_each(held_out, config.score_samples)


class Losses:
    """A model's response losses, computed once for each sample."""

    def __init__(self, compute: scoring.Losses):
        """Caches the losses that `compute` returns."""
        self._compute = compute
        self._known: dict[Sample, scoring.ResponseLoss] = {}

    def __call__(self, samples: Sequence[Sample]) -> list[scoring.ResponseLoss]:
        new = list(dict.fromkeys(s for s in samples if s not in self._known))
        self._known |= zip(new, self._compute(new), strict=True)
        return [self._known[s] for s in samples]


class Pool:
    """The conversations that the arms of one seed choose from. Every part is computed when needed.

    The model of the seed's first arm judges the quality; it learned from random conversations. The
    base cannot judge, because for a model that has never seen the template no question helps.
    (arXiv 2308.12032 also trains the model on some of the data first.)
    """

    def __init__(
        self,
        config: LessIsMoreConfig,
        seed: int,
        judge: Callable[[], ChatModel],
        base: OpenedModel,
        unsafe: bool,
    ):
        """Stores the arguments; nothing is computed yet.

        Args:
          config: the study.
          seed: index of the seed, from 0.
          judge: opens the model of the seed's first arm; called when that arm is finished.
          base: the model to fine-tune, with its template.
          unsafe: as for `scoring.check_all`.
        """
        self._config, self._seed, self._open_judge, self._base = config, seed, judge, base
        self._unsafe = unsafe

    def choose(self, arm: Arm) -> list[Sample]:
        """Returns the conversations of an arm; raises UserError if the pool has too few."""
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
                f"the pool gives {len(chosen)} conversations, but LessIsMoreConfig.sizes needs "
                f"{wanted} with shares {text}; add conversations (sft.paths, sft.made), or give "
                "smaller sizes"
            )
        return chosen

    def _at_random(self, shares: dict[str, float], size: int) -> list[Sample]:
        """Draws conversations at random from the pile, up to each category's number."""
        room = _rooms(shares, size)
        taken: collections.Counter[str] = collections.Counter()
        chosen = []
        for sample in random.Random(f"{self._seed} random").sample(self._pile, len(self._pile)):
            if taken[sample.category] < room.get(sample.category, 0):
                taken[sample.category] += 1
                chosen.append(sample)
        return chosen

    def _best(self, shares: dict[str, float], size: int) -> list[Sample]:
        """Chooses the best of the filtered conversations."""
        quotas = tuple(selection.Quota(c, share) for c, share in shares.items())
        # `_filtered` has run these filters.
        settings = dataclasses.replace(
            self._config.selection, size=size, quotas=quotas, near=2.0, verify=False, worst_loss=0.0
        )
        return self._select(self._filtered, settings)

    @functools.cached_property
    def _filtered(self) -> list[Sample]:
        """The pile after the filters: the expensive part, shared by all arms."""
        settings = dataclasses.replace(self._config.selection, size=len(self._pile))
        return self._select(self._pile, settings)

    def _select(
        self, samples: Sequence[Sample], settings: selection.SelectionConfig
    ) -> list[Sample]:
        """Selects by the judge's losses; held-out conversations must not leak into the result."""
        losses, unprompted = self._judged
        _, held_out = self._sides
        settings = dataclasses.replace(settings, seed=self._seed)
        return selection.select(
            samples, settings, held_out, losses, unprompted, unsafe=self._unsafe
        ).chosen

    @functools.cached_property
    def _judged(self) -> tuple[Losses, Losses]:
        """The judge's losses with and without the questions."""
        model = self._open_judge()
        return Losses(model.losses), Losses(model.unprompted)

    @functools.cached_property
    def _sides(self) -> tuple[list[Sample], list[Sample]]:
        """The seed's good conversations, and the held-out ones."""
        return sides(dataclasses.replace(self._config.sft, seed=self._seed), self._base)

    @functools.cached_property
    def _pile(self) -> list[Sample]:
        """The seed's pool: good conversations and spoiled copies."""
        good, _ = self._sides
        return synthetic.spoil(good, self._seed, self._config.defects)


def _rooms(shares: dict[str, float], size: int) -> dict[str, int]:
    """Returns the number of conversations of each category."""
    return {category: round(size * share) for category, share in shares.items()}


class Bench:
    """What all arms share: base, data, samples to score, folder and stored rows."""

    def __init__(self, config: LessIsMoreConfig, workdir: str, unsafe: bool):
        """Opens base and data; raises UserError if the base, the config or the pool do not fit."""
        self.config, self.root, self.unsafe = config, paths.of(workdir), unsafe
        self.base = fine_tune.open_base(config.sft)
        self.corpus = data.open_corpus(self.base.data)
        good, self.held_out = sides(config.sft, self.base.model)
        for mix in config.mixes:
            mix.check({s.category for s in good})
        self.trials = Trials(self.root / "arms.jsonl")
        # The key holds the settings that affect the numbers; rows of another key are not reused.
        settings = mapping.to_dict(config)
        del settings["seeds"], settings["known"]
        del settings["sft"]["checkpoint"], settings["sft"]["mesh"]
        self.key = mapping.digest({"config": settings, "corpus": self.corpus.fingerprint})

    def row(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns the stored row of this name; computes and stores it if there is none."""
        return self.trials.result({"key": self.key, "name": name}, compute)

    def folder(self, arm: Arm) -> pathlib.Path:
        """Returns the arm's run folder."""
        return self.root / "arms" / arm.name

    def model_of(self, arm: Arm) -> ChatModel:
        """Opens the model of a finished arm."""
        return self.chat_model(open_model(str(self.folder(arm)), self.config.sft.name))

    def chat_model(self, model: OpenedModel) -> ChatModel:
        """Wraps a model with the study's chat template."""
        settings = self.config.sft
        model = model.with_template(self.base.model.template)
        return ChatModel(model, settings.max_new_tokens, batch_size=64)

    def score(self, model: ChatModel) -> dict[str, Any]:
        """Scores a model on the held-out conversations."""
        scored = scoring.score(self.held_out, model.losses, model.answer, self.unsafe)
        return {"scores": scoring.flat(scoring.summarise(scored))}

    def score_base(self) -> dict[str, Any]:
        """Returns the fields of the base's row."""
        return self.score(self.chat_model(self.base.model))

    def train_and_score(self, arm: Arm, pool: Pool) -> dict[str, Any]:
        """Fine-tunes and scores an arm; returns the fields of its row."""
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


def run(config: LessIsMoreConfig, workdir: str, unsafe: bool = False) -> list[dict[str, Any]]:
    """Runs the unfinished part of the grid.

    Args:
      config: the study.
      workdir: its folder.
      unsafe: as for `scoring.check_all`.

    Returns:
      The rows: the base's, then the arms'. A row has name and scores (category -> metric -> value).
      An arm's row also has the arm's fields, steps, chosen (a digest of the conversations),
      params_digest and bpb (of the base's data).

    Raises:
      UserError: the base, the config or the pool do not fit.
      RunStopped: a signal stopped the run; the same call resumes it.
    """
    bench = Bench(config, workdir, unsafe)
    rows = [bench.row("base", bench.score_base)]
    for seed, seed_arms in itertools.groupby(arms_of(config), key=lambda arm: arm.seed):
        arms = list(seed_arms)
        judge = functools.partial(bench.model_of, arms[0])
        pool = Pool(config, seed, judge, bench.base.model, unsafe)
        for arm in arms:
            rows.append(bench.row(arm.name, functools.partial(bench.train_and_score, arm, pool)))
    return rows
