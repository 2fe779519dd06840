"""Hooks of the training loop: evaluation, and the results of steps."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from flm_jax import mapping
from flm_jax.runs import findings
from flm_jax.runs.numerics import Numerics
from flm_jax.runs.stage import Ramp, Stage
from flm_jax.runs.timing import StageTime
from flm_jax.runtime import processes
from flm_jax.runtime.display import Progress
from flm_jax.runtime.joints import CutShort
from flm_jax.store.files import MetricsFile
from flm_jax.store.lineage import StageFolder
from flm_jax.store.metrics import TensorBoard

# Steps between two rows of metrics.jsonl, outside of ramps; a row holds the mean of their losses.
LOG_EVERY = 10


@dataclasses.dataclass(frozen=True)
class Log:
    """Writes a stage's measurements to metrics.jsonl, TensorBoard and the screen."""

    metrics: MetricsFile
    board: TensorBoard
    progress: Progress
    timing: StageTime


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
        if self._stage.sample:
            self._show(step, self._stage.sample(params, self._ramp.plan, mask))
        return 0

    def measured(self, step: int, name: str) -> float | None:
        """Returns the measurement `name` at a global step; None if there is none."""
        return self._measured.get(step, {}).get(name)

    def _write(self, step: int, result: dict[str, float], mask: float | None) -> None:
        log, bpb = self._log, result["bpb"]
        more = {name: value for name, value in result.items() if name != "bpb"}
        log.metrics.append("eval", step, **result, mask=mask)
        if self._stage.parent and step == self._stage.start:
            # The parent's end has the same step, where a curve shows only one of two values.
            log.board.write(step, "growth", bits_per_byte_after=bpb)
        else:
            log.board.write(step, "eval", bits_per_byte=bpb, **more)
        text = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in more.items())
        log.progress.note(
            f"{self._stage.name}  step {step}/{self._stage.end}  validation {bpb:.4f} bits per "
            f"byte{text}"
        )

    def _show(self, step: int, texts: list[str]) -> None:
        """Writes sample texts."""
        log = self._log
        log.metrics.append("samples", step, texts=texts)
        log.board.text(step, "eval/samples", "\n\n".join(f"```\n{text}\n```" for text in texts))
        for text in texts:
            log.progress.note(f"{self._stage.name}  step {step}  sample: {text!r}")


def announce(stage: Stage, folder: StageFolder, board: TensorBoard) -> None:
    """Writes the settings, and marks the growth, at the first step of a stage."""
    if not processes.first():
        return
    board.settings(stage.start, mapping.to_dict(stage.experiment))
    if stage.parent:
        before = next((s for s in folder.run.stages() if s["name"] == stage.parent.name), None)
        bpb = before["eval"]["bpb_end"] if before else None
        if bpb is not None:
            board.write(stage.start, "growth", bits_per_byte_before=bpb)
        entry = {"name": stage.name, "parent": stage.parent.name, "receipt": folder.saved_receipt()}
        board.text(stage.start, "growth", findings.growth(entry, stage.config.model.dtype))


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """A train step that was dispatched to the devices; its results are not read yet.

    Attributes:
      step: the global step after it.
      metrics: the train step's metrics.
      data: the position in the data after its batch.
      request: the largest request of all processes; see `stop.request`.
    """

    step: int
    metrics: dict[str, jax.Array]
    data: dict[str, Any]
    request: jax.Array


class Report:
    """Reads the results of train steps, has them judged, shows and logs them."""

    def __init__(self, stage: Stage, ramp: Ramp, log: Log, first: int, numerics: Numerics):
        """Prepares the report of a stage.

        Args:
          stage: the stage that is trained.
          ramp: its run-time masks.
          log: receives the measurements.
          first: the global step from which this process trains.
          numerics: judges the results.
        """
        self._stage, self._ramp, self._log = stage, ramp, log
        self._first, self._numerics = first, numerics
        self._losses: list[float] = []  # since the last row
        self._norm = 0.0  # of the last step whose update was made
        self._busy = log.timing.busy()  # of an earlier attempt at the same steps

    def __call__(self, dispatched: Dispatched | None) -> int:
        """Waits for a step's results. Call it after the next step was dispatched.

        Args:
          dispatched: the step; None: does nothing.

        Returns:
          The request that came with the step; 0: none. See `stop.request`.

        Raises:
          NumericsError, Spike: as `Numerics.judge`.
        """
        if dispatched is None:
            return 0
        step = dispatched.step
        numbers = {n: float(x) for n, x in dispatched.metrics.items()}
        loss = numbers["loss"]
        updated = self._numerics.judge(step, numbers, dispatched.data)
        stage, mask = self._stage, self._ramp.value(step)
        tokens = (step - self._first) * stage.config.batch_size * stage.sequence_length
        log = self._log
        log.progress.update(step, loss, tokens, mask, log.timing.busy() - self._busy)
        if updated:
            self._losses.append(loss)
            self._norm = numbers["grad_norm"]
        due = step % LOG_EVERY == 0 or mask is not None or step in (self._ramp.end, stage.end)
        if due and self._losses:
            rate = stage.config.learning_rate * stage.schedule(jnp.int32(step - 1))
            row = {
                "loss": statistics.fmean(self._losses),
                "grad_norm": self._norm,
                "learning_rate": float(rate),
                "mask": 1.0 if mask is None else mask,
            }
            log.metrics.append("train", step, **row)
            log.board.write(step, "train", **row, tokens_per_s=log.progress.rate())
            self._losses.clear()
        return int(dispatched.request)
