"""Training curves for TensorBoard and the user's tracker, through clu."""

from __future__ import annotations

import contextlib
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    def settings(self, step: int, config: Mapping[str, Any]) -> None:
        """Writes a run's config as text and as hyper-parameters."""
        self.text(step, "config", f"```\n{json.dumps(config, indent=1)}\n```")
        self._writer.write_hparams(dict(_leaves(config)))

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text in Markdown."""
        self._writer.write_texts(step, {name: text})

    def write(self, step: int, group: str, **scalars: float) -> None:
        """Writes values of a step, by the name of their curve in a group, as "train"."""
        self._writer.write_scalars(step, {f"{group}/{name}": x for name, x in scalars.items()})
        if self._local != self._directory and time.monotonic() - self._published > _PUBLISH_S:
            self._writer.flush()
            self._publish()

    def _publish(self) -> None:
        """Copies the files to the bucket, if the curves belong on one."""
        if self._local != self._directory:
            paths.copy(self._local, self._directory)
            self._published = time.monotonic()


def _leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields path and value of each setting, as ("stages[0].steps", 100).

    >>> list(_leaves({"stages": [{"steps": 3}], "seed": 0, "mesh": None}))
    [('stages[0].steps', 3), ('seed', 0)]
    """
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from _leaves(value, f"{path}.{name}" if path else name)
    elif isinstance(config, list):
        for index, value in enumerate(config):
            yield from _leaves(value, f"{path}[{index}]")
    elif config is not None:
        yield path, config
