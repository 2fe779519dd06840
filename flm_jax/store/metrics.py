"""Training curves for TensorBoard, through clu."""

from __future__ import annotations

import pathlib
from types import TracebackType

from flm_jax.runtime import processes


class TensorBoard:
    """Writes training curves; a context manager.

    It imports clu and TensorFlow only on entry. With several processes only the first one writes.
    """

    def __init__(self, directory: pathlib.Path):
        self._directory = directory

    def __enter__(self) -> TensorBoard:
        from clu import metric_writers

        writers = [metric_writers.SummaryWriter(str(self._directory))] if processes.first() else []
        self._writer = metric_writers.AsyncMultiWriter(writers)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()

    def write(self, step: int, **scalars: float) -> None:
        """Writes values of a step, by the name of their curve."""
        self._writer.write_scalars(step, scalars)
