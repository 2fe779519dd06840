"""Trains one piece: from the longest finished prefix of a history to the history's end.

A piece resumes from its own checkpoints, bit by bit: state, data and learning rate are functions of
the step. The learning rate is an argument of the compiled program, which therefore serves trunks,
decays and all rates of a model.

Letters in array names: K steps of a call, B sequences of a batch, T tokens of a sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax import growth
from flm_jax.config import GrowthConfig, StageConfig, TransformerConfig
from flm_jax.errors import RunStopped
from flm_jax.growth import layer_maps, measure
from flm_jax.growth.receipt import dead_slots, locked_copies
from flm_jax.inference.evaluation import score
from flm_jax.params import sharding
from flm_jax.runtime.stop import StopRequest
from flm_jax.store.checkpoint import Checkpoints, params_digest
from flm_jax.store.files import write_atomically
from flm_jax.studies.growth_study.config import GrowthStudyConfig
from flm_jax.studies.growth_study.corpus import Corpus
from flm_jax.studies.growth_study.histories import History, Leg
from flm_jax.studies.growth_study.store import Pieces, Row
from flm_jax.train import optim
from flm_jax.train.optim import SlotAdamState
from flm_jax.train.train_step import (
    TrainState,
    abstract_state,
    gradients,
    init_state,
    make_train_step,
)

LOSSES = 40  # points of a piece's loss curve
PROGRAMS = 8  # compiled programs that a worker keeps
PROBE_BATCHES = 4  # validation batches of a package, for the measurements inside a piece


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


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled training of a model: `call(state, batches, rates, masks=None)`."""

    stage: StageConfig
    tx: optax.GradientTransformation
    call: Callable[..., tuple[TrainState, jax.Array]]


class Trainer:
    """Trains pieces, one at a time, on one device."""

    def __init__(self, config: GrowthStudyConfig, corpus: Corpus, pieces: Pieces):
        self.config, self.corpus, self.pieces = config, corpus, pieces
        self.mesh = sharding.one_device()
        self.layout = sharding.Layout(self.mesh)
        self._programs: dict[Any, Program] = {}

    @functools.cached_property
    def validation(self) -> dict[str, list[dict[str, np.ndarray]]]:
        """The held-out batches by package."""
        return self.corpus.validation(self.config.eval_batch)

    @functools.cached_property
    def probe(self) -> list[dict[str, np.ndarray]]:
        """A part of the held-out batches, for measurements inside a piece."""
        return [b for batches in self.validation.values() for b in batches[:PROBE_BATCHES]][:8]

    def run(self, history: History, start: History | None, stop: StopRequest) -> Row:
        """Trains a piece and writes its result.

        Args:
          history: the piece's end.
          start: a finished history that it extends; None: from scratch.
          stop: tells whether a signal asked to stop.

        Returns:
          The result.

        Raises:
          UserError: the growth is impossible, or the corpus has no more text.
          RunStopped: after a signal; a checkpoint was written.
        """
        folder = self.pieces.path(history)
        checkpoints = Checkpoints(folder / "checkpoints", keep=1)
        try:
            with jax.set_mesh(self.mesh):
                return self._run(history, start, checkpoints, stop)
        finally:
            checkpoints.close()

    def _run(
        self,
        history: History,
        start: History | None,
        checkpoints: Checkpoints,
        stop: StopRequest,
    ) -> Row:
        config, first = self.config, start.end if start else 0
        began = time.monotonic()
        program: Program | None = None
        if checkpoints.latest is not None:
            program = self._program(history)
            like = abstract_state(program.stage.model, program.tx, self.layout)
            state, progress = checkpoints.restore(checkpoints.latest, like)
        else:
            begun = self._begin(history, start)
            if begun is None:
                return self._finish(history, start, None, [], [], {"growth": None}, 0.0)
            state, progress = begun
        program = program or self._program(history)
        step, losses = int(state.step), list(progress["losses"])
        evals, seconds = list(progress["evals"]), progress["seconds"]
        every = self._eval_every(history.end - first)
        saved = time.monotonic()
        while step < history.end:
            count = config.steps_per_call
            state, loss_K = self._call(program, history, state, step, count)
            loss = float(jnp.mean(loss_K))
            step += count
            if not math.isfinite(loss):
                return self._finish(history, start, None, losses, evals, progress, seconds)
            losses.append([step, loss])
            if (step - first) % every == 0 and step < history.end:
                evals.append([step, self._bits(state.params, program.stage.model, self.probe)])
            due = time.monotonic() - saved > config.save_seconds
            if step < history.end and (due or stop.requested):
                now = seconds + time.monotonic() - began
                kept = {**progress, "losses": losses, "evals": evals, "seconds": now}
                checkpoints.save(step, state, kept)
                saved = time.monotonic()
                if stop.requested:
                    checkpoints.wait()
                    raise RunStopped(
                        f"stopped at step {step} of {history.end} in {history.name()}; the same "
                        "command continues from there"
                    )
        seconds += time.monotonic() - began
        if checkpoints.latest != history.end:
            kept = {**progress, "losses": losses, "evals": evals, "seconds": seconds}
            checkpoints.save(history.end, state, kept)
            checkpoints.wait()
        return self._finish(history, start, state, losses, evals, progress, seconds)

    def _eval_every(self, steps: int) -> int:
        """Steps between two measurements inside a piece: whole calls."""
        call = self.config.steps_per_call
        return max(call, call * round(steps / self.config.curve_points / call))

    def _call(
        self, program: Program, history: History, state: TrainState, step: int, count: int
    ) -> tuple[TrainState, jax.Array]:
        """Takes `count` steps; returns the state and their losses [K]."""
        config, since = self.config, step - history.leg_start
        batches = self.corpus.batches(history.seed, step, count, config.batch_size)
        rates_K = np.array(
            [rate_at(config, history, since + n) for n in range(count)], np.float32
        )
        leg = history.last
        if leg.growth and since < leg.growth.ramp_steps and self._plan(history).masked:
            masks_K = np.arange(since + 1, since + count + 1, dtype=np.float32)
            masks_K /= np.float32(leg.growth.ramp_steps)
            return self._program(history, masked=True).call(state, batches, rates_K, masks_K)
        return program.call(state, batches, rates_K, None)

    def _begin(self, history: History, start: History | None) -> tuple[TrainState, Row] | None:
        """The state at the start of a piece, and what is known of it; None if it diverged before."""
        progress: Row = {"losses": [], "evals": [], "seconds": 0.0, "growth": None}
        if start is None:
            program = self._program(history)
            key = jax.random.fold_in(jax.random.key(0), history.seed)
            return init_state(program.stage.model, program.tx, key), progress
        before = self.pieces.result(start)
        if before is None or before["params_digest"] is None:
            return None
        program = self._program(start)
        checkpoints = Checkpoints(self.pieces.path(start) / "checkpoints", keep=1)
        try:
            like = abstract_state(program.stage.model, program.tx, self.layout)
            state, _ = checkpoints.restore(start.end, like)
        finally:
            checkpoints.close()
        if start.legs == history.legs[:-1] and history.last.growth:
            state, progress["growth"] = self._grow(history, start, state)
        return state, progress

    def _grow(
        self, history: History, start: History, state: TrainState
    ) -> tuple[TrainState, Row]:
        """Grows a state; writes the plan, and returns what was measured."""
        lab, leg = self.pieces.lab, history.last
        assert leg.growth is not None
        small, big = lab.model_of(start), lab.model_of(history)
        batch = self._calibration(history.seed, start.end, leg.growth.calibration_sequences)
        old = measure.source(state.params, batch, small)
        distances = [float(d) for d in np.asarray(old["distances"])]
        plan = growth.plan(
            small, big, leg.growth.recipe, moments=leg.growth.moments, rates=leg.growth.rates,
            noise_db=leg.growth.noise_db, old_rate=leg.growth.old_rate,
            layer_distances=placed(leg, distances, big.num_layers),
        )  # fmt: skip
        write_atomically(self._plan_path(history), plan.to_json())
        before = self._bits(state.params, small, self.probe)
        key = jax.random.fold_in(jax.random.key(len(history.legs)), history.seed)
        grown = jax.jit(functools.partial(growth.grow, plan=plan))(state, key=key)
        if leg.shared_steps:
            grown = dataclasses.replace(grown, opt_state=_with_shared_steps(grown.opt_state))
        masks_at = plan.masks if plan.masked else None
        change = measure.function_change(old, grown.params, batch, plan)
        return grown, {
            "step": start.end,
            "exactness": plan.exactness,
            "layer_map": list(plan.layer_map),
            "distances": distances,
            "max_abs_logit_diff": change["max_abs_logit_diff"],
            "bpb_before": before,
            "bpb_after": self._bits(grown.params, big, self.probe, masks_at, 0.0),
            **self._stuck(plan, grown.params, batch, 0.0),
        }

    def _stuck(
        self, plan: growth.Plan, params: Any, batch: Any, mask: float | None
    ) -> dict[str, int]:
        """Added slots without a gradient, and copies that are equal to their source."""
        masks = plan.masks(mask) if plan.masked and mask is not None else None
        _, grads, _ = gradients(params, batch, plan.config, masks)
        return {
            "dead_slots": int(dead_slots(plan, grads)),
            "locked_copies": int(locked_copies(plan, params, grads)),
        }

    def _calibration(self, seed: int, step: int, rows: int) -> dict[str, np.ndarray]:
        """The next sequences of the training data."""
        batch = self.corpus.batches(seed, step, -(-rows // self.config.batch_size), self.config.batch_size)
        return {k: v.reshape(-1, v.shape[-1])[:rows] for k, v in batch.items()}

    def _plan_path(self, grown: History) -> pathlib.Path:
        """Where the plan of a history's last leg is: the same for every length of that leg."""
        legs = (*grown.legs[:-1], dataclasses.replace(grown.last, steps=0))
        name = self.pieces.lab.identity(dataclasses.replace(grown, legs=legs))
        return self.pieces.folder.path / "plans" / f"{name}.json"

    def _plan(self, history: History) -> growth.Plan:
        """The plan of the growth in force."""
        assert history.grown is not None
        return _read_plan(str(self._plan_path(history.grown)))

    def _program(self, history: History, masked: bool = False) -> Program:
        """The program that trains a history's last leg, with its run-time masks or without.

        A grown model trains by the same program as one that never grew, unless its masks rise or
        its growth changes the optimizer.
        """
        grown, model = history.grown, self.pieces.lab.model_of(history)
        stage = StageConfig(
            name="piece",
            model=model,
            steps=1,
            batch_size=self.config.batch_size,
            learning_rate=self.config.learning_rate,
            matrix_learning_rate=self.config.matrix_learning_rate,
        )
        grown_at, plan = None, None
        if grown and grown.last.growth and (masked or changes_optimizer(grown.last.growth)):
            stage = dataclasses.replace(stage, growth=grown.last.growth)
            plan = self._plan(history)
            if changes_optimizer(grown.last.growth):
                grown_at = grown.leg_start
        key = (stage, history.b2, grown_at, plan, masked)
        if key not in self._programs:
            if len(self._programs) >= PROGRAMS:
                self._programs.pop(next(iter(self._programs)))
            self._programs[key] = self._make(stage, history.b2, grown_at, plan, masked)
        return self._programs[key]

    def _make(
        self,
        stage: StageConfig,
        b2: float,
        grown_at: int | None,
        plan: growth.Plan | None,
        masked: bool,
    ) -> Program:
        settings = dataclasses.replace(self.config.optimizer, b2=b2)

        def with_rate(rate: jax.Array) -> optax.GradientTransformation:
            return optim.optimizer(stage, settings, lambda step: rate, grown_at)

        tx = optax.inject_hyperparams(with_rate)(rate=1.0)
        masks_at = plan.masks if plan and masked else None
        added = growth.added_slots(plan) if plan else None
        step = make_train_step(stage, tx, self.mesh, masks_at, added=added)

        def call(
            state: TrainState, batches: Any, rates_K: jax.Array, masks_K: jax.Array | None
        ) -> tuple[TrainState, jax.Array]:
            def one(state: TrainState, x: Any) -> tuple[TrainState, jax.Array]:
                batch, rate, mask = x
                opt_state = optax.tree.set(state.opt_state, rate=rate)
                state, metrics = step(dataclasses.replace(state, opt_state=opt_state), batch, mask)
                return state, metrics["loss"]

            return jax.lax.scan(one, state, (batches, rates_K, masks_K))

        return Program(stage, tx, jax.jit(call, donate_argnums=0))

    def _bits(
        self,
        params: Any,
        model: TransformerConfig,
        batches: Any,
        masks_at: Any = None,
        mask: float | None = None,
    ) -> float:
        tokens = self.corpus.tokenizer.token_bytes
        bits = score(params, model, batches, tokens, self.mesh, masks_at, mask).bits_per_byte
        return round(bits, 6)

    def _finish(
        self,
        history: History,
        start: History | None,
        state: TrainState | None,
        losses: list[Any],
        evals: list[Any],
        progress: Row,
        seconds: float,
    ) -> Row:
        """Measures the end of a piece and writes its result; `state` is None if it diverged."""
        lab, tokens_of = self.pieces.lab, self.corpus.tokenizer.token_bytes
        row: Row = {
            "start": start.end if start else 0,
            "started_from": lab.identity(start) if start else None,
            "end": history.end,
            "flops": lab.flops(history),
            "tokens": lab.tokens(history),
            "seconds": round(seconds, 1),
            "bpb": None,
            "packages": {},
            "params_digest": None,
            "losses": thinned(losses, LOSSES),
            "evals": evals,
            "growth": progress["growth"],
        }
        if state is not None:
            model = lab.model_of(history)
            scores = {
                name: score(state.params, model, batches, tokens_of, self.mesh)
                for name, batches in self.validation.items()
            }
            total = sum(s.nats for s in scores.values()) / sum(s.bytes for s in scores.values())
            row["bpb"] = total / math.log(2)
            row["packages"] = {name: round(s.bits_per_byte, 4) for name, s in scores.items()}
            row["params_digest"] = params_digest(state.params)
            if history.grown:
                leg = history.grown.last
                assert leg.growth is not None
                batch = self._calibration(history.seed, history.end, leg.growth.calibration_sequences)
                row["stuck"] = self._stuck(self._plan(history), state.params, batch, None)
        self.pieces.write(history, row)
        return row


def changes_optimizer(settings: GrowthConfig) -> bool:
    """Whether the steps after a growth differ from those of a model that never grew."""
    return settings.old_rate != 1 or settings.added_rate != 1 or settings.rates == "ramp"


def placed(leg: Leg, distances: list[float], layers: int) -> list[float]:
    """The distances by which a growth chooses the layers to copy: measured, or evenly spread."""
    if leg.placement == "distance" or not distances or layers <= len(distances):
        return distances
    copies = layer_maps.interposed(len(distances), layers)
    return [-float(copies.count(i)) for i in range(len(distances))]


def thinned(points: list[Any], most: int) -> list[list[float]]:
    """At most so many points: [last step, mean value] of equal groups."""
    size = -(-len(points) // most) or 1
    groups = [points[n : n + size] for n in range(0, len(points), size)]
    return [[g[-1][0], round(sum(p[1] for p in g) / len(g), 4)] for g in groups]


@functools.lru_cache(maxsize=64)
def _read_plan(path: str) -> growth.Plan:
    with open(path, encoding="utf-8") as file:
        return growth.Plan.from_json(file.read())


def _with_shared_steps(opt_state: Any) -> Any:
    """All slots get the age of the oldest: their bias correction is the old slots'."""

    def aged(node: Any) -> Any:
        if isinstance(node, SlotAdamState):
            return node._replace(born=jax.tree.map(jnp.zeros_like, node.born))
        return node

    return jax.tree.map(aged, opt_state, is_leaf=lambda x: isinstance(x, SlotAdamState))
