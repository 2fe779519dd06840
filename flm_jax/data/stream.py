"""A resumable stream of batches: the common part of all training streams.

Imports neither seqio nor TensorFlow. `iterator.BatchIterator` streams text, and
`flm_jax.sft.packing.ChatBatches` streams conversations.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import numpy as np

from flm_jax.errors import UserError

Batch = dict[str, np.ndarray]


class BatchStream(abc.ABC):
    """An endless stream of batches; its position is a small dict that JSON can hold.

    Several processes share a stream: each reads an equal share of the rows of every batch. The
    position does not depend on the process, on the number of processes, or on the batch size.

    A subclass implements `__next__`, `_position` and `_seek`.
    """

    def __init__(
        self,
        batch_size: int,
        identity: Mapping[str, Any],
        host_index: int = 0,
        host_count: int = 1,
    ) -> None:
        """Initialises the common part.

        Args:
          batch_size: rows in a global batch.
          identity: the settings, by name, that determine the order of the rows. A saved position
            is valid only in a stream with the same identity.
          host_index: index of this process.
          host_count: number of processes.

        Raises:
          UserError: the processes cannot share the batch equally.
        """
        require_positive(batch_size=batch_size, host_count=host_count)
        if batch_size % host_count:
            raise UserError(
                f"batch_size is {batch_size} and host_count is {host_count}; make batch_size a "
                "multiple of host_count"
            )
        if not 0 <= host_index < host_count:
            raise UserError(
                f"host_index is {host_index} and host_count is {host_count}; make host_index a "
                "number from 0 to host_count - 1"
            )
        share = batch_size // host_count
        self.batch_size = batch_size
        self.host_rows = slice(host_index * share, (host_index + 1) * share)
        self._identity = dict(identity)

    def __iter__(self) -> BatchStream:
        return self

    @abc.abstractmethod
    def __next__(self) -> Batch:
        """Returns this process's rows of the next batch."""

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the batches returned so far, as JSON values."""
        return {**self._position(), **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves to a position: the next batch is the one that followed it.

        Args:
          state: the result of `get_state`, in any process.

        Raises:
          UserError: the state is from a stream with another identity.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise UserError(
                    f"{name} of the saved data state is {state.get(name)!r}, but this data has "
                    f"{value!r}; resume with the data and seed that the run started with, or "
                    "start a new run folder"
                )
        self._seek(state)

    @abc.abstractmethod
    def _position(self) -> dict[str, Any]:
        """Returns the position without the identity."""

    @abc.abstractmethod
    def _seek(self, state: Mapping[str, Any]) -> None:
        """Moves to a position; its identity has been checked already."""


def require_positive(**values: int) -> None:
    """Raises UserError if a value is below 1; the error names the value."""
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} is {value}; it must be 1 or more")
