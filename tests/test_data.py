"""The data: exact resume, whole epochs, packing, bytes per token, splits, user errors."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_jax import data
from flm_jax.config import DataConfig
from flm_jax.errors import UserError

T = 16
EOS = 1
NASTY = [
    "a b",
    "  two  spaces  ",
    "\ttab\n\n\nlines\r\n",
    "naïve Ωμέγα 漢字 🙂👩‍👩‍👧",
    "</s> <unk> <0x0A>",
    "\x00\x01",
    " ",
    "\n",
]
# SentencePiece itself cannot distinguish U+2581 from a space.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


def random_documents(count, seed):
    rng = np.random.default_rng(seed)
    alphabet = list("abcdefgh    \n\t.é漢🙂")
    texts = ["".join(rng.choice(alphabet, rng.integers(1, 60))) for _ in range(count)]
    return NASTY + [f"{i} {text}" for i, text in enumerate(texts)]


def write_folder(folder, texts):
    for i, text in enumerate(texts):
        path = folder / f"part{i % 3}" / f"{i:04d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return str(folder)


def documents_of(corpus, split):
    return [document.text for document in corpus.task.source.documents[split]]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """About 70 documents and 200 windows, so several epochs are cheap."""
    path = write_folder(tmp_path_factory.mktemp("small"), random_documents(70, seed=0))
    return data.open_corpus(
        DataConfig(task="text_files", path=path, sequence_length=T, shuffle_tokens=50 * T)
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Documents for three packing groups; windows are not shuffled."""
    path = write_folder(tmp_path_factory.mktemp("large"), random_documents(700, seed=1))
    return data.open_corpus(
        DataConfig(task="text_files", path=path, sequence_length=T, shuffle_tokens=1)
    )


@pytest.fixture(scope="module")
def rows(small):
    """The uninterrupted stream of more than two epochs, one sequence after another."""
    return take(small.train(1), 3 * epoch_length(small))


@pytest.fixture(scope="module")
def vocabulary_path(small, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("vocabulary") / "new folder" / "vocab.model")
    data.train_sentencepiece(small.config, 320, path)
    return path


def reopen(corpus, **changes):
    return data.open_corpus(dataclasses.replace(corpus.config, **changes))


def concatenate(batches):
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def take(iterator, count):
    return concatenate([next(iterator) for _ in range(count)])


def assert_rows(got, rows, start):
    for name, x in got.items():
        np.testing.assert_array_equal(x, rows[name][start : start + len(x)], err_msg=name)


def epoch_length(corpus):
    return sum(1 for _ in corpus.epoch(0))


def split_documents(targets, weights):
    """Returns the documents in the windows, in order, as bytes."""
    tokens = targets[weights > 0]
    assert tokens[-1] == EOS
    documents = np.split(tokens, np.flatnonzero(tokens == EOS) + 1)[:-1]
    return [(d[:-1] - 3).astype(np.uint8).tobytes() for d in documents]


# The stream and its position


def test_batches_have_the_stated_shapes_and_types(small):
    batch = next(small.train(4))
    assert {name: (x.shape, str(x.dtype)) for name, x in batch.items()} == {
        "tokens": ((4, T), "int32"),
        "targets": ((4, T), "int32"),
        "segment_ids": ((4, T), "int32"),
        "positions": ((4, T), "int32"),
        "weights": ((4, T), "float32"),
    }


@pytest.mark.parametrize("batch_size", [3, 16])
def test_batch_size_does_not_change_the_stream(small, rows, batch_size):
    count = len(rows["targets"]) // batch_size
    assert_rows(take(small.train(batch_size), count), rows, 0)


def test_resume_is_exact_at_any_position_and_with_another_batch_size(small, rows):
    length = epoch_length(small)
    positions = {0, 1, 7, length // 4 - 1, length // 4, length // 4 + 1, 2 * length // 4 + 3}
    iterator, done = small.train(4), 0
    for batches in sorted(positions):
        for _ in range(batches - done):
            next(iterator)
        done = batches
        state = json.loads(json.dumps(iterator.get_state()))
        assert state["sequences"] == 4 * batches
        assert state["epoch"] in ((4 * batches) // length, (4 * batches - 1) // length)
        for batch_size in (4, 5):
            resumed = small.train(batch_size)
            resumed.set_state(state)
            assert_rows(take(resumed, 5), rows, 4 * batches)
    assert state["epoch"] > 0, "the last position should be in the second epoch"


def test_resume_across_an_epoch_boundary(small, rows):
    length = epoch_length(small)
    iterator = small.train(1)
    take(iterator, length - 2)
    resumed = small.train(4)
    resumed.set_state(iterator.get_state())
    batch = next(resumed)
    assert_rows(batch, rows, length - 2)
    assert (resumed.get_state()["epoch"], resumed.get_state()["offset"]) == (1, 2)
    resumed.set_state(iterator.get_state())  # the same iterator can go back
    assert_rows(next(resumed), rows, length - 2)


def test_a_position_off_by_one_gives_other_batches(small, rows):
    """Negative control of the tests of exact resume."""
    iterator = small.train(4)
    next(iterator)
    state = iterator.get_state()
    iterator.set_state({**state, "offset": state["offset"] + 1})
    with pytest.raises(AssertionError):
        assert_rows(next(iterator), rows, 4)


def test_the_position_counts_only_returned_batches(small):
    iterator = small.train(4)
    next(iterator)
    assert iterator.get_state() == {
        "epoch": 0,
        "offset": 4,
        "sequences": 4,
        "seed": 0,
        "sequence_length": T,
        "window_length": T,
        "fingerprint": small.fingerprint,
    }


def test_the_context_grows_in_the_middle_of_the_stream(small):
    """Short and then long sequences give the windows' tokens in order, each exactly once."""
    long = reopen(small, sequence_length=4 * T)
    short = reopen(small, sequence_length=T, window_length=4 * T)
    before = short.train(2)
    first = take(before, 8)  # 16 short sequences: 4 windows
    after = long.train(1)
    after.set_state(before.get_state())
    rest = take(after, 3)
    stream = take(long.train(1), 7)
    joined = np.concatenate([first["targets"].reshape(-1, 4 * T), rest["targets"]])
    np.testing.assert_array_equal(joined, stream["targets"])
    # A sequence starts a new segment, at position 0, and sees nothing before it.
    assert (first["positions"][:, 0] == 0).all() and (first["tokens"][:, 0] == 0).all()
    assert (first["weights"].reshape(-1, 4 * T) == stream["weights"][:4]).all()
    # If the position is inside a long sequence, the rest of that sequence is skipped.
    before.set_state({**before.get_state(), "offset": 5})
    after.set_state(before.get_state())
    np.testing.assert_array_equal(next(after)["targets"], stream["targets"][2:3])


@pytest.mark.slow
def test_a_fresh_process_resumes_and_ends_in_the_middle_of_an_epoch(large):
    iterator = large.train(4)
    take(iterator, 3)
    state, expected = iterator.get_state(), next(iterator)
    program = """
import dataclasses, json, sys
from flm_jax import data
from flm_jax.config import DataConfig
assert not {"tensorflow", "seqio"} & set(sys.modules)
config, state = json.loads(sys.argv[1])
iterator = data.open_corpus(DataConfig(**config)).train(4)
iterator.set_state(state)
print(json.dumps(next(iterator)["tokens"].tolist()))
"""
    argument = json.dumps([dataclasses.asdict(large.config), state])
    done = subprocess.run(
        [sys.executable, "-c", program, argument],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout) == expected["tokens"].tolist()


@pytest.mark.parametrize("host_count", [1, 2, 3])
def test_hosts_share_the_global_batch(small, rows, host_count):
    hosts = [small.train(6, host, host_count) for host in range(host_count)]
    for iterator in hosts:
        next(iterator)
    parts = [next(iterator) for iterator in hosts]
    assert all(len(part["targets"]) == 6 // host_count for part in parts)
    assert_rows(concatenate(parts), rows, 6)
    assert len({json.dumps(iterator.get_state()) for iterator in hosts}) == 1
    alone = small.train(2)
    alone.set_state(hosts[-1].get_state())
    assert_rows(next(alone), rows, 12)


def test_the_seed_determines_the_order(small, rows):
    count = len(rows["targets"]) // 3
    assert_rows(take(reopen(small).train(1), 20), rows, 0)
    other = take(reopen(small, seed=1).train(1), count)
    assert not np.array_equal(other["targets"], rows["targets"][:count])
    assert not np.array_equal(rows["targets"][:count], rows["targets"][count : 2 * count])


@pytest.mark.parametrize(
    "change, field", [({"seed": 5}, "seed"), ({"sequence_length": 8}, "window_length")]
)
def test_state_of_another_stream_is_refused(small, change, field):
    old, new = (small.config.seed, 5) if field == "seed" else (T, 8)
    iterator = reopen(small, **change).train(2)
    with pytest.raises(UserError, match=rf"^{field} .*\b{old}, .* {new};"):
        iterator.set_state(small.train(2).get_state())


def test_state_of_other_documents_or_vocabulary_is_refused(small, large, vocabulary_path):
    state = small.train(2).get_state()
    for other in (large, reopen(small, vocabulary=vocabulary_path)):
        with pytest.raises(UserError, match=f"^fingerprint .*{state['fingerprint']}.*"):
            other.train(2).set_state(state)


# Epochs and packing


def test_an_epoch_holds_each_document_once(large):
    batches = concatenate(list(iter_epoch(large, 0)))
    documents = split_documents(batches["targets"], batches["weights"])
    expected = documents_of(large, "train")
    assert documents != expected, "not shuffled"
    assert sorted(documents) == sorted(expected)
    padded = (batches["weights"] == 0).any(axis=1)
    groups = -(-len(expected) // 256)
    assert groups == 3 and padded.sum() <= groups


def test_shuffling_windows_keeps_them(large):
    def windows(corpus):
        batches = concatenate(list(iter_epoch(corpus, 0)))
        return [row.tobytes() for row in batches["targets"]]

    plain, shuffled = windows(large), windows(reopen(large, shuffle_tokens=1 << 20))
    assert plain != shuffled
    assert sorted(plain) == sorted(shuffled)


def iter_epoch(corpus, epoch):
    iterator = corpus.train(1)
    while True:
        batch = next(iterator)
        if iterator.get_state()["epoch"] > epoch:
            return
        yield batch


def test_features_agree_with_a_plain_recomputation(large):
    batches = concatenate(list(iter_epoch(large, 0)))
    expected = {name: np.zeros_like(x) for name, x in batches.items()}
    expected["targets"] = batches["targets"]
    for row, targets in enumerate(batches["targets"]):
        segment, position, previous = 1, 0, 0
        for column, target in enumerate(targets):
            if target == 0:
                continue
            expected["tokens"][row, column] = previous
            expected["segment_ids"][row, column] = segment
            expected["positions"][row, column] = position
            expected["weights"][row, column] = 1
            position, previous = position + 1, target
            if target == EOS:
                segment, position, previous = segment + 1, 0, 0
    for name in batches:
        np.testing.assert_array_equal(batches[name], expected[name], err_msg=name)
    assert batches["segment_ids"].max() > 2 and (batches["weights"] == 0).any()


def test_validation_is_fixed_and_its_last_batch_padded(large, rows):
    four = large.validation(4, 6)
    assert [len(batch["targets"]) for batch in four] == [4, 4]
    assert [batch["weights"].any(axis=1).sum() for batch in four] == [4, 2]
    again = reopen(large, seed=3).validation(4, 6)
    for name, x in concatenate(four).items():
        np.testing.assert_array_equal(x, concatenate(again)[name])
        np.testing.assert_array_equal(x[:3], large.validation(3, 3)[0][name])
        assert x.dtype == rows[name].dtype


def test_validation_holds_its_split_in_order(large):
    everything = concatenate(large.validation(4, 10**6))
    documents = split_documents(everything["targets"], everything["weights"])
    assert documents == documents_of(large, "validation")


# Vocabularies


def test_byte_vocabulary_counts_bytes(small):
    assert small.vocab_size == 259
    assert small.token_bytes.dtype == np.int32 and small.token_bytes.shape == (259,)
    assert small.token_bytes[:3].tolist() == [0, 0, 0]
    assert_bytes(small)


def assert_bytes(corpus):
    """Checks `token_bytes` with the TensorFlow tokenizer, on the documents of both splits."""
    for split, batches in (
        ("train", list(iter_epoch(corpus, 0))),
        ("validation", corpus.validation(1, 10**6)),
    ):
        total = sum(corpus.token_bytes[batch["targets"]].sum() for batch in batches)
        assert total == corpus.num_bytes[split]
        assert total == sum(len(text) for text in documents_of(corpus, split))
        assert corpus.num_documents[split] == len(documents_of(corpus, split))


def test_sentencepiece_counts_bytes(small, vocabulary_path):
    corpus = reopen(small, vocabulary=vocabulary_path)
    assert corpus.vocab_size == 320 and corpus.token_bytes.shape == (320,)
    assert corpus.token_bytes[:3].tolist() == [0, 0, 0]
    assert corpus.token_bytes.max() > 1
    assert_bytes(corpus)


def test_sentencepiece_decodes_to_the_same_text(small, vocabulary_path):
    corpus = reopen(small, vocabulary=vocabulary_path)

    @settings(max_examples=300, deadline=None)
    @given(TEXT)
    def check(text):
        tokens = corpus.vocabulary.encode(text)
        assert corpus.vocabulary.decode(tokens) == text
        assert corpus.token_bytes[tokens].sum() == len(text.encode())

    check()
    for text in NASTY:
        check.hypothesis.inner_test(text)


def test_sentencepiece_training_is_deterministic(small, vocabulary_path, tmp_path):
    again = tmp_path / "again.model"
    data.train_sentencepiece(small.config, 320, str(again))
    with open(vocabulary_path, "rb") as file:
        assert again.read_bytes() == file.read()
    assert list(tmp_path.iterdir()) == [again]


@pytest.mark.parametrize("vocab_size", [100, 10**6])
def test_a_vocabulary_size_that_does_not_fit_leaves_nothing(small, tmp_path, vocab_size):
    with pytest.raises(UserError, match=f"vocab_size is {vocab_size}"):
        data.train_sentencepiece(small.config, vocab_size, str(tmp_path / "vocab.model"))
    assert not list(tmp_path.iterdir())


# Sources and splits


def test_split_is_stable_and_disjoint(tmp_path):
    texts = random_documents(200, seed=2)

    def names(count):
        folder = tmp_path / str(count)
        path = write_folder(folder, texts[:count])
        source = data.open_corpus(DataConfig(task="text_files", path=path)).task.source
        return {s: {d.name for d in rows} for s, rows in source.documents.items()}

    some, more = names(150), names(200)
    assert not some["train"] & some["validation"]
    assert len(some["train"] | some["validation"]) == 150
    assert 1 <= len(some["validation"]) <= 15
    assert some["train"] < more["train"] and some["validation"] <= more["validation"]


def test_two_documents_are_enough(tmp_path):
    path = write_folder(tmp_path, ["one", "two"])
    corpus = data.open_corpus(DataConfig(task="text_files", path=path))
    assert corpus.num_documents == {"train": 1, "validation": 1}


def test_the_fingerprint_depends_on_names_and_content(tmp_path):
    def fingerprint(folder, texts):
        path = write_folder(tmp_path / folder, texts)
        return data.open_corpus(DataConfig(task="text_files", path=path)).fingerprint

    first = fingerprint("a", ["one", "two", "three"])
    assert first == fingerprint("b", ["one", "two", "three"])
    assert first != fingerprint("c", ["one", "two", "threE"])
    assert first != fingerprint("d", ["two", "one", "three"])


def test_jsonl(tmp_path):
    texts = random_documents(100, seed=4)
    for part in range(2):
        rows = [json.dumps({"body": text}) for text in texts[part::2]]
        (tmp_path / f"{part}.jsonl").write_text("\n\n".join(rows) + "\n", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("not a row")
    corpus = data.open_corpus(
        DataConfig(task="jsonl_files", path=str(tmp_path), text_field="body", sequence_length=T)
    )
    documents = documents_of(corpus, "train") + documents_of(corpus, "validation")
    assert sorted(documents) == sorted(text.encode() for text in texts)
    assert_bytes(corpus)


def test_equal_rows_share_a_split(tmp_path):
    rows = [json.dumps({"text": f"row {i % 5}"}) for i in range(50)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    corpus = data.open_corpus(DataConfig(task="jsonl_files", path=str(tmp_path / "rows.jsonl")))
    assert not set(documents_of(corpus, "train")) & set(documents_of(corpus, "validation"))
    assert sum(corpus.num_documents.values()) == 50


def test_standard_library():
    corpus = data.open_corpus(DataConfig())
    names = [d.name for rows in corpus.task.source.documents.values() for d in rows]
    assert len(names) == len(set(names)) > 500
    assert {"dataclasses.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if "/test/" in f"/{name}" or "site-packages" in name]
    assert sum(corpus.num_bytes.values()) > 5_000_000
    assert 0.02 < corpus.num_documents["validation"] / len(names) < 0.06
    batches = corpus.validation(8, 96)
    assert sum(batch["weights"].sum() for batch in batches) == 96 * 256


def register(name, vocabulary, splits=("train", "validation")):
    import seqio
    import tensorflow as tf

    def dataset(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices({"targets": [f"{split} {i}" for i in range(40)]})

    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset, splits),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"targets": seqio.Feature(vocabulary)},
    )


def test_registered_task_and_mixture(vocabulary_path):
    import seqio

    register("ours", seqio.ByteVocabulary())
    register("ours_too", seqio.ByteVocabulary())
    register("ours_pieces", seqio.SentencePieceVocabulary(vocabulary_path))
    register("ours_without_validation", seqio.ByteVocabulary(), splits=("train",))
    seqio.MixtureRegistry.add("ours_mixed", ["ours", "ours_too"], default_rate=1)

    fingerprints = set()
    for name, vocabulary in (
        ("ours", "bytes"),
        ("ours_mixed", "bytes"),
        ("ours_pieces", vocabulary_path),
    ):
        config = DataConfig(task=name, vocabulary=vocabulary, sequence_length=T)
        corpus = data.open_corpus(config)
        fingerprints.add(corpus.fingerprint)
        iterator = corpus.train(2)
        next(iterator)
        resumed = data.open_corpus(config).train(2)
        resumed.set_state(iterator.get_state())
        np.testing.assert_array_equal(next(resumed)["targets"], next(iterator)["targets"])
        assert corpus.num_bytes == {}
    assert len(fingerprints) == 3

    epoch = list(iter_epoch(data.open_corpus(DataConfig(task="ours", sequence_length=T)), 0))
    assert sum((batch["targets"] == EOS).sum() for batch in epoch) == 40
    with pytest.raises(UserError, match="vocabulary is 'bytes', but task 'ours_pieces'"):
        data.open_corpus(DataConfig(task="ours_pieces"))
    with pytest.raises(UserError, match=r"'ours_without_validation' has splits \['train'\]"):
        data.open_corpus(DataConfig(task="ours_without_validation"))


# User errors


def test_c4_without_its_data(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"'c4', but TFDS has no data in .*; prepare it"):
        data.open_corpus(DataConfig(task="c4"))


@pytest.mark.parametrize(
    "files, config, message",
    [
        ({}, {"task": "text_files"}, "needs an existing file or folder"),
        ({}, {"path": "absent"}, "absent'.* needs an existing file or folder"),
        ({}, {"path": "."}, "a folder without any file"),
        ({"empty.txt": b""}, {"path": "."}, "a folder without any file"),
        ({"a.txt": b"\xff\xfe", "b.txt": b"b"}, {"path": "."}, "a.txt is not UTF-8"),
        ({"a.txt": b"a"}, {"path": "."}, "holds 1 bytes of text in 1 documents"),
        ({"a.txt": "é".encode()}, {"path": "a.txt"}, "too few to split"),
        (
            {"a.txt": b'{"text": "a"}\n{"text": "b"}\n'},
            {"path": "."},
            "this is JSONL; set .*jsonl_",
        ),
        ({"a.txt": b"a"}, {"path": ".", "task": "jsonl_files"}, r"any file \*.jsonl"),
        ({}, {"path": ".", "task": "python_stdlib"}, "'python_stdlib' reads no path"),
        (
            {},
            {"task": "no_such_task"},
            "'no_such_task'; choose one of python_stdlib, own_text, text_files",
        ),
        ({}, {"task": "python_stdlib", "seed": -1}, "seed is -1"),
        ({}, {"task": "python_stdlib", "vocabulary": "absent"}, "no such file"),
        (
            {"v.model": b"junk"},
            {"task": "python_stdlib", "vocabulary": "v.model"},
            "not a Sent",
        ),
    ],
)
def test_a_mistake_is_named(tmp_path, monkeypatch, files, config, message):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        data.open_corpus(DataConfig(**{"task": "text_files", **config}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row",
    [b"{", b"[]", b'{"body": "x"}', b'{"text": 3}', b'{"text": "\\ud800"}', b'{"text": "\xff"}'],
)
def test_a_malformed_row_is_named(tmp_path, row):
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "fine"}\n\n' + row + b"\n")
    with pytest.raises(UserError, match=r"rows.jsonl, line 3: .*'text'") as error:
        data.open_corpus(DataConfig(task="jsonl_files", path=str(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0,), "batch_size is 0"),
        ((6, 0, 4), "batch_size is 6 and host_count is 4"),
        ((6, 2, 2), "host_index is 2 and host_count is 2"),
    ],
)
def test_batches_that_cannot_be_shared(small, arguments, message):
    with pytest.raises(UserError, match=message):
        small.train(*arguments)
    with pytest.raises(UserError, match="num_sequences is 0"):
        small.validation(2, 0)
