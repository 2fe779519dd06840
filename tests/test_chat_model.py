"""`ChatModel` against plain computations of one sample at a time."""

import dataclasses
import math
import pathlib

import jax
import numpy as np
import pytest

from flm_jax.config import DataConfig
from flm_jax.data.tokenizer import open_tokenizer
from flm_jax.errors import UserError
from flm_jax.interop import opening
from flm_jax.interop.opening import OpenedModel
from flm_jax.sft import chat_model
from flm_jax.sft.chat_model import ChatModel
from flm_jax.sft.chats import Message, Sample
from flm_jax.sft.template import encode, encode_prompt
from tests.models import SMALL, changed, logits_of, numpy_logits, random_params

CONFIG = changed(SMALL, vocab_size=259)
BYTES = open_tokenizer("bytes")


def sample(*texts):
    roles = ("user", "assistant") * len(texts)
    return Sample(tuple(Message(r, t) for r, t in zip(roles, texts, strict=False)))


def opened(config, params, trained=True):
    """Returns a model like one that `open_model` returns."""
    data = DataConfig(vocabulary="bytes")
    return OpenedModel(params, config, data, "model", pathlib.Path("."), 96, trained)


SAMPLES = [sample("ab", "cde"), sample("a", "b", "what is it?", "é"), sample("long " * 9, "x")]


@pytest.fixture(scope="module")
def model():
    with jax.enable_x64(True):
        params = random_params(CONFIG, 0)
        yield ChatModel(opened(CONFIG, params), max_new_tokens=4, batch_size=2)


def plain_nats(model, s):
    """Computes the loss token by token, with the numpy model."""
    encoded = encode(s.messages, BYTES)
    tokens = np.array([[0, *encoded.tokens[:-1]]])
    positions = np.arange(tokens.shape[1])[None]
    logits = numpy_logits(CONFIG, model.params, tokens, np.ones_like(tokens), positions)[0]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = [log_probs[n, t] for n, t in enumerate(encoded.tokens) if encoded.learned[n]]
    return -sum(picked)


def test_losses(model):
    with jax.enable_x64(True):
        losses = model.losses(SAMPLES)
    for s, loss in zip(SAMPLES, losses, strict=True):
        assert loss.nats == pytest.approx(plain_nats(model, s), rel=1e-10)
    # Two answers with two end tokens; é is two bytes.
    assert (losses[1].tokens, losses[1].bytes) == (1 + 1 + 2 + 1, 3)
    # Negative control: another question gives another loss.
    other = sample("aB", "cde")
    assert abs(plain_nats(model, other) - losses[0].nats) > 1e-6


def test_unprompted_losses_ignore_the_questions(model):
    with jax.enable_x64(True):
        alone, again = (model.unprompted([s])[0] for s in (sample("q", "cde"), sample("r", "cde")))
        given = model.losses([sample("q", "cde")])[0]
    assert alone == again and alone.tokens == given.tokens
    assert abs(alone.nats - given.nats) > 1e-6


def next_token(params, tokens):
    """Returns the most likely next token; rows have a fixed length, so one program is compiled."""
    n = len(tokens)
    batch = {
        "tokens": np.array([tokens + [0] * (96 - n)], np.int32),
        "segment_ids": np.array([[1] * n + [0] * (96 - n)], np.int32),
        "positions": np.array([[*range(n)] + [0] * (96 - n)], np.int32),
    }
    return int(np.argmax(logits_of(CONFIG, params, batch)[0, n - 1]))


def test_answers_are_greedy(model):
    with jax.enable_x64(True):
        answers = model.answer(SAMPLES)
        for s, answer in zip(SAMPLES, answers, strict=True):
            tokens = [0, *encode_prompt(s.messages[:-1], BYTES)]
            new: list[int] = []
            while len(new) < 4 and 1 not in new:
                new.append(next_token(model.params, tokens + new))
            assert answer == BYTES.decode([t for t in new if t != 1])


@pytest.mark.parametrize(
    ("trained", "starts", "start"),
    [(True, (), [0]), (True, (0,), [0]), (False, (0,), [0]), (False, (), [])],
)
def test_answers_and_generate_use_the_same_prompt(model, trained, starts, start, monkeypatch):
    """A foreign model whose tokenizer adds no start token is prompted without one."""
    seen = []

    def record(params, config, rows, *more):
        seen.extend(rows)
        return [[] for _ in rows]

    monkeypatch.setattr(chat_model, "generate", record)
    tokenizer = dataclasses.replace(BYTES, starts=starts)
    monkeypatch.setattr(opening, "open_tokenizer", lambda name: tokenizer)
    model = dataclasses.replace(model, model=dataclasses.replace(model.model, trained=trained))
    model.answer(SAMPLES[:1])
    ids = [*encode_prompt(SAMPLES[0].messages[:-1], BYTES)]
    assert seen[0] == [*start, *ids]
    assert seen[0] == model.model.with_start(ids)  # the prompt of `flm generate --chat`


def test_embeddings_do_not_depend_on_the_batch(model):
    with jax.enable_x64(True):
        together = model.embeddings(SAMPLES)
        single = dataclasses.replace(model, batch_size=1)
        alone = np.concatenate([single.embeddings([s]) for s in SAMPLES[::-1]])[::-1]
    assert together.shape == (3, CONFIG.d_model)
    np.testing.assert_allclose(together, alone, rtol=1e-10)
    assert np.abs(together[0] - together[2]).max() > 1e-3  # negative control: samples differ


def test_stage_after_the_colon(tmp_path):
    folder = tmp_path / "with:colon"
    folder.mkdir()
    assert chat_model.split_stage("runs/demo:small") == ("runs/demo", "small")
    assert chat_model.split_stage("runs/demo") == ("runs/demo", "")
    assert chat_model.split_stage(str(folder)) == (str(folder), "")
    assert chat_model.split_stage(f"{folder}:1") == (str(folder), "1")
    with pytest.raises(UserError, match="nowhere holds no model"):
        chat_model.open_chat_model("nowhere")


def test_scores_of_a_uniform_model():
    """If all logits are equal, every token costs log2(vocabulary) bits."""
    params = jax.tree.map(np.zeros_like, random_params(changed(CONFIG, dtype="float32"), 0))
    uniform = ChatModel(opened(changed(CONFIG, dtype="float32"), params))
    loss = uniform.losses([sample("q", "abc")])[0]
    assert loss.nats == pytest.approx(4 * math.log(259), rel=1e-6)
