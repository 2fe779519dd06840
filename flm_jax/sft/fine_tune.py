"""Fine-tuning as a stage: trains the model of a run, or one without a run, on conversations.

`run` builds the same value as a chain does, a `Stage`, and gives it to the same loop
(`runs/loop.py`). In the run's folder the stage has a parent, a plan and a receipt, as every grown
stage has: its plan adds nothing and resets Adam.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax import data, mapping
from flm_jax.config import (
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    GrowthConfig,
    ScheduleConfig,
    StageConfig,
    TransformerConfig,
)
from flm_jax.data import chat_template, jinja_text
from flm_jax.errors import UserError
from flm_jax.inference.evaluation import Score, score
from flm_jax.interop.opening import OpenedModel, open_model, open_stored_model
from flm_jax.interop.stage_source import check_vocabulary, with_vocabulary
from flm_jax.params import sharding
from flm_jax.params.digest import params_digest
from flm_jax.params.sharding import Layout
from flm_jax.runs import announcement, chain
from flm_jax.runs.guarded import guarded
from flm_jax.runs.loop import run_stages
from flm_jax.runs.stage import Batches, Parent, Position, Stage
from flm_jax.runtime import display, host, paths, xla_flags
from flm_jax.sft import chats, synthetic
from flm_jax.sft.chats import BadRows, Sample
from flm_jax.sft.config import SftConfig
from flm_jax.sft.packing import ChatBatches, Counts, encode_all, in_order
from flm_jax.sft.template import Encoded
from flm_jax.sft.unwritten import writable
from flm_jax.store.lineage import RunFolder, identity, pick_stage
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import MasksAt, TrainState, state_shardings

if TYPE_CHECKING:
    from flm_jax.data.pipeline import Corpus

# Fields that do not affect the stage's results, or are in its identity in another form.
_NOT_IDENTITY = (
    "base", "base_stage", "paths", "fields", "bad_rows", "made", "template", "data", "optimizer",
    "eval", "checkpoint", "mesh", "score_samples", "max_new_tokens", "quick_compile",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Base:
    """The model to fine-tune, and its place in a lineage.

    Attributes:
      model: on one device, with the chat template of the fine-tuning.
      data: the vocabulary, and the text whose knowledge should be retained.
      stages: the entries of lineage.json up to the model's stage; empty for a model without a run.
    """

    model: OpenedModel
    data: DataConfig
    stages: list[dict[str, Any]]

    @property
    def steps(self) -> int:
        """Optimizer steps of the run up to the model's stage."""
        return sum(stage["steps"] for stage in self.stages)

    @property
    def params_digest(self) -> str:
        """The digest of its parameters: the recorded one, which may be of an earlier scheme."""
        if self.stages:
            return str(self.stages[-1]["params_digest"])
        return params_digest(self.model.params)


def open_base(config: SftConfig) -> Base:
    """Opens the config's base.

    Raises:
      UserError: it is missing, or its vocabulary is not known, or the config's data has another.
    """
    folder, stages = RunFolder(config.base), []
    stage = config.base_stage
    if folder.lineage.exists():
        # If the base's own folder already has the fine-tuned stage, the base is before it.
        stages = [s for s in folder.stages() if s["name"] != config.name]
        if stages:
            entry = pick_stage(stages, stage, folder.path)
            stages, stage = stages[: entry["index"] + 1], entry["name"]
    elif not folder.path.exists():
        raise UserError(
            f"SftConfig.base is {config.base!r}, which does not exist; train it first (for "
            "runs/demo: make demo), or give another base"
        )
    model = open_model(config.base, stage)
    settings = config.data or model.data
    if settings is None:
        raise UserError(
            f"SftConfig.base is {config.base!r}, a model without a run, and data is None; set "
            "SftConfig.data to its vocabulary and the text whose knowledge should be retained"
        )
    if config.data:
        stored = open_stored_model(config.base, stage)
        settings = with_vocabulary(settings, stored)
        check_vocabulary(settings, stored)
    template = chat_template.resolved(config.template, settings.vocabulary)
    if template.jinja:
        jinja_text.check(template.jinja)
    return Base(model.with_data(settings).with_template(template), settings, stages)


@dataclasses.dataclass(frozen=True)
class Conversations:
    """The conversations to train on and the held-out ones, as samples and as tokens.

    Attributes:
      train: encoded conversations to train on.
      held_out: encoded held-out conversations.
      held_out_samples: the held-out conversations that the template can write, as samples.
      counts: "train" and "held_out" -> what happened to the conversations.
      fingerprint: SHA-256 of all conversations.
      start_id: the input token at the start of a conversation that has none of its own.
      bad: the rows that were left out, because they could not be used.
    """

    train: list[Encoded]
    held_out: list[Encoded]
    held_out_samples: list[Sample]
    counts: dict[str, Counts]
    fingerprint: str
    start_id: int
    bad: BadRows

    def batches(
        self, length: int, batch_size: int, index: int = 0, count: int = 1, *, seed: int
    ) -> ChatBatches:
        """Opens the training stream of one process.

        Args:
          length: tokens in a row.
          batch_size: rows in a global batch.
          index: index of the process.
          count: number of processes.
          seed: of the order of the conversations.
        """
        return ChatBatches(
            self.train, length, batch_size, seed, self.fingerprint, self.start_id, index, count
        )


def conversations(
    config: SftConfig,
    samples: Sequence[Sample],
    model: OpenedModel,
    length: int,
    bad: BadRows | None = None,
) -> Conversations:
    """Splits and encodes conversations.

    Args:
      config: gives the held-out share, and what to do with long conversations.
      samples: the conversations.
      model: gives tokenizer and template.
      length: the longest conversation, in tokens.
      bad: counts the conversations that the template cannot write.

    Raises:
      UserError: nothing is left for training, or nothing is held out.
    """
    bad = bad or BadRows(config.bad_rows)
    for_training, held_out = chats.split(samples, config.held_out)
    if not for_training:
        raise UserError(
            f"{len(samples)} conversations are too few to hold out {config.held_out:.0%} of them; "
            "give more"
        )
    encoded = [
        encode_all(side, model.tokenizer, model.template, length, config.overlong, bad)
        for side in (for_training, held_out)
    ]
    return Conversations(
        train=encoded[0][0],
        held_out=encoded[1][0],
        # The others are counted above, and cannot be scored.
        held_out_samples=writable(
            held_out, model.tokenizer, model.template, BadRows(len(held_out))
        ),
        counts={"train": encoded[0][1], "held_out": encoded[1][1]},
        fingerprint=chats.fingerprint(samples),
        start_id=model.tokenizer.start_id,
        bad=bad,
    )


def samples_of(config: SftConfig, bad: BadRows | None = None) -> list[Sample]:
    """Reads the conversations of the config's files and adds the synthetic ones.

    Args:
      config: names files, their fields, and the number of synthetic conversations.
      bad: counts malformed rows.
    """
    samples = chats.read(config.paths, config.fields, bad or BadRows(config.bad_rows))
    if config.made:
        samples += synthetic.make(config.seed, config.made)
    return samples


def sequence_length(config: SftConfig, base: Base) -> int:
    """The stage's sequence length, in tokens."""
    return config.sequence_length or base.data.sequence_length


def steps_of(config: SftConfig, talk: Conversations, length: int) -> int:
    """Computes the number of steps in which every row is seen `epochs` times, rounded up."""
    rows = len(talk.batches(length, 1, seed=config.seed).rows)
    return math.ceil(config.epochs * rows / config.batch_size)


def experiment_of(config: SftConfig, base: Base, steps: int) -> ExperimentConfig:
    """Describes the stage as an experiment of its own.

    Its growth adds nothing and resets Adam.
    """
    stage = StageConfig(
        name=config.name,
        model=base.model.config,
        steps=steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        matrix_learning_rate=config.matrix_learning_rate,
        growth=GrowthConfig(recipe="none", moments="reset", ramp_steps=1, rewarmup_steps=0),
        sequence_length=sequence_length(config, base),
    )
    return ExperimentConfig(
        stages=(stage,),
        data=base.data,
        optimizer=config.optimizer,
        schedule=ScheduleConfig(
            kind="wsd",
            warmup_steps=config.warmup_steps,
            total_steps=steps,
            decay_steps=max(steps - config.warmup_steps, 0),
            final_ratio=config.final_learning_rate / config.learning_rate,
        ),
        eval=config.eval,
        checkpoint=config.checkpoint,
        mesh=config.mesh,
        seed=config.seed,
    )


def stage_of(
    config: SftConfig, base: Base, corpus: Corpus, talk: Conversations, layout: Layout
) -> Stage:
    """Builds the stage that trains on conversations.

    It is evaluated on held-out conversations and on the base's text.

    Args:
      config: the fine-tuning's config.
      base: the model to fine-tune.
      corpus: the base's data, opened.
      talk: the conversations.
      layout: the train state's mesh and sharding.
    """
    length, model = sequence_length(config, base), base.model.config
    experiment = experiment_of(config, base, config.steps or steps_of(config, talk, length))
    own, start = experiment.stages[0], base.steps
    shape = schedules.schedule_shape(experiment.schedule, own.steps)
    tx = optim.optimizer(own, experiment.optimizer, shape)  # it counts its own steps
    batches = functools.partial(talk.batches, length, seed=config.seed)
    parent = Parent(base.stages[-1]["name"], model, layout) if base.stages else None
    return Stage(
        config=own,
        experiment=experiment,
        index=len(base.stages),
        start=start,
        parent=parent,
        layout=layout,
        sequence_length=length,
        identity=_identity(config, base, experiment, f"{corpus.fingerprint} {talk.fingerprint}"),
        tx=tx,
        schedule=lambda step: shape(step - start),
        batches=batches,
        source=functools.partial(_start, base, tx, layout, batches),
        evaluate=Measures(model, layout, corpus, talk, length, config.eval),
        best_by="response_loss",
    )


def _identity(
    config: SftConfig, base: Base, experiment: ExperimentConfig, data_parts: str
) -> dict[str, Any]:
    """Settings that affect the stage's results; they are compared on resume."""
    settings = mapping.to_dict(config)
    for name in _NOT_IDENTITY:
        settings.pop(name, None)  # new fields are omitted while they have their defaults
    settings |= {
        "template": mapping.to_dict(base.model.template),
        "base": base.model.name,
        "base_params_digest": base.params_digest,
    }
    fingerprint = hashlib.sha256(data_parts.encode()).hexdigest()
    return {**identity(experiment, 0, fingerprint), "sft": settings}


def _start(
    base: Base,
    tx: optax.GradientTransformation,
    layout: Layout,
    batches: Callable[[int], Batches],
) -> Position:
    """Puts a copy of the base's parameters and a new optimizer state onto the layout."""
    # A copy on the host, because training consumes it: on several devices, a `device_put` with
    # `may_alias=False` does not copy the part that is already in its place.
    params = jax.tree.map(np.array, base.model.params)
    state = TrainState(jnp.int32(base.steps), params, tx.init(params))
    placed = state_shardings(base.model.config, state, layout)
    state = jax.device_put(state, placed)
    return Position(state, batches(1).get_state(), 0.0)


@dataclasses.dataclass(frozen=True)
class Measures:
    """Evaluates a fine-tuned model: bits per byte of text, nats per learned token of responses."""

    model: TransformerConfig
    layout: Layout
    corpus: Corpus
    talk: Conversations
    length: int
    settings: EvalConfig

    @functools.cached_property
    def text(self) -> list[dict[str, np.ndarray]]:
        return self.corpus.validation(self.settings.batch_size, self.settings.sequences)

    @functools.cached_property
    def responses(self) -> list[dict[str, np.ndarray]]:
        talk = self.talk
        return in_order(talk.held_out, self.length, self.settings.batch_size, talk.start_id)

    def __call__(
        self, params: Any, masks_at: MasksAt | None, mask_value: float | None
    ) -> dict[str, float]:
        def measure(batches: list[dict[str, np.ndarray]]) -> Score:
            return score(
                params, self.model, batches, self.corpus.token_bytes, self.layout.mesh, masks_at,
                mask_value,
            )  # fmt: skip

        return {
            "bpb": measure(self.text).bits_per_byte,
            "response_loss": measure(self.responses).loss,
        }


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A fine-tuned stage: its entry of lineage.json, its base and its conversations."""

    stage: dict[str, Any]
    base: Base
    talk: Conversations


def run(
    config: SftConfig,
    workdir: str,
    samples: Sequence[Sample] | None = None,
    corpus: Corpus | None = None,
    compiled: pathlib.Path | None = None,
) -> Tuned:
    """Fine-tunes a model, or resumes an unfinished fine-tuning.

    Args:
      config: the fine-tuning's config.
      workdir: a new run folder, which gets the base's stages and the new one; or the base's own.
      samples: conversations to use instead of the config's.
      corpus: the base's data, if it is open already.
      compiled: folder of compiled programs; see `RunFolder`.

    Returns:
      The finished stage.

    Raises:
      UserError: base, data, config or folder do not fit together; nothing is overwritten.
      RunStopped: SIGINT or SIGTERM stopped it; a checkpoint was written, and the same call resumes.
    """
    xla_flags.apply()
    host.keep_freed()
    if config.quick_compile:
        host.compile_quickly()
    base = open_base(config)
    bad = BadRows(config.bad_rows)
    samples = samples_of(config, bad) if samples is None else samples
    corpus = corpus or data.open_corpus(base.data)
    model = base.model.config
    if corpus.vocab_size > model.vocab_size:
        raise UserError(
            f"the base has vocab_size {model.vocab_size}, but vocabulary "
            f"{base.data.vocabulary!r} has {corpus.vocab_size} tokens; set "
            "SftConfig.data.vocabulary to the base's own"
        )
    talk = conversations(config, samples, base.model, sequence_length(config, base), bad)
    layout = sharding.make_layout(config.mesh)
    stage = stage_of(config, base, corpus, talk, layout)
    chain.check(stage.experiment, [layout])
    folder = RunFolder(workdir, compiled)
    with guarded(folder, stage.name, stage.experiment.watchdog):
        if base.stages and not paths.same(folder.path, paths.of(config.base)):
            RunFolder(config.base).branch(folder, stages=len(base.stages))
        if not _finished(stage, base, folder):
            display.note(announcement.devices(stage.experiment, [layout]))
            run_stages([stage], folder)
    return Tuned(folder.stages()[stage.index], base, talk)


def _finished(stage: Stage, base: Base, folder: RunFolder) -> bool:
    """Whether the stage is finished. Raises UserError if another lineage or stage is there."""
    have = folder.stages()
    wanted = [*(s["name"] for s in base.stages), stage.name]
    digests = [s["params_digest"] for s in base.stages]
    names = [s["name"] for s in have]
    if (
        names[: len(wanted)] != wanted[: len(names)]
        or [s["params_digest"] for s in have[: len(digests)]] != digests
    ):
        raise UserError(
            f"{folder.lineage}: the run has stages {', '.join(names)}, but this fine-tuning needs "
            f"{' -> '.join(wanted)}; give another workdir",
            argument="workdir",
        )
    folder.check_stage(stage.folder(folder), stage.identity)
    return len(have) >= len(wanted)
