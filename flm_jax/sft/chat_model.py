"""A model as functions of chat samples: its answers, response losses and embeddings.

Letters: B samples, T tokens, D embed, V vocab, L layers.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax import data
from flm_jax.config import DataConfig, TransformerConfig
from flm_jax.data.tokenizer import Tokenizer
from flm_jax.errors import UserError
from flm_jax.inference.evaluation import score
from flm_jax.inference.generation import Sampling, bucket, generate
from flm_jax.interop.opening import OpenedModel, open_model
from flm_jax.models import Transformer
from flm_jax.params import sharding
from flm_jax.params.dtypes import wide
from flm_jax.runtime import paths
from flm_jax.sft.chats import BadRows, Sample
from flm_jax.sft.packing import features
from flm_jax.sft.scoring import ResponseLoss
from flm_jax.sft.template import (
    Encoded,
    encode_sample,
    model_prompt,
    stop_ids,
    weight_of,
    without_questions,
)
from flm_jax.sft.unwritten import left_out, writable
from flm_jax.train.train_step import Batch, nats_of

T = TypeVar("T")

_VALIDATION_BATCH = 8


@dataclasses.dataclass(frozen=True)
class ChatModel:
    """A model that answers in its chat template.

    Attributes:
      model: the opened model; its tokenizer, its chat template and its start-token rule apply to
        all prompts.
      max_new_tokens: longest answer, in tokens.
      batch_size: samples in one batch.
      note: called with two numbers, of finished samples and of all samples.
    """

    model: OpenedModel
    max_new_tokens: int = 160
    batch_size: int = 16
    note: Callable[[int, int], None] = lambda done, of: None

    @property
    def params(self) -> Any:
        return self.model.params

    @property
    def config(self) -> TransformerConfig:
        return self.model.token_config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    def answer(self, samples: Sequence[Sample]) -> list[str]:
        """Answers each sample's last question greedily.

        Args:
          samples: conversations. The last assistant message of each is left out of the prompt.

        Returns:
          The answers' texts, in the samples' order.
        """
        stops = stop_ids(self.tokenizer, self.model.template)
        sampling = Sampling(self.max_new_tokens, stop_tokens=stops)

        def prompt(sample: Sample) -> list[int]:
            last = max(n for n, m in enumerate(sample.messages) if m.role == "assistant")
            return model_prompt(self.model, sample.messages[:last], sample.tools)

        def answers(prompts: list[list[int]]) -> list[str]:
            rows = prompts + prompts[:1] * (self.batch_size - len(prompts))
            key = jax.random.key(0)  # not used: greedy
            texts = generate(self.params, self.config, rows, sampling, key)
            return [self.tokenizer.decode(text) for text in texts[: len(prompts)]]

        return self._by_length([prompt(s) for s in samples], len, answers)

    def losses(self, samples: Sequence[Sample]) -> list[ResponseLoss]:
        """Computes the loss of all assistant messages, each given the messages before it.

        Tokens and bytes count with the messages' weights, as in training.

        Returns:
          One loss per sample, in the samples' order.
        """
        encoded = self._encode(samples)

        def nats(rows: list[Encoded]) -> list[float]:
            nats_B = np.asarray(_nats(self.params, self._batch(rows), self.config))
            return [float(value) for value in nats_B[: len(rows)]]

        return [
            ResponseLoss(value, sum(e.weights), _response_bytes(s))
            for s, e, value in zip(
                samples, encoded, self._by_length(encoded, _tokens, nats), strict=True
            )
        ]

    def unprompted(self, samples: Sequence[Sample]) -> list[ResponseLoss]:
        """Computes the losses as `losses` does, but without the other roles' messages."""

        def answers_of(sample: Sample) -> Sample:
            answers = without_questions(sample.messages, self.model.template)
            return dataclasses.replace(sample, messages=answers)

        return self.losses([answers_of(sample) for sample in samples])

    def embeddings(self, samples: Sequence[Sample]) -> np.ndarray:
        """Embeds conversations: the last layer's output, averaged over a conversation's tokens.

        Returns:
          [samples, D], float32 (float64 for a float64 model).
        """
        encoded = self._encode(samples)

        def means(rows: list[Encoded]) -> list[Any]:
            return list(
                np.asarray(_means(self.params, self._batch(rows), self.config))[: len(rows)]
            )

        return np.stack(self._by_length(encoded, _tokens, means))

    def writable(self, samples: Sequence[Sample], bad: BadRows) -> list[Sample]:
        """Leaves out the samples that the template cannot write; see `unwritten.writable`."""
        return writable(samples, self.tokenizer, self.model.template, bad)

    def left_out(self, samples: Sequence[Sample]) -> dict[str, int]:
        """Counts what the template does not write, by kind; see `unwritten.left_out`."""
        lost = (left_out(s, self.tokenizer, self.model.template) for s in samples)
        return dict(collections.Counter(itertools.chain.from_iterable(lost)))

    def _encode(self, samples: Sequence[Sample]) -> list[Encoded]:
        return [encode_sample(s, self.tokenizer, self.model.template) for s in samples]

    def _batch(self, rows: list[Encoded]) -> Batch:
        """One conversation to a row, filled up to `batch_size` rows."""
        length = bucket(max(_tokens(e) for e in rows) + len(self.model.starts) - 1)
        packed = [[e] for e in rows] + [[]] * (self.batch_size - len(rows))
        return {
            name: jnp.asarray(x) for name, x in features(packed, length, self.model.starts).items()
        }

    def _by_length(
        self, items: Sequence[Any], length: Callable[[Any], int], compute: Callable[[Any], list[T]]
    ) -> list[T]:
        """Applies `compute` to batches of items of similar length; keeps the items' order."""
        order = sorted(range(len(items)), key=lambda i: length(items[i]))
        results: dict[int, T] = {}
        for chosen in _batches(order, self.batch_size):
            results |= zip(chosen, compute([items[i] for i in chosen]), strict=True)
            self.note(len(results), len(items))
        return [results[i] for i in range(len(items))]


def open_chat_model(given: str, vocabulary: str = "") -> tuple[ChatModel, Any]:
    """Opens a model and the data of its run.

    Args:
      given: PATH or PATH:STAGE; see `open_model`.
      vocabulary: the vocabulary to use, as `DataConfig.vocabulary`; "": the run's. A model without
        a run needs one; its data is then `DataConfig`'s default.

    Returns:
      The model, and the `data.pipeline.Corpus` of its run.

    Raises:
      UserError: there is no such model, or its vocabulary is not known.
    """
    model = open_model(*split_stage(given))
    settings = model.data
    if settings is None and not vocabulary:
        raise UserError(
            f"{given} has no run that names its vocabulary; give one", argument="vocabulary"
        )
    settings = settings or DataConfig()
    if vocabulary:
        settings = dataclasses.replace(settings, vocabulary=vocabulary)
    corpus = data.open_corpus(settings)
    return ChatModel(model.with_data(settings)), corpus


def split_stage(given: str) -> tuple[str, str]:
    """Splits PATH or PATH:STAGE into path and stage; the stage is "" if none is given.

    A path that exists is not split, even if it has a colon.

    >>> split_stage("runs/demo:small")
    ('runs/demo', 'small')
    >>> split_stage("runs/demo")
    ('runs/demo', '')
    """
    path, colon, stage = given.rpartition(":")
    if not colon or "/" in stage or paths.of(given).exists():
        return given, ""
    return path, stage


def retention(model: ChatModel, corpus: Any, sequences: int) -> float:
    """Measures the retained knowledge: validation bits per byte of the base's text.

    Fine-tuning should not raise it. The training loop measures a stage in the same way.

    Args:
      model: the model to measure.
      corpus: the base's `data.pipeline.Corpus`.
      sequences: number of validation sequences.
    """
    batches = corpus.validation(_VALIDATION_BATCH, sequences)
    mesh = sharding.one_device()
    return score(model.params, model.config, batches, corpus.token_bytes, mesh).bits_per_byte


def _tokens(encoded: Encoded) -> int:
    return len(encoded.tokens)


def _response_bytes(sample: Sample) -> float:
    return sample.weight * sum(weight_of(m) * len(m.content.encode()) for m in sample.answers)


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    return (order[n : n + size] for n in range(0, len(order), size))


@functools.partial(jax.jit, static_argnames="config")
def _nats(params: Any, batch: Batch, config: TransformerConfig) -> jax.Array:
    """[B]: the loss in nats, summed over a row's learned tokens."""
    nats_BT = nats_of(config, params, batch, tokens=config.tokens)
    return jnp.sum(nats_BT * batch["weights"].astype(nats_BT.dtype), axis=1)


@functools.partial(jax.jit, static_argnames="config")
def _means(params: Any, batch: Batch, config: TransformerConfig) -> jax.Array:
    """[B, D]: the last layer's output, averaged over a row's tokens."""
    _, captured = Transformer(config).apply(
        {"params": params}, batch["tokens"], batch["segment_ids"], batch["positions"],
        capture_intermediates=True, mutable=["intermediates"],
    )  # fmt: skip
    stream_LBTD = captured["intermediates"]["layers"]["__call__"][0][0]
    last_BTD = stream_LBTD[-1].astype(wide(config.dtype))
    real_BT1 = (batch["segment_ids"] > 0).astype(last_BTD.dtype)[..., None]
    means_BD: jax.Array = (last_BTD * real_BT1).sum(1) / jnp.maximum(real_BT1.sum(1), 1)
    return means_BD
