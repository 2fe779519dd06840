"""Mixtures: every part has epochs of its own, shares follow the rates, positions resume exactly."""

import collections
import itertools

import numpy as np
import pytest

from flm_jax import data
from flm_jax.config import DataConfig
from flm_jax.errors import UserError

T = 8  # even: documents of one byte and its end token are never cut
BYTES = {"lower": "abcdefghijklmnopqrst", "upper": "ABCDEFGH", "digits": "0123456789"}
names = (f"mixture_test_{number}" for number in itertools.count())


def register(parts):
    """Registers a mixture of `parts`, name -> (documents, rate); returns its name."""
    import seqio
    import tensorflow as tf

    mixture, rates = next(names), []
    for part, (documents, rate) in parts.items():
        task = f"{mixture}_{part}"

        def dataset(split, shuffle_files, seed=None, documents=tuple(documents)):
            return tf.data.Dataset.from_tensor_slices({"targets": list(documents)})

        seqio.TaskRegistry.add(
            task,
            source=seqio.FunctionDataSource(dataset, ("train", "validation")),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features={"targets": seqio.Feature(seqio.ByteVocabulary())},
        )
        rates.append((task, rate))
    seqio.MixtureRegistry.add(mixture, rates)
    return mixture


def open_mixture(parts, **config):
    return data.open_corpus(DataConfig(**{"sequence_length": T, **config, "task": register(parts)}))


def characters(batch):
    tokens = batch["targets"][(batch["weights"] > 0) & (batch["targets"] >= 3)]
    return "".join(chr(token - 3) for token in tokens)


def uneven(stream):
    """Whether a part reads a document for the n-th time before it read another n - 1 times."""
    counts = collections.Counter()
    for character in stream:
        counts[character] += 1
        if any(
            character in part and counts[character] > min(counts[c] for c in part) + 1
            for part in BYTES.values()
        ):
            return True
    return False


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_every_part_reads_each_document_once_before_one_twice(seed):
    rng = np.random.default_rng(seed)
    rates = {part: float(rng.uniform(0.5, 2)) for part in BYTES}
    corpus = open_mixture({p: (BYTES[p], rates[p]) for p in BYTES}, seed=seed, shuffle_tokens=4 * T)
    stream = corpus.train(int(rng.integers(1, 6)))
    text = "".join(characters(next(stream)) for _ in range(-(-36 // stream.batch_size)))
    assert not uneven(text)
    assert set(text) == set("".join(BYTES.values()))
    epochs = [part["epoch"] for part in stream.get_state()["parts"]]
    assert max(epochs) > min(epochs)  # a small part repeats while a large one goes on
    # Negative control: a seqio mixture begins all parts anew when the smallest one ends.
    epochs = [
        corpus.task.get_dataset({"targets": T}, "train", seed=n, num_epochs=1) for n in range(3)
    ]
    documents = [e["targets"][0] for epoch in epochs for e in epoch.as_numpy_iterator()]
    assert uneven("".join(chr(token - 3) for token in documents))


def test_every_part_gives_its_windows_whole_and_in_the_order_of_its_epochs():
    """Also with documents that windows cut, and with several sequences in a window."""
    rng = np.random.default_rng(5)
    parts = {
        part: (["".join(rng.choice(list(letters), rng.integers(1, 40))) for _ in range(20)], rate)
        for (part, letters), rate in zip(BYTES.items(), (1.0, 2.5, 0.7), strict=True)
    }
    corpus = open_mixture(parts, window_length=4 * T, shuffle_tokens=12 * T, seed=3)
    stream = corpus.train(3)
    rows = np.concatenate([next(stream)["targets"] for _ in range(120)])
    windows = rows.reshape(-1, 4, T)
    for index, part in enumerate(corpus.parts):
        ids = [ord(letter) + 3 for letter in BYTES[part.name.rpartition("_")[2]]]
        mine = windows[np.isin(windows, ids).any((1, 2))].reshape(-1, T)
        assert len(mine) > 40
        epochs = itertools.chain.from_iterable(
            corpus.epoch(epoch, index).as_numpy_iterator() for epoch in itertools.count()
        )
        own = [row["targets"] for row in itertools.islice(epochs, len(mine))]
        np.testing.assert_array_equal(mine, own)


def test_rates_count_documents_whatever_their_length():
    lengths, rates = np.array([10, 60, 25]), np.array([1.0, 0.5, 2.0])
    parts = {
        part: ([letters[0] * (length - 1)] * 256, rate)
        for (part, letters), length, rate in zip(BYTES.items(), lengths, rates, strict=True)
    }
    parts["never"] = (["?"] * 5, 0.0)
    corpus = open_mixture(parts, sequence_length=64)
    shares = dict(zip(BYTES, lengths * rates / (lengths * rates).sum(), strict=True))
    got = {part.name: share for part, share in zip(corpus.parts, corpus.shares, strict=True)}
    assert got == pytest.approx({f"{corpus.config.task}_{p}": x for p, x in shares.items()})
    stream = corpus.train(40)
    counts = collections.Counter("".join(characters(next(stream)) for _ in range(10)))
    assert set(counts) == {BYTES[part][0] for part in shares}
    tokens = np.array([counts[BYTES[part][0]] for part in shares]) * lengths / (lengths - 1)
    drawn = tokens / tokens.sum()  # of 400 windows: three standard deviations are 0.075 at most
    np.testing.assert_allclose(drawn, list(shares.values()), atol=0.075)


@pytest.mark.parametrize("longer, batch_size", [(T, 3), (4 * T, 4)])
def test_a_position_resumes_with_other_batches_hosts_and_lengths(longer, batch_size):
    """After 16 windows, or inside one if the length stays."""
    parts = {part: (BYTES[part] * 8, rate) for part, rate in zip(BYTES, (1, 2, 3), strict=True)}
    corpus = open_mixture(parts, window_length=4 * T, seed=7)
    first = corpus.train(batch_size)
    for _ in range(13 if batch_size == 3 else 16):
        next(first)
    state = first.get_state()
    config = DataConfig(
        task=corpus.config.task, window_length=4 * T, seed=7, sequence_length=longer
    )
    other = data.open_corpus(config)
    halves = [other.train(16 * T // longer, host, 2) for host in range(2)]
    for half in halves:
        half.set_state(state)
    got = np.concatenate([next(half)["targets"] for half in halves]).reshape(-1, T)
    want = np.concatenate([next(first)["targets"] for _ in range(6)])
    np.testing.assert_array_equal(got[: len(want)], want[: len(got)])
    if longer > T:  # negative control: of another window
        assert not (got[4:] == want[:12]).all()


def test_a_whole_split_reads_every_document_of_every_part_once():
    corpus = open_mixture({part: (BYTES[part], 1) for part in BYTES})
    everything = sorted("".join(BYTES.values()))
    for batches in (corpus.sequences("validation", 2), corpus.validation(4, 1000)):
        assert sorted("".join(characters(batch) for batch in batches)) == everything


@pytest.mark.parametrize("rates", [(0, 0), (1, -1), (float("nan"), 1)])
def test_impossible_rates_are_refused(rates):
    with pytest.raises(UserError, match=r"mixture_test_\d+', a mixture .* rate"):
        open_mixture({p: (BYTES[p], r) for p, r in zip(("lower", "upper"), rates, strict=True)})
