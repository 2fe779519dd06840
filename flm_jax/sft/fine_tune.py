"""Fine-tuning as a stage: a model of a run, or one from elsewhere, trained on conversations.

The stage goes through the runner of `loop.py`. It is a growth that adds nothing, so that it has a
parent, a plan and a receipt as every other; Adam begins anew.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax import data, growth, mapping
from flm_jax.config import DataConfig, ExperimentConfig, GrowthConfig, ScheduleConfig, StageConfig
from flm_jax.data.tokenizer import Tokenizer, open_tokenizer
from flm_jax.errors import UserError
from flm_jax.inference.evaluation import score
from flm_jax.interop.opening import OpenedModel, open_model
from flm_jax.params import axes, sharding
from flm_jax.params.sharding import Layout
from flm_jax.runs import chain, loop
from flm_jax.runs.loop import Position
from flm_jax.runtime import host
from flm_jax.sft import chats, synthetic
from flm_jax.sft.chats import Sample
from flm_jax.sft.config import SftConfig
from flm_jax.sft.packing import ChatBatches, Counts, encode_all, in_order
from flm_jax.sft.template import Encoded
from flm_jax.store.checkpoint import params_digest
from flm_jax.store.lineage import RunFolder, identity
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import TrainState

# Of a config, what decides no number of the stage, or is in its identity in another form.
_NOT_IDENTITY = (
    "base", "base_stage", "paths", "made", "data", "optimizer", "eval", "checkpoint", "mesh",
    "score_samples", "max_new_tokens", "quick_compile",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Base:
    """The model to fine-tune, and its place in a lineage: none if it is from elsewhere."""

    model: OpenedModel
    data: DataConfig  # vocabulary, and text of which the knowledge is to be retained
    stages: list[dict[str, Any]]  # lineage.json up to the model's stage

    @property
    def steps(self) -> int:
        return sum(stage["steps"] for stage in self.stages)


def open_base(config: SftConfig) -> Base:
    """Raises UserError if there is no such model, or its vocabulary is not known."""
    folder, stages = RunFolder(config.base), []
    stage = config.base_stage
    if folder.lineage.exists():
        # When it was fine-tuned inside its own folder, the base is what came before.
        stages = [s for s in folder.stages() if s["name"] != config.name]
        if stages:
            entry = _stage_of(stages, config)
            stages, stage = stages[: entry["index"] + 1], entry["name"]
    elif not folder.path.exists():
        raise UserError(
            f"SftConfig.base is {config.base!r}, but nothing is there; train it first (runs/demo: "
            "make demo), or give another base"
        )
    model = open_model(config.base, stage)
    about = config.data or model.data
    if about is None:
        raise UserError(
            f"SftConfig.base is {config.base!r}, a model without a run: set data, its vocabulary "
            "and the text of which the knowledge is to be retained"
        )
    return Base(model, about, stages)


def _stage_of(stages: Sequence[dict[str, Any]], config: SftConfig) -> dict[str, Any]:
    wanted = config.base_stage
    found = [s for s in stages if not wanted or wanted in (str(s["index"]), s["name"])]
    if not found:
        names = ", ".join(s["name"] for s in stages)
        raise UserError(f"{config.base} has no finished stage {wanted!r}; it has {names}")
    return found[-1]


@dataclasses.dataclass(frozen=True)
class Conversations:
    """What is trained on and held out, as samples and as tokens."""

    train: list[Encoded]
    held_out: list[Encoded]
    held_out_samples: list[Sample]
    counts: dict[str, Counts]  # of both
    fingerprint: str
    start_id: int

    def batches(self, length: int, batch_size: int, seed: int, *sharing: int) -> ChatBatches:
        """The training stream; `sharing`: index and number of processes."""
        return ChatBatches(
            self.train, length, batch_size, seed, self.fingerprint, self.start_id, *sharing
        )


def conversations(
    config: SftConfig, samples: Sequence[Sample], tokenizer: Tokenizer, length: int
) -> Conversations:
    """Splits and encodes. Raises UserError if a side is empty."""
    for_training, held_out = chats.split(samples, config.held_out)
    if not for_training:
        raise UserError(
            f"{len(samples)} conversations are too few to hold {config.held_out:.0%} out; give more"
        )
    encoded = [
        encode_all(side, tokenizer, config.template, length, config.overlong)
        for side in (for_training, held_out)
    ]
    return Conversations(
        train=encoded[0][0],
        held_out=encoded[1][0],
        held_out_samples=held_out,
        counts={"train": encoded[0][1], "held_out": encoded[1][1]},
        fingerprint=chats.fingerprint(samples),
        start_id=tokenizer.start_id,
    )


def samples_of(config: SftConfig) -> list[Sample]:
    """The conversations of the config's files, and those made on the machine."""
    samples = chats.read(config.paths)
    if config.made:
        samples += synthetic.make(config.seed, config.made)
    return samples


class _ChatJob:
    """A stage that learns from conversations; measured by held-out responses and by text."""

    best_by = "response_loss"  # nats per learned token

    def __init__(
        self, config: SftConfig, base: Base, corpus: Any, talk: Conversations, layout: Layout
    ):
        model, length = base.model.config, sequence_length(config, base)
        steps = config.steps or steps_of(config, talk, length)
        self.stage = StageConfig(
            name=config.name,
            model=model,
            steps=steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            matrix_learning_rate=config.matrix_learning_rate,
            growth=GrowthConfig(recipe="none", moments="reset", ramp_steps=1, rewarmup_steps=0),
            sequence_length=length,
        )
        self.config = ExperimentConfig(
            stages=(self.stage,),
            data=base.data,
            optimizer=config.optimizer,
            schedule=ScheduleConfig(
                kind="wsd",
                warmup_steps=config.warmup_steps,
                total_steps=steps,
                decay_steps=max(steps - config.warmup_steps, 1),
                final_ratio=config.final_learning_rate / config.learning_rate,
            ),
            eval=config.eval,
            checkpoint=config.checkpoint,
            mesh=config.mesh,
            seed=config.seed,
        )
        self.sft, self.base, self.corpus, self.talk = config, base, corpus, talk
        self.layout = self.parent_layout = layout
        self.index, self.start = len(base.stages), base.steps
        self.parent = base.stages[-1]["name"] if base.stages else None
        self.small, self.sequence_length = model, length
        parts = f"{corpus.fingerprint} {talk.fingerprint}"
        self.fingerprint = hashlib.sha256(parts.encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        about = mapping.to_dict(self.sft)
        for name in _NOT_IDENTITY:
            del about[name]
        about |= {
            "base": self.base.model.name,
            "base_params_digest": params_digest(self.base.model.params),
        }
        return {**identity(self.config, 0, self.fingerprint), "sft": about}

    def optimizer(self) -> tuple[optax.GradientTransformation, schedules.Schedule]:
        shape = schedules.schedule_shape(self.config.schedule, self.stage.steps)
        # A new optimizer counts its own steps.
        tx = optim.optimizer(self.stage, self.config.optimizer, shape)
        return tx, lambda step: shape(step - self.start)

    def batches(self, batch_size: int, index: int = 0, count: int = 1) -> ChatBatches:
        return self.talk.batches(self.sequence_length, batch_size, self.sft.seed, index, count)

    def fresh(self) -> Position:
        tx, _ = self.optimizer()
        params = self.base.model.params
        state = TrainState(jnp.int32(self.start), params, tx.init(params))
        placed = sharding.shardings(state, axes.table(self.stage.model), *self.layout)
        # A copy: the runner consumes it.
        state = jax.device_put(state, placed, may_alias=False)
        return Position(state, self.batches(1).get_state(), 0.0)

    source = fresh

    @functools.cached_property
    def text(self) -> list[dict[str, np.ndarray]]:
        settings = self.config.eval
        return self.corpus.validation(settings.batch_size, settings.sequences)

    @functools.cached_property
    def responses(self) -> list[dict[str, np.ndarray]]:
        return in_order(
            self.talk.held_out, self.sequence_length, self.config.eval.batch_size,
            self.talk.start_id,
        )  # fmt: skip

    def evaluate(self, params: Any, plan: growth.Plan | None, mask: float | None) -> dict[str, Any]:
        about = (self.corpus.token_bytes, self.layout.mesh)
        return {
            "bpb": score(params, self.stage.model, self.text, *about).bits_per_byte,
            "response_loss": score(params, self.stage.model, self.responses, *about).loss,
        }


def sequence_length(config: SftConfig, base: Base) -> int:
    return config.sequence_length or base.data.sequence_length


def steps_of(config: SftConfig, talk: Conversations, length: int) -> int:
    """Steps in which every row is seen `epochs` times; the last batch is filled up."""
    rows = len(talk.batches(length, 1, config.seed).rows)
    return math.ceil(config.epochs * rows / config.batch_size)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A fine-tuned stage: its entry of lineage.json, and what it was made from."""

    stage: dict[str, Any]
    base: Base
    tokenizer: Tokenizer
    talk: Conversations


def run(
    config: SftConfig,
    workdir: str,
    samples: Sequence[Sample] | None = None,
    corpus: Any = None,
    compiled: pathlib.Path | None = None,
) -> Tuned:
    """Fine-tunes, or goes on with it.

    Args:
      config: what to do.
      workdir: a new run folder, which gets the base's stages and the new one; or the base's own.
      samples: in place of the config's conversations.
      corpus: of the base's data, if it is open already.
      compiled: see `RunFolder`.

    Raises:
      UserError: base, data, config or folder do not fit; nothing is overwritten.
      RunStopped: after SIGINT or SIGTERM, with a checkpoint written.
    """
    host.keep_freed()
    if config.quick_compile:
        host.compile_quickly()
    base = open_base(config)
    samples = samples_of(config) if samples is None else samples
    corpus = corpus or data.open_corpus(base.data)
    model = base.model.config
    if corpus.vocab_size > model.vocab_size:
        raise UserError(
            f"the base has vocab_size {model.vocab_size}, but vocabulary "
            f"{base.data.vocabulary!r} has {corpus.vocab_size} tokens; set data.vocabulary to the "
            "base's own"
        )
    tokenizer = open_tokenizer(base.data.vocabulary)
    talk = conversations(config, samples, tokenizer, sequence_length(config, base))
    layout = sharding.make_layout(config.mesh)
    job = _ChatJob(config, base, corpus, talk, layout)
    chain.check(job.config, [layout])
    folder = RunFolder(workdir, compiled)
    folder.open()
    if base.stages and not _same(folder.path, pathlib.Path(config.base)):
        RunFolder(config.base).branch(folder, stages=len(base.stages))
    if not finished(job, folder):
        loop.run_jobs([job], folder)
    return Tuned(folder.stages()[job.index], base, tokenizer, talk)


def _same(one: pathlib.Path, two: pathlib.Path) -> bool:
    return one.resolve() == two.resolve()


def finished(job: _ChatJob, folder: RunFolder) -> bool:
    """Whether the stage is done already. Raises UserError if the folder is of another lineage."""
    have = folder.stages()
    wanted = [*(s["name"] for s in job.base.stages), job.stage.name]
    digests = [s["params_digest"] for s in job.base.stages]
    names = [s["name"] for s in have]
    if (
        names[: len(wanted)] != wanted[: len(names)]
        or [s["params_digest"] for s in have[: len(digests)]] != digests
    ):
        raise UserError(
            f"{folder.lineage}: the run has stages {', '.join(names)}, and the fine-tuned one "
            f"would be {' -> '.join(wanted)}; give another --workdir"
        )
    if len(have) < len(wanted):
        return False
    folder.check_stage(folder.stage(job.index, job.stage.name), job.identity())
    return True
