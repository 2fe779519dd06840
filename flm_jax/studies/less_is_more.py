"""Is less more? Fine-tunings of one base that differ in number, choice and mix of conversations.

Every arm is a fine-tuning of its own in a run folder of its own; what has a row in arms.jsonl is
not run again. Arms of one seed share a pool; its sides, training and evaluation, are disjoint.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import pathlib
import random
from collections.abc import Callable, Sequence
from typing import Any

from flm_jax import data, mapping
from flm_jax.errors import UserError
from flm_jax.interop.opening import OpenedModel, open_model
from flm_jax.sft import chats, fine_tune, scoring, selection, synthetic
from flm_jax.sft.before_after import few_of_each
from flm_jax.sft.chat_model import ChatModel
from flm_jax.sft.chats import Sample
from flm_jax.sft.config import SftConfig
from flm_jax.store.files import MetricsFile

SELECTIONS = ("random", "chosen")
BUDGETS = ("steps", "epochs")


@dataclasses.dataclass(frozen=True)
class MixConfig:
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
class LessIsMoreConfig:
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
        if list(self.sizes) != sorted(set(self.sizes)) or not self.sizes:
            raise UserError(f"LessIsMoreConfig.sizes is {self.sizes}; give some, ascending")
        if not self.mixes or self.seeds < 1:
            raise UserError("LessIsMoreConfig: give at least one mix and one seed")
        if not self.sft.steps:
            raise UserError("LessIsMoreConfig.sft.steps is 0; give the steps of the largest arm")


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

    def at(self, seed: int) -> Arm:
        """The same arm of another seed."""
        return dataclasses.replace(self, seed=seed)


def arms_of(config: LessIsMoreConfig) -> list[Arm]:
    """Seed by seed, so that an unfinished grid has whole seeds; first the arm of `_Seed`."""
    large, first = config.sizes[-1], config.mixes[0].name
    crossed = [
        Arm(size, selection, first, budget, 0)
        for budget in BUDGETS
        for size in reversed(config.sizes)
        for selection in SELECTIONS
        if budget == "steps" or size < large
    ]
    mixed = [Arm(large, "chosen", mix.name, "steps", 0) for mix in config.mixes[1:]]
    return [arm.at(seed) for seed in range(config.seeds) for arm in [*crossed, *mixed]]


class _Seed:
    """What the arms of one seed share: the pile, and the choices from it.

    Quality is judged by the seed's first arm, which learned from conversations taken at random: a
    base that has never seen the template finds that no question helps. (arXiv 2308.12032 too lets
    the model see some of the data first.)
    """

    def __init__(self, config: LessIsMoreConfig, seed: int, first_arm: Callable[[], ChatModel]):
        self.seed, self.first_arm, self.selection = seed, first_arm, config.selection
        good, self.held_out = _sides(dataclasses.replace(config.sft, seed=seed))
        self.mixes = {mix.name: mix for mix in config.mixes}
        self.pile = synthetic.spoil(good, seed, config.defects)
        self.categories = sorted({s.category for s in good})

    def choose(self, arm: Arm) -> list[Sample]:
        shares = self.mixes[arm.mix].shares(self.categories)
        if arm.selection == "random":
            return self._at_random(shares, arm.size)
        about = dataclasses.replace(
            self.selection,
            size=arm.size,
            quotas=tuple(selection.Quota(c, share) for c, share in shares.items()),
            near=2.0,  # filtered already
            verify=False,
            worst_loss=0.0,
            seed=self.seed,
        )
        chosen = self._select(self.filtered, about)
        self._check(len(chosen), arm.size, shares)
        return chosen

    @functools.cached_property
    def filtered(self) -> list[Sample]:
        """What the filters leave of the pile: the costly part, the same for all arms."""
        about = dataclasses.replace(self.selection, size=len(self.pile), seed=self.seed)
        return self._select(self.pile, about)

    def _select(self, samples: Sequence[Sample], about: selection.SelectionConfig) -> list[Sample]:
        return selection.select(
            samples,
            about,
            evaluation=self.held_out,
            losses=functools.partial(self._kept, "losses"),
            unprompted=functools.partial(self._kept, "unprompted"),
        ).chosen

    def _kept(self, what: str, samples: Sequence[Sample]) -> list[scoring.ResponseLoss]:
        """The first arm's losses, computed once for the pile: all choices look at them."""
        known = self._known.setdefault(what, {})
        new = list(dict.fromkeys(s for s in samples if s not in known))
        known |= zip(new, getattr(self.model, what)(new), strict=True)
        return [known[s] for s in samples]

    @functools.cached_property
    def model(self) -> ChatModel:
        return self.first_arm()

    @functools.cached_property
    def _known(self) -> dict[str, dict[Sample, scoring.ResponseLoss]]:
        return {}

    def _at_random(self, shares: dict[str, float], size: int) -> list[Sample]:
        order = random.Random(f"{self.seed} random").sample(self.pile, len(self.pile))
        room = {category: round(size * share) for category, share in shares.items()}
        taken: collections.Counter[str] = collections.Counter()
        chosen = []
        for sample in order:
            if taken[sample.category] < room.get(sample.category, 0):
                taken[sample.category] += 1
                chosen.append(sample)
        self._check(len(chosen), sum(room.values()), shares)
        return chosen

    def _check(self, have: int, wanted: int, shares: dict[str, float]) -> None:
        if have < wanted:
            text = ", ".join(f"{c} {share:.0%}" for c, share in shares.items())
            raise UserError(
                f"the pool gives {have} conversations where {wanted} are wanted with shares "
                f"{text}; give more (sft.paths, sft.made), or smaller sizes"
            )


def _sides(config: SftConfig) -> tuple[list[Sample], list[Sample]]:
    """The pool, and what is held out of training for scores."""
    if not config.paths:
        held_out = synthetic.make(0, config.score_samples, split="evaluation")  # for every seed
        return fine_tune.samples_of(config), held_out
    good, held_out = chats.split(fine_tune.samples_of(config), config.held_out)
    return good, few_of_each(held_out, config.score_samples)


def run(config: LessIsMoreConfig, workdir: str) -> list[dict[str, Any]]:
    """Runs what is left of the grid; returns the arms' rows, the base's first.

    A row has the arm's fields, steps, chosen (a digest of the conversations), params_digest, bpb
    (of the base's data) and scores: category -> metric -> value.

    Raises:
      UserError: base, config or pool do not fit.
      RunStopped: a signal came; the same call goes on from there.
    """
    root = pathlib.Path(workdir)
    arms = root / "arms"
    base = fine_tune.open_base(config.sft)
    corpus = data.open_corpus(base.data)
    good, held_out = _sides(config.sft)
    for mix in config.mixes:
        mix.check({s.category for s in good})
    file = MetricsFile(root / "arms.jsonl")
    about = mapping.to_dict(config)  # what decides an arm's row
    del about["seeds"], about["known"], about["sft"]["checkpoint"], about["sft"]["mesh"]
    key = mapping.digest({"config": about, "corpus": corpus.fingerprint})

    def chat(model: OpenedModel) -> ChatModel:
        settings = config.sft
        return ChatModel(model, settings.template, settings.max_new_tokens, batch_size=64)

    def opened(path: pathlib.Path) -> OpenedModel:
        return open_model(str(path), config.sft.name)

    def scores(opened: OpenedModel) -> dict[str, dict[str, float]]:
        model = chat(opened)
        scored = scoring.score(held_out, model.losses, model.answer)
        return scoring.flat(scoring.summarise(scored))

    def row(name: str) -> dict[str, Any] | None:
        return next((r for r in file.rows("arm") if (r["key"], r["name"]) == (key, name)), None)

    def keep(name: str, step: int, **values: Any) -> dict[str, Any]:
        root.mkdir(parents=True, exist_ok=True)
        file.append("arm", step, key=key, name=name, **values)
        return file.rows("arm")[-1]

    found = [row("base") or keep("base", 0, scores=scores(base.model))]
    seed: _Seed | None = None
    for arm in arms_of(config):
        done = row(arm.name)
        if done is None:
            if seed is None or seed.seed != arm.seed:
                path = arms / arms_of(config)[0].at(arm.seed).name
                seed = _Seed(config, arm.seed, lambda path=path: chat(opened(path)))  # type: ignore[misc]
            samples = seed.choose(arm)
            share = arm.size / config.sizes[-1] if arm.budget == "epochs" else 1.0
            steps = max(round(config.sft.steps * share), 1)
            settings = dataclasses.replace(config.sft, steps=steps, seed=arm.seed)
            folder = str(arms / arm.name)
            stage = fine_tune.run(settings, folder, samples, corpus, root / "compiled").stage
            done = keep(
                arm.name, steps, **dataclasses.asdict(arm), steps=steps,
                chosen=chats.fingerprint(samples), params_digest=stage["params_digest"],
                bpb=stage["eval"], scores=scores(opened(arms / arm.name)),
            )  # fmt: skip
        found.append(done)
    return found
