"""The training stream of a corpus: packed sequences, with a position that can be saved.

Letters in array names: B sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from flm_jax.data.stream import Batch, BatchStream
from flm_jax.errors import UserError

if TYPE_CHECKING:
    from flm_jax.data.pipeline import Corpus

# Windows of a mixture whose parts are drawn from one seed.
_DRAWS = 1024


class BatchIterator(BatchStream):
    """An endless stream of packed text.

    A batch is a dict of numpy arrays [B, T]; B is this process's share of the global batch:
      targets: int32, the tokens to predict, each document's EOS included; 0 for padding.
      tokens: int32, `targets` shifted right in each segment, with `start_id` at its start; 0 for
        padding.
      segment_ids: int32, 1, 2, .. for each document in the window; 0 for padding.
      positions: int32, from 0 in each segment; 0 for padding.
      weights: float32, 1 for a target; 0 for padding.

    Where a window boundary cuts a document, the rest of it is a new segment, at position 0, in the
    next window.

    Each part of a mixture repeats by itself: all its documents are read before any of them is read
    again. Which part a window comes from is drawn by the parts' shares. It depends on the seed and
    the window's number alone, so sequences of every length read the same stream.
    """

    def __init__(self, corpus: Corpus, batch_size: int, host_index: int, host_count: int) -> None:
        identity = {
            "seed": corpus.config.seed,
            "window_length": corpus.config.window,
            "fingerprint": corpus.fingerprint,
        }
        super().__init__(batch_size, identity, host_index, host_count)
        self._corpus = corpus
        self._length = corpus.config.sequence_length
        self._sequences = 0  # sequences returned so far, counted in this length
        self._parts = [_Part(corpus, n, batch_size) for n in range(len(corpus.parts))]

    def __next__(self) -> Batch:
        numbers_B = np.arange(self._sequences, self._sequences + self.batch_size)
        owner_B = self._owners(numbers_B * self._length // self._corpus.config.window)
        self._sequences += self.batch_size
        order_B = np.argsort(owner_B, kind="stable")  # row of the batch -> place after the parts
        rows = [
            batch
            for n, part in enumerate(self._parts)
            for batch in part.take(int((owner_B == n).sum()))
        ]
        place_B = np.argsort(order_B, kind="stable")[self.host_rows]
        return {name: np.concatenate([row[name] for row in rows])[place_B] for name in rows[0]}

    def _owners(self, windows_B: np.ndarray) -> np.ndarray:
        """Returns the parts that these successive windows come from; some may be repeated."""
        if len(self._parts) == 1:
            return np.zeros_like(windows_B)
        blocks = range(windows_B[0] // _DRAWS, windows_B[-1] // _DRAWS + 1)
        drawn = [
            np.random.default_rng((self._corpus.config.seed, block)).choice(
                len(self._parts), _DRAWS, p=self._corpus.shares
            )
            for block in blocks
        ]
        owners: np.ndarray = np.concatenate(drawn)[windows_B - blocks[0] * _DRAWS]
        return owners

    def _position(self) -> dict[str, Any]:
        parts = [{"epoch": part.epoch, "offset": part.offset} for part in self._parts]
        places: dict[str, Any] = parts[0] if len(parts) == 1 else {"parts": parts}
        return {**places, "sequences": self._sequences, "sequence_length": self._length}

    def _seek(self, state: Mapping[str, Any]) -> None:
        """Moves to a position, which may be of another sequence length over the same windows.

        The rest of a partly read sequence is skipped: of a mixture, in the one part that the
        stream's last window comes from. The epoch's earlier sequences are read and tokenised again.
        """

        def converted(sequences: int) -> int:
            return -(-sequences * int(state["sequence_length"]) // self._length)

        for part, place in zip(self._parts, state.get("parts", [state]), strict=True):
            part.seek(place["epoch"], converted(place["offset"]))
        self._sequences = converted(state["sequences"])


class _Part:
    """The sequences of one part of a corpus, epoch after epoch.

    Attributes:
      epoch: number of the epoch.
      offset: sequences returned in this epoch.
    """

    def __init__(self, corpus: Corpus, index: int, batch_size: int) -> None:
        self._corpus, self._index, self._batch_size = corpus, index, batch_size
        self.seek(0, 0)

    def seek(self, epoch: int, offset: int) -> None:
        """Moves to a position."""
        self.epoch, self.offset = epoch, offset
        self._stream: Iterator[Batch] | None = None  # this epoch's, opened at `offset`
        self._rows: Batch | None = None  # read from the stream, not returned yet

    def take(self, count: int) -> Iterator[Batch]:
        """Yields the next `count` sequences, in batches of one or more."""
        while count:
            rows = self._next_rows()
            taken = min(count, _num_rows(rows))
            self._rows = {name: x[taken:] for name, x in rows.items()}
            self.offset += taken
            count -= taken
            yield {name: x[:taken] for name, x in rows.items()}

    def _next_rows(self) -> Batch:
        """Rows that were not returned yet, one or more; opens the next epoch if there are none."""
        if self._rows is not None and _num_rows(self._rows):
            return self._rows
        if self._stream is None:
            self._stream = self._open_stream()
        rows = next(self._stream, None)
        if rows is None:
            if self.offset == 0:
                task = self._corpus.parts[self._index].name
                raise UserError(
                    f"DataConfig.task is {self._corpus.config.task!r}, but the training split of "
                    f"{task!r} is empty; add documents"
                )
            self.epoch, self.offset = self.epoch + 1, 0
            self._stream = self._open_stream()
            return self._next_rows()
        return rows

    def _open_stream(self) -> Iterator[Batch]:
        windows = self._corpus.epoch(self.epoch, self._index).skip(self.offset)
        batches = windows.batch(self._batch_size).map(self._corpus.features)
        rows: Iterator[Batch] = batches.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
        return rows


def _num_rows(batch: Batch) -> int:
    return len(batch["targets"])
