"""What a stage does about numbers that are not finite, and about losses that spike.

Each step's loss and gradient norm are judged once they are read (`Numerics.judge`), and the whole
state before it is saved (`Numerics.check_state`). The numbers are those of the whole batch, so all
processes decide alike.

A spike ends `loop.train`. The stage then goes back to the last checkpoint that was due by its
number of steps (`go_back`), so that stops in between change nothing. A row of the kind "rollback"
in metrics.jsonl keeps the position after the batch that spiked; it counts from then on, in this
process and in one that resumes there (`data_position`). A process that ends before the row is
written finds the same spike again.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flm_jax.config import NumericsConfig
from flm_jax.errors import NumericsError
from flm_jax.runs.stage import Position, Stage
from flm_jax.runtime import processes
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.store.files import MetricsFile
from flm_jax.train import guard

Row = Mapping[str, Any]
_JUDGED = ("loss", "grad_norm")
_SKIP = ", or set numerics.on_nonfinite to 'skip'"
_OF_NORMAL = 1.4826  # standard deviation over median absolute deviation, of a normal distribution


class Spike(Exception):
    """A loss or a gradient norm is far above those of the steps before.

    Attributes:
      row: the fields of the row of the kind "rollback".
    """

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.row = row


def robust_z(past: Iterable[float], value: float) -> float:
    """How far a value is above the median of others, in robust standard deviations.

    These are never taken as below a millionth of the median, so that equal values do not give
    infinity.

    >>> round(robust_z([1.0, 2.0, 3.0, 4.0, 5.0], 3.0 + 1.4826), 6)
    1.0
    """
    past = list(past)
    median = statistics.median(past)
    deviation = _OF_NORMAL * statistics.median(abs(x - median) for x in past)
    return (value - median) / max(deviation, 1e-6 * abs(median), 1e-30)


class Numerics:
    """Judges the numbers of one stage, from one position to its end or to a spike."""

    def __init__(
        self,
        stage: Stage,
        position: Position,
        rows: Sequence[Row],
        metrics: MetricsFile,
        checkpoints: Checkpoints,
    ):
        """Continues the counts of a stage.

        Args:
          stage: the stage that is trained.
          position: from where; it holds the numbers of the steps before.
          rows: the rows of metrics.jsonl up to it.
          metrics: receives a row for each skipped step.
          checkpoints: the stage's checkpoints; an error names the last one.
        """
        self._name, self._settings = stage.name, stage.experiment.numerics
        self._metrics, self._checkpoints = metrics, checkpoints
        self._skipped = {row["step"] for row in rows if row["kind"] == "skipped"}
        self._rollbacks = sum(row["kind"] == "rollback" for row in rows)
        self._past = {
            name: deque(position.past.get(name, ()), self._settings.window) for name in _JUDGED
        }

    @property
    def past(self) -> dict[str, list[float]]:
        """The numbers that the next steps are compared with, as JSON values; empty: no need."""
        if not self._settings.spike_z:
            return {}
        return {name: list(values) for name, values in self._past.items()}

    def judge(self, step: int, numbers: Mapping[str, float], data: Mapping[str, Any]) -> bool:
        """Judges a step.

        Args:
          step: the global step.
          numbers: its loss and gradient norm, and for a guarded step `finite`.
          data: the position in the data after its batch.

        Returns:
          Whether its update was made; if not, it was skipped.

        Raises:
          NumericsError: a number is not finite, or spikes, and the run must stop.
          Spike: a number spikes, and the stage must go back.
        """
        wrong = [name for name in _JUDGED if not math.isfinite(numbers[name])]
        if wrong or not numbers.get("finite", True):
            self._refused(step, numbers, wrong[0] if wrong else "update")
            return False
        if self._settings.spike_z:
            self._compare(step, numbers, data)
        return True

    def check_state(self, step: int, state: Any) -> None:
        """Raises NumericsError if a state that is about to be saved is not finite."""
        if not bool(guard.all_finite(state)):
            raise self._error(f"the update is not finite at step {step}", _SKIP)

    def _refused(self, step: int, numbers: Mapping[str, float], name: str) -> None:
        """Counts a skipped step; raises NumericsError unless the step may be skipped."""
        value = f"is {numbers[name]}" if name in numbers else "is not finite"
        what = f"{name.replace('_', ' ')} {value} at step {step}"
        if self._settings.on_nonfinite == "stop":
            raise self._error(what, _SKIP)
        self._skipped.add(step)
        self._metrics.append("skipped", step, **{n: numbers[n] for n in _JUDGED})
        in_a_row = next(n for n in range(step + 1) if step - n not in self._skipped)
        if in_a_row > self._settings.most_skipped:
            most = f"numerics.most_skipped {self._settings.most_skipped}"
            raise self._error(f"{what}, and {in_a_row} steps in a row were skipped ({most})")

    def _compare(self, step: int, numbers: Mapping[str, float], data: Mapping[str, Any]) -> None:
        for name, past in self._past.items():
            if len(past) < self._settings.window:
                continue
            z = robust_z(past, numbers[name])
            if z <= self._settings.spike_z:
                continue
            if self._rollbacks >= self._settings.most_rollbacks:
                raise self._error(
                    f"{name.replace('_', ' ')} {numbers[name]:.4g} spikes at step {step} (z "
                    f"{z:.1f}), after {self._rollbacks} rollbacks (numerics.most_rollbacks)"
                )
            raise Spike({"from_step": step, "spiked": name, "value": numbers[name], "z": z,
                         "data": dict(data)})  # fmt: skip
        for name, past in self._past.items():
            past.append(numbers[name])

    def _error(self, what: str, more: str = "") -> NumericsError:
        good = self._checkpoints.last_saved
        path = "none" if good is None else self._checkpoints.path(good)
        return NumericsError(
            f"stage {self._name}: {what}; the last good checkpoint is {path}; lower learning_rate "
            f"or raise warmup_steps, in a new workdir{more}"
        )


def go_back(spike: Spike, stage: Stage, checkpoints: Checkpoints) -> None:
    """Makes the checkpoint before a spike the newest one. All processes call it together.

    It is the last one that was due by the number of steps. Newer ones (by time, after a signal) are
    deleted. Where it was not kept, it is the newest one.

    Args:
      spike: what was found.
      stage: the stage.
      checkpoints: the stage's checkpoints. One that is still being written is waited for.
    """
    checkpoints.wait()
    every = stage.experiment.checkpoint.every_steps
    if every:
        due = stage.start + (spike.row["from_step"] - 1 - stage.start) // every * every
        fresh = due == stage.start and stage.parent is None and not stage.config.source
        if fresh or due in checkpoints.steps:
            checkpoints.delete_after(due)


def record(spike: Spike, position: Position, metrics: MetricsFile) -> None:
    """Writes the row of a rollback. All processes call it together.

    Args:
      spike: what was found.
      position: the position to which the stage went back.
      metrics: receives the row; rows of the steps that are undone are deleted when training begins.
    """

    def write() -> None:
        metrics.append("rollback", position.step, **spike.row)
        metrics.publish()

    processes.once(write)


def data_position(position: Position, rows: Iterable[Row]) -> dict[str, Any]:
    """The position in the data from which a stage trains: behind the batches that spiked.

    Args:
      position: the position of a checkpoint, or of the stage's start.
      rows: the rows of metrics.jsonl up to it.
    """
    back = [row for row in rows if row["kind"] == "rollback" and row["step"] == position.step]
    return dict(back[-1]["data"]) if back else position.data


def guarded(settings: NumericsConfig) -> bool:
    """Whether a run's train steps are guarded; see `make_train_step`."""
    return settings.on_nonfinite == "skip"
