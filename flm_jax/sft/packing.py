"""Conversations packed into rows, and a resumable stream of their batches.

Letters in array names: B rows of a batch, T tokens of a row. Features are those of
`data.iterator.BatchIterator`: the conversations in a row are segments that do not see each other,
each with positions from 0; `weights` are those of the targets in the loss, 0 where nothing is
learned.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flm_jax.data.chat_template import TemplateConfig
from flm_jax.data.stream import Batch, BatchStream
from flm_jax.data.tokenizer import Tokenizer
from flm_jax.errors import UserError
from flm_jax.sft.chats import BadRows, Sample
from flm_jax.sft.template import Encoded, encode_sample
from flm_jax.sft.unwritten import left_out

OPEN_ROWS = 256  # number of latest rows that can still receive a conversation


@dataclasses.dataclass
class Counts:
    """Counts what happened to the conversations, so that nothing is dropped silently."""

    read: int = 0
    used: int = 0
    bad: int = 0  # the template cannot write it: left out
    no_assistant: int = 0  # nothing to learn: left out
    no_answer: int = 0  # all answers are empty or have weight 0: left out
    truncated: int = 0  # longer than the context: its end was cut off
    dropped: int = 0  # longer than the context: left out
    cut_to_nothing: int = 0  # the answer begins beyond the context: left out
    empty_answers: int = 0  # messages: not learned
    excluded_answers: int = 0  # messages with weight 0: not learned
    endless_answers: int = 0  # a Jinja template writes no end token after them
    tokens: int = 0
    learned: int = 0  # tokens
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)  # by the template: what

    def __str__(self) -> str:
        names = {
            "bad": "that the template cannot write", "no_assistant": "without an assistant turn",
            "no_answer": "without an answer to learn", "truncated": "truncated",
            "dropped": "dropped as too long", "cut_to_nothing": "answered beyond the context",
            "empty_answers": "empty answers not learned",
            "excluded_answers": "answers of weight 0 not learned",
            "endless_answers": "answers without an end token in the template",
        }  # fmt: skip
        odd = [f"{getattr(self, k)} {text}" for k, text in names.items() if getattr(self, k)]
        odd += [f"{count} {what} left out by the template" for what, count in self.left_out.items()]
        return ", ".join([f"{self.used} of {self.read} conversations used", *odd])


def encode_all(
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    template: TemplateConfig,
    length: int,
    overlong: str,
    bad: BadRows | None = None,
) -> tuple[list[Encoded], Counts]:
    """Encodes conversations; leaves out those that nothing can be learned from.

    Args:
      samples: the conversations.
      tokenizer: the model's.
      template: how conversations are written.
      length: the longest conversation, in tokens.
      overlong: what to do with a longer one: "drop" or "truncate".
      bad: counts conversations that the template cannot write; None: the first one is refused.

    Returns:
      The encoded conversations, and counts of what happened to all.

    Raises:
      UserError: no conversation is left, or the template cannot write one.
    """
    bad = bad or BadRows()
    kept, counts = [], Counts(read=len(samples))
    for sample in samples:
        encoded = _encode_one(sample, tokenizer, template, counts, bad)
        if encoded is None:
            continue
        if len(encoded.tokens) > length:
            if overlong == "drop":
                counts.dropped += 1
                continue
            encoded = encoded.cut(length)
            if not any(encoded.learned):
                counts.cut_to_nothing += 1
                continue
            counts.truncated += 1
        kept.append(encoded)
        counts.tokens += len(encoded.tokens)
        counts.learned += sum(encoded.learned)
    counts.used = len(kept)
    if not kept:
        raise UserError(
            f"no conversation is left to learn from: {counts}; sequence_length is {length} and "
            f"overlong is {overlong!r}: give other data, or change these"
        )
    return kept, counts


def _encode_one(
    sample: Sample, tokenizer: Tokenizer, template: TemplateConfig, counts: Counts, bad: BadRows
) -> Encoded | None:
    """Encodes a conversation; counts it and returns None if nothing can be learned from it."""
    if not sample.answers:
        counts.no_assistant += 1
        return None
    try:
        encoded = encode_sample(sample, tokenizer, template)
        lost = left_out(sample, tokenizer, template)
    except UserError as error:
        bad.add(str(error))
        counts.bad += 1
        return None
    for what in lost:
        counts.left_out[what] = counts.left_out.get(what, 0) + 1
    counts.empty_answers += sum(m.empty for m in sample.answers)
    counts.excluded_answers += sum(
        m.weight * sample.weight == 0 and not m.empty for m in sample.answers
    )
    if not any(encoded.learned):
        counts.no_answer += 1
        return None
    learned = np.array(encoded.learned)
    last = np.flatnonzero(learned & ~np.append(learned[1:], False))  # of each answer
    counts.endless_answers += sum(bool(tokenizer.pieces[encoded.tokens[n]]) for n in last)
    return encoded


def first_fit(lengths: Iterable[int], capacity: int) -> list[list[int]]:
    """Packs items into rows: each goes into the first open row with room, else into a new row.

    Only the latest OPEN_ROWS rows are open.

    Args:
      lengths: the items' lengths; none is above `capacity`.
      capacity: a row's length.

    Returns:
      The items' indices, row by row.

    >>> first_fit([3, 4, 2, 1], capacity=5)
    [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        for row in range(max(0, len(rows) - OPEN_ROWS), len(rows)):
            if room[row] >= length:
                break
        else:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= length
    return rows


def features(rows: Sequence[Sequence[Encoded]], length: int, starts: tuple[int, ...]) -> Batch:
    """Computes the model's features of packed rows.

    Args:
      rows: conversations, row by row.
      length: T, tokens in a row; the rest of a row is padding with weight 0.
      starts: the tokens before every conversation, unless it begins with them or its template
        writes its own. Without one, nothing predicts a conversation's first token, and it is no
        target.

    Returns:
      tokens, targets, segment_ids and positions, int32; weights, float32; all [B, T].
    """
    shape = (len(rows), length)
    batch = {
        name: np.zeros(shape, np.int32)
        for name in ("tokens", "targets", "segment_ids", "positions")
    }
    batch["weights"] = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        start = 0
        for number, conversation in enumerate(row, start=1):
            begun = conversation.begun or conversation.tokens[: len(starts)] == starts
            added = () if begun else starts
            tokens = (*added, *conversation.tokens)
            weights = (*(0.0 for _ in added), *conversation.weights)
            end = start + len(tokens) - 1
            batch["tokens"][b, start:end] = tokens[:-1]
            batch["targets"][b, start:end] = tokens[1:]
            batch["segment_ids"][b, start:end] = number
            batch["positions"][b, start:end] = np.arange(end - start)
            batch["weights"][b, start:end] = weights[1:]
            start = end
    return batch


def in_order(
    conversations: Sequence[Encoded], length: int, batch_size: int, start_id: int
) -> list[Batch]:
    """Packs every conversation once, in order.

    Args:
      conversations: encoded conversations.
      length: tokens in a row.
      batch_size: rows of every batch; the last batch is filled up with empty rows.
      start_id: the input token at the start of a conversation.

    Returns:
      Batches as `features` gives them.
    """
    packed = first_fit((len(c.tokens) for c in conversations), length)
    rows = [[conversations[i] for i in row] for row in packed]
    rows += [[] for _ in range(-len(rows) % batch_size)]
    return [
        features(rows[n : n + batch_size], length, (start_id,))
        for n in range(0, len(rows), batch_size)
    ]


class ChatBatches(BatchStream):
    """An endless stream of packed conversations, epoch after epoch.

    Conversations are packed once, in a random order that the seed determines. Each epoch has all
    rows, in a new random order. A batch may hold the last rows of one epoch and the first rows of
    the next.

    Attributes:
      rows: the packed conversations.
    """

    def __init__(
        self,
        conversations: Sequence[Encoded],
        length: int,
        batch_size: int,
        seed: int,
        fingerprint: str,
        start_id: int,
        host_index: int = 0,
        host_count: int = 1,
    ) -> None:
        """Packs the conversations.

        Args:
          conversations: encoded conversations.
          length: tokens in a row.
          batch_size: rows in a global batch.
          seed: of all orders.
          fingerprint: of the conversations; a saved position is valid only for the same.
          start_id: the input token at the start of a conversation.
          host_index: index of this process.
          host_count: number of processes.
        """
        order = np.random.default_rng((seed, 0)).permutation(len(conversations))
        shuffled = [conversations[i] for i in order]
        packed = first_fit((len(c.tokens) for c in shuffled), length)
        self.rows = [[shuffled[i] for i in row] for row in packed]
        identity = {"seed": seed, "fingerprint": fingerprint, "rows": len(self.rows)}
        super().__init__(batch_size, identity, host_index, host_count)
        self._length, self._seed, self._start_id = length, seed, start_id
        self._place = 0  # rows returned so far, in all epochs

    def __next__(self) -> Batch:
        places = range(self._place, self._place + self.batch_size)[self.host_rows]
        order = functools.cache(self._order)
        rows = []
        for place in places:
            epoch, offset = divmod(place, len(self.rows))
            rows.append(self.rows[order(epoch)[offset]])
        self._place += self.batch_size
        return features(rows, self._length, (self._start_id,))

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, 1, epoch)).permutation(len(self.rows))

    def _position(self) -> dict[str, Any]:
        return {"place": self._place}

    def _seek(self, state: Mapping[str, Any]) -> None:
        self._place = state["place"]
