"""Hooks of the training loop: evaluation, the check that losses are finite, logs."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from flm_jax.errors import NumericsError
from flm_jax.runs.stage import Ramp, Stage
from flm_jax.runtime.display import Progress
from flm_jax.runtime.joints import CutShort
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.store.files import MetricsFile
from flm_jax.store.metrics import TensorBoard

LOG_EVERY = 10  # steps between two rows of metrics.jsonl; a row holds their mean loss


@dataclasses.dataclass(frozen=True)
class Log:
    """Writes a stage's measurements to metrics.jsonl, TensorBoard and the screen."""

    metrics: MetricsFile
    board: TensorBoard
    progress: Progress


class Evaluation:
    """Evaluates a stage at its start and end, at the end of its ramp, and every `every_steps`."""

    def __init__(self, stage: Stage, ramp: Ramp, log: Log, rows: list[dict[str, Any]]):
        """Prepares the evaluations of a stage.

        Args:
          stage: the stage to evaluate.
          ramp: its run-time masks.
          log: receives the measurements.
          rows: the rows of metrics.jsonl so far; their steps are not evaluated again.
        """
        self._stage, self._ramp, self._log = stage, ramp, log
        self._measured = {row["step"]: row for row in rows if row["kind"] == "eval"}

    def due(self, step: int) -> bool:
        """Whether a global step must be evaluated, and is not yet."""
        stage = self._stage
        since, every = step - stage.start, stage.experiment.eval.every_steps
        due = step in (stage.start, stage.end, self._ramp.end) or since % every == 0
        return due and step not in self._measured

    def __call__(self, step: int, params: Any) -> int:
        """Evaluates the parameters after a global step.

        Returns:
          The number of the signal that cut it short: it is not measured, and is due again; 0: none.
        """
        mask = self._ramp.value(step)
        try:
            result = self._stage.evaluate(params, self._ramp.masks_at, mask)
        except CutShort as cut:
            return cut.number
        self._measured[step] = result
        self._write(step, result, mask)
        return 0

    def measured(self, step: int, name: str) -> float | None:
        """Returns the measurement `name` at a global step; None if there is none."""
        return self._measured.get(step, {}).get(name)

    def _write(self, step: int, result: dict[str, float], mask: float | None) -> None:
        log, bpb = self._log, result["bpb"]
        more = {name: value for name, value in result.items() if name != "bpb"}
        log.metrics.append("eval", step, **result, mask=mask)
        log.board.write(step, validation_bits_per_byte=bpb, **more)
        text = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in more.items())
        log.progress.note(
            f"{self._stage.name}  step {step}/{self._stage.end}  validation {bpb:.4f} bits per "
            f"byte{text}"
        )


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """A train step that was dispatched to the devices; its results are not read yet.

    Attributes:
      step: the global step after it.
      metrics: the train step's metrics.
      request: the largest request of all processes; see `stop.request`.
    """

    step: int
    metrics: dict[str, jax.Array]
    request: jax.Array


class Report:
    """Reads the results of train steps, checks that losses are finite, shows and logs them."""

    def __init__(self, stage: Stage, ramp: Ramp, log: Log, first: int, checkpoints: Checkpoints):
        """Prepares the report of a stage.

        Args:
          stage: the stage that is trained.
          ramp: its run-time masks.
          log: receives the measurements.
          first: the global step from which this process trains.
          checkpoints: the stage's checkpoints; an error names the last one.
        """
        self._stage, self._ramp, self._log = stage, ramp, log
        self._first, self._checkpoints = first, checkpoints
        self._losses: list[float] = []  # since the last row

    def __call__(self, dispatched: Dispatched | None) -> int:
        """Waits for a step's results. Call it after the next step was dispatched.

        Args:
          dispatched: the step; None: does nothing.

        Returns:
          The request that came with the step; 0: none. See `stop.request`.

        Raises:
          NumericsError: the loss is not finite.
        """
        if dispatched is None:
            return 0
        step, metrics = dispatched.step, dispatched.metrics
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            raise self._diverged(step, loss)
        stage, mask = self._stage, self._ramp.value(step)
        tokens = (step - self._first) * stage.config.batch_size * stage.sequence_length
        self._log.progress.update(step, loss, tokens, mask)
        self._losses.append(loss)
        if step % LOG_EVERY == 0:
            rate = stage.config.learning_rate * stage.schedule(jnp.int32(step - 1))
            row = {
                "loss": statistics.fmean(self._losses),
                "grad_norm": float(metrics["grad_norm"]),
                "learning_rate": float(rate),
                "mask": 1.0 if mask is None else mask,
            }
            self._log.metrics.append("train", step, **row)
            self._log.board.write(step, **row)
            self._losses.clear()
        return int(dispatched.request)

    def _diverged(self, step: int, loss: float) -> NumericsError:
        good = self._checkpoints.last_saved
        path = "none" if good is None else self._checkpoints.path(good)
        return NumericsError(
            f"stage {self._stage.name}: loss is {loss} at step {step}; the last good checkpoint "
            f"is {path}; lower learning_rate or raise warmup_steps, in a new workdir"
        )
