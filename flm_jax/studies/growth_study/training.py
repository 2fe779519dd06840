"""Trains one piece: from the longest finished prefix of a history to the history's end.

A piece resumes from its own checkpoints, bit by bit: state, data and learning rate are functions of
the step.

Letters in array names: K steps of a call, B sequences of a batch, T tokens of a sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax import growth
from flm_jax.config import StageConfig, TransformerConfig
from flm_jax.errors import RunStopped
from flm_jax.inference.evaluation import Score, score
from flm_jax.params import sharding
from flm_jax.params.digest import params_digest
from flm_jax.runtime.stop import StopRequest
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.store.files import write_atomically
from flm_jax.studies.growth_study import growing
from flm_jax.studies.growth_study.config import GrowthStudyConfig
from flm_jax.studies.growth_study.corpus import Corpus
from flm_jax.studies.growth_study.histories import History
from flm_jax.studies.growth_study.programs import Program, Training, changes_optimizer, compiled
from flm_jax.studies.growth_study.store import Pieces, Row
from flm_jax.train.train_step import TrainState, abstract_state, init_state

LOSSES = 40  # points of a piece's loss curve
PROGRAMS = 8  # compiled programs that a worker keeps
PROBE_PACKAGES, PROBE_BATCHES = 4, 2  # held-out text for the measurements inside a piece


def rate_at(config: GrowthStudyConfig, history: History, step: int) -> float:
    """The factor on the learning rates at a step of the history's last leg, counted from its start.

    A first leg warms up, a leg that grows re-warms up, and a decay falls linearly to zero.
    """
    leg = history.last
    if leg.decay:
        return leg.rate * (1 - (step + 0.5) / leg.steps)
    if leg.growth and step < leg.growth.rewarmup_steps:
        ratio = leg.growth.rewarmup_ratio
        return leg.rate * (ratio + (1 - ratio) * step / leg.growth.rewarmup_steps)
    if len(history.legs) == 1 and step < config.warmup_steps:
        return leg.rate * (step + 1) / config.warmup_steps
    return leg.rate


@dataclasses.dataclass
class Position:
    """A place in a piece: what a checkpoint holds, beside the state.

    Attributes:
      losses: [step, mean loss of a call] so far.
      evals: [step, bits per byte] on a part of the held-out text.
      seconds: spent so far.
      growth: what was measured of the growth at the piece's start; None: it does not grow.
    """

    losses: list[list[float]] = dataclasses.field(default_factory=list)
    evals: list[list[float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    growth: Row | None = None


class Trainer:
    """Trains pieces, one at a time, on one device."""

    def __init__(self, config: GrowthStudyConfig, corpus: Corpus, pieces: Pieces):
        self.config, self.corpus, self.pieces = config, corpus, pieces
        self.mesh = sharding.one_device()
        self._programs: dict[Training, Program] = {}

    @functools.cached_property
    def validation(self) -> dict[str, list[dict[str, np.ndarray]]]:
        """The held-out batches by package."""
        return self.corpus.validation(self.config.eval_batch)

    @functools.cached_property
    def probe(self) -> list[dict[str, np.ndarray]]:
        """A part of the held-out batches, of the packages that have most of them."""
        largest = sorted(self.validation.values(), key=len, reverse=True)[:PROBE_PACKAGES]
        return [batch for batches in largest for batch in batches[:PROBE_BATCHES]]

    def run(self, history: History, start: History | None, stop: StopRequest) -> Row:
        """Trains a piece and writes its result.

        Args:
          history: the piece's end.
          start: a finished history that it extends; None: from scratch.
          stop: tells whether a signal asked to stop.

        Returns:
          The result; its `bpb` is None if the loss diverged, here or before.

        Raises:
          UserError: the growth is impossible, or the corpus has no more text.
          RunStopped: after a signal; a checkpoint was written.
        """
        checkpoints = self._checkpoints(history)
        try:
            with jax.set_mesh(self.mesh):
                state, position = self._train(history, start, checkpoints, stop)
                row = self._measured(history, start, state, position)
        finally:
            checkpoints.close()
        self.pieces.write(history, row)
        return row

    def _checkpoints(self, history: History) -> Checkpoints:
        return Checkpoints(self.pieces.path(history) / "checkpoints", keep=1)

    def _train(
        self, history: History, start: History | None, checkpoints: Checkpoints, stop: StopRequest
    ) -> tuple[TrainState | None, Position]:
        """Trains to the history's end; the state is None if the loss diverged."""
        call, first = self.config.steps_per_call, start.end if start else 0
        every = max(call, call * round((history.end - first) / self.config.curve_points / call))
        began = saved = time.monotonic()
        state, position = self._begin(history, start, checkpoints)
        if state is None:
            return None, position
        began -= position.seconds
        step = int(state.step)
        while step < history.end:
            state, loss_K = self._call(history, state, step)
            step += call
            loss = float(jnp.mean(loss_K))
            if not math.isfinite(loss):
                return None, position
            position.losses.append([step, loss])
            if (step - first) % every == 0 and step < history.end:
                model = self.pieces.lab.model_of(history)
                position.evals.append([step, self._bits(state.params, model)])
            position.seconds = time.monotonic() - began
            due = time.monotonic() - saved > self.config.save_seconds
            if step == history.end or due or stop.requested:
                checkpoints.save(step, state, dataclasses.asdict(position))
                saved = time.monotonic()
            if stop.requested and step < history.end:
                checkpoints.wait()
                raise RunStopped(
                    f"stopped at step {step} of {history.end} in {history.name()}; the same "
                    "command continues from there",
                    stop.requested,
                )
        checkpoints.wait()
        return state, position

    def _call(self, history: History, state: TrainState, step: int) -> tuple[TrainState, jax.Array]:
        """Takes the steps of one call; returns the state and their losses [K]."""
        config, since, leg = self.config, step - history.leg_start, history.last
        count = config.steps_per_call
        batches = self.corpus.batches(history.seed, step, count, config.batch_size)
        numbers_K = range(since, since + count)
        rates_K = np.array([rate_at(config, history, n) for n in numbers_K], np.float32)
        masks_K = None
        if leg.growth and since < leg.growth.ramp_steps and self._plan(history).masked:
            masks_K = np.array([(n + 1) / leg.growth.ramp_steps for n in numbers_K], np.float32)
        program = self._program(history, masked=masks_K is not None)
        return program.call(state, batches, rates_K, masks_K)

    def _begin(
        self, history: History, start: History | None, checkpoints: Checkpoints
    ) -> tuple[TrainState | None, Position]:
        """The state at which the piece starts or resumes; None if it diverged before."""
        if checkpoints.latest is not None:
            state, kept = self._restored(history, checkpoints)
            return state, Position(**kept)
        if start is None:
            model, program = self.pieces.lab.model_of(history), self._program(history)
            key = jax.random.fold_in(jax.random.key(0), history.seed)
            return init_state(model, program.tx, key), Position()
        before = self.pieces.result(start)
        if before is None or before["params_digest"] is None:
            return None, Position()
        source = self._checkpoints(start)
        try:
            state, _ = self._restored(start, source)
        finally:
            source.close()
        if start == history.before and history.last.growth:
            return self._grow(history, start, state)
        return state, Position()

    def _restored(self, history: History, checkpoints: Checkpoints) -> tuple[TrainState, Row]:
        """The latest checkpoint of a history's piece."""
        model, program = self.pieces.lab.model_of(history), self._program(history)
        assert checkpoints.latest is not None
        like = abstract_state(model, program.tx, sharding.Layout(self.mesh))
        return checkpoints.restore(checkpoints.latest, like)

    def _grow(
        self, history: History, start: History, state: TrainState
    ) -> tuple[TrainState, Position]:
        """Grows a state and writes the plan."""
        lab, leg = self.pieces.lab, history.last
        small, big, batch = lab.model_of(start), lab.model_of(history), self._calibration(history)
        before = self._bits(state.params, small)
        key = jax.random.fold_in(jax.random.key(len(history.legs)), history.seed)
        state, plan, found = growing.grow(state, small, big, leg, batch, key)
        write_atomically(self._plan_path(history), plan.to_json())
        masks_at = plan.masks if plan.masked else None
        after = self._bits(state.params, big, masks_at)
        return state, Position(growth={**found, "bpb_before": before, "bpb_after": after})

    def _calibration(self, history: History) -> dict[str, jax.Array]:
        """The sequences that follow where the growth in force took place."""
        grown = history.grown
        assert grown is not None and grown.last.growth is not None
        rows, size = grown.last.growth.calibration_sequences, self.config.batch_size
        batch = self.corpus.batches(history.seed, grown.leg_start, -(-rows // size), size)
        return {k: jnp.asarray(v.reshape(-1, v.shape[-1])[:rows]) for k, v in batch.items()}

    def _plan_path(self, history: History) -> pathlib.Path:
        """Where the plan of the growth in force is: the same for every length of its leg."""
        grown = history.grown
        assert grown is not None
        legs = (*grown.legs[:-1], dataclasses.replace(grown.last, steps=0))
        name = self.pieces.lab.identity(dataclasses.replace(grown, legs=legs))
        return self.pieces.folder.path / "plans" / f"{name}.json"

    def _plan(self, history: History) -> growth.Plan:
        """The plan of the growth in force."""
        return _read_plan(self._plan_path(history))

    def _program(self, history: History, masked: bool = False) -> Program:
        """The program that trains a history's last leg, with its run-time masks or without."""
        config, grown = self.config, history.grown
        training = Training(
            StageConfig(
                name="piece",
                model=self.pieces.lab.model_of(history),
                steps=1,
                batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                matrix_learning_rate=config.matrix_learning_rate,
            ),
            dataclasses.replace(config.optimizer, b2=history.b2),
        )
        settings = grown.last.growth if grown else None
        if grown and settings and (masked or changes_optimizer(settings)):
            training = dataclasses.replace(
                training,
                stage=dataclasses.replace(training.stage, growth=settings),
                grown_at=grown.leg_start if changes_optimizer(settings) else None,
                plan=self._plan(history),
                masked=masked,
            )
        if training not in self._programs:
            if len(self._programs) >= PROGRAMS:
                self._programs.pop(next(iter(self._programs)))
            self._programs[training] = compiled(training, self.mesh)
        return self._programs[training]

    def _bits(self, params: Any, model: TransformerConfig, masks_at: Any = None) -> float:
        """Bits per byte on a part of the held-out text, with masks at 0 if there are any."""
        mask = None if masks_at is None else 0.0
        return self._score(params, model, self.probe, masks_at, mask).bits_per_byte

    def _score(self, params: Any, model: TransformerConfig, batches: Any, *masks: Any) -> Score:
        sizes = self.corpus.tokenizer.token_bytes
        return score(params, model, batches, sizes, self.mesh, *masks)

    def _measured(
        self, history: History, start: History | None, state: TrainState | None, position: Position
    ) -> Row:
        """The result of a piece; `state` is None if it diverged."""
        lab = self.pieces.lab
        row: Row = {
            "started_from": lab.identity(start) if start else None,
            "start": start.end if start else 0,
            "end": history.end,
            "flops": lab.flops(history),
            "tokens": lab.tokens(history),
            "seconds": round(position.seconds, 1),
            "losses": thinned(position.losses, LOSSES),
            "evals": [[step, round(bits, 4)] for step, bits in position.evals],
            "growth": position.growth,
        }
        if state is None:
            return {**row, "bpb": None, "packages": {}, "params_digest": None}
        model = lab.model_of(history)
        scores = {name: self._score(state.params, model, b) for name, b in self.validation.items()}
        nats, size = sum(s.nats for s in scores.values()), sum(s.bytes for s in scores.values())
        row |= {
            "bpb": nats / math.log(2) / size,
            "packages": {name: round(s.bits_per_byte, 4) for name, s in scores.items()},
            "params_digest": params_digest(state.params),
        }
        if history.grown:
            batch = self._calibration(history)
            row["stuck"] = growing.stuck(self._plan(history), state.params, batch, None)
        return row


def thinned(points: list[list[float]], most: int) -> list[list[float]]:
    """At most so many points: the last step and the mean value of equal groups.

    >>> thinned([[1, 2.0], [2, 4.0], [3, 5.0]], 2)
    [[2, 3.0], [3, 5.0]]
    """
    size = -(-len(points) // most) or 1
    groups = [points[n : n + size] for n in range(0, len(points), size)]
    return [[g[-1][0], round(sum(p[1] for p in g) / len(g), 4)] for g in groups]


@functools.lru_cache(maxsize=64)
def _read_plan(path: pathlib.Path) -> growth.Plan:
    return growth.Plan.from_json(path.read_text(encoding="utf-8"))
