"""Training curves for TensorBoard and the user's tracker, through clu."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from flm_jax.runtime import paths, processes

_PUBLISH_S = 60.0  # seconds between two copies to a bucket


class TensorBoard:
    """Writes training curves; a context manager.

    It imports clu and TensorFlow only on entry. With several processes only the first one writes.
    For a bucket, the files are written on this machine and copied there from time to time: the
    writer can only append, and an object is written whole.
    """

    def __init__(self, directory: pathlib.Path, others: Sequence[Callable[[], Any]] = ()):
        """Opens nothing yet.

        Args:
          directory: for TensorBoard's files.
          others: open further MetricWriters, which receive the same.
        """
        self._directory, self._others = directory, others

    def __enter__(self) -> TensorBoard:
        from clu import metric_writers

        self._stack = contextlib.ExitStack()
        self._local = self._directory
        if paths.remote(self._directory) and processes.first():
            folder = tempfile.TemporaryDirectory(prefix="flm_jax-")
            self._local = pathlib.Path(self._stack.enter_context(folder))
        self._published = time.monotonic()
        writers: list[Any] = []
        if processes.first():
            writers = [open_writer() for open_writer in self._others]
            writers.append(metric_writers.SummaryWriter(str(self._local)))
        self._writer = metric_writers.AsyncMultiWriter(writers)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stack:
            self._writer.close()
            self._publish()

    def write(self, step: int, **scalars: float) -> None:
        """Writes values of a step, by the name of their curve."""
        self._writer.write_scalars(step, scalars)
        if self._local != self._directory and time.monotonic() - self._published > _PUBLISH_S:
            self._writer.flush()
            self._publish()

    def _publish(self) -> None:
        """Copies the files to the bucket, if the curves belong on one."""
        if self._local != self._directory:
            paths.copy(self._local, self._directory)
            self._published = time.monotonic()
