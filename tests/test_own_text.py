"""Your own text: files by suffix, splits, summaries, vocabularies, and files that are damaged."""

import dataclasses
import gzip
import io
import json
import random
import re

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet as pq

from flm_jax import data
from flm_jax.config import DataConfig, ExperimentConfig, StageConfig, TransformerConfig
from flm_jax.data import documents, files, readers
from flm_jax.errors import UserError
from flm_jax.interop.stage_source import resolved
from flm_jax.params import axes, mesh, sharding
from flm_jax.runs import announcement
from flm_jax.store.lineage import RunFolder
from tests import hostile

WORDS = ["tree", "Ωμέγα", "漢字", "🙂", "a b", "\ttab", "naïve", "grow"]


def texts(count, seed=0):
    rng = random.Random(seed)
    return [
        "\n".join(
            " ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 9))
        )
        for _ in range(count)
    ]


def zstandard(content):
    out = io.BytesIO()
    with pyarrow.CompressedOutputStream(out, "zstd") as stream:
        stream.write(content)
    return pyarrow.compress(content, "zstd", asbytes=True)


def rows(values):
    return "".join(json.dumps({"text": value}) + "\n" for value in values).encode()


def parquet(values, **options):
    out = io.BytesIO()
    pq.write_table(pyarrow.table({"id": list(range(len(values))), "text": values}), out, **options)
    return out.getvalue()


def own(path, **options):
    return DataConfig(task="own_text", path=str(path), **options)


def read(path, **options):
    """The texts of all documents, in order."""
    splits, unread = files.splits(own(path, **options), whole=True)
    return [d.text.decode() for d in splits["all"]], unread


def joined(rows):
    return b"".join(d.text for d in rows)


# Reading


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".txt", ".md", ".py", ".rst", ".jsonl", ".json", ".parquet"])
def test_each_suffix_gives_the_texts_that_were_written(tmp_path, suffix, packed):
    expected = texts(20, seed=1)
    if suffix == ".jsonl":
        content = rows(expected)
    elif suffix == ".json":
        content = json.dumps([{"text": t} if i % 2 else t for i, t in enumerate(expected)]).encode()
    elif suffix == ".parquet":
        content = parquet(expected, row_group_size=7)
    else:
        content, expected = expected[0].encode(), expected[:1]
    content = {"": lambda x: x, ".gz": gzip.compress, ".zst": zstandard}[packed](content)
    path = tmp_path / f"file{suffix}{packed}"
    path.write_bytes(content)
    assert read(path) == (expected, [])


def test_a_folder_a_pattern_and_several_paths(tmp_path):
    for name in ("a.txt", "b/c.md", "b/d.md", "e.png", "f.bin", ".hidden/g.txt", "empty.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("" if name == "empty.txt" else f"text of {name}")
    assert read(tmp_path) == (
        ["text of a.txt", "text of b/c.md", "text of b/d.md"],
        ["e.png", "f.bin"],
    )
    assert read(f"{tmp_path}/b/*.md")[0] == ["text of b/c.md", "text of b/d.md"]
    assert read(f"{tmp_path}/**/c.*")[0] == ["text of b/c.md"]
    assert read(f"{tmp_path}/*.bin")[0] == ["text of f.bin"]  # it is named
    both = read(f"{tmp_path}/b, {tmp_path}/a.txt,{tmp_path}/b/c.md")[0]
    assert both == ["text of b/c.md", "text of b/d.md", "text of a.txt"]  # none of them twice
    (tmp_path / "x, y.txt").write_text("comma")
    assert read(f"{tmp_path}/x, y.txt")[0] == ["comma"]


def test_a_field_of_rows_is_chosen(tmp_path):
    for name, content in {
        "a.jsonl": b'{"body": "one", "text": "no"}\n',
        "b.json": b'[{"body": "two"}]',
        "c.json": b'{"body": "three"}\n{"body": "four"}\n',  # one object per line
    }.items():
        (tmp_path / name).write_bytes(content)
    assert read(tmp_path, text_field="body")[0] == ["one", "two", "three", "four"]


# Splitting


@pytest.mark.parametrize("count", [1, 3, 49])
@pytest.mark.parametrize("size", [7, 90, 3000])
def test_few_texts_are_split_by_position(tmp_path, count, size):
    written = [
        ("".join(texts(400, seed=i)).encode()[:size]).decode("utf-8", "ignore")
        for i in range(count)
    ]
    for i, text in enumerate(written):
        (tmp_path / f"{i:03}.txt").write_text(text)
    splits, _ = files.splits(own(tmp_path))
    validation = {d.name.removesuffix(", end"): d.text for d in splits["validation"]}
    assert len(splits["train"]) == len(validation) == count
    for document, text in zip(splits["train"], written, strict=True):
        assert document.text + validation[document.name] == text.encode()  # disjoint, and all of it
        document.text.decode(), validation[document.name].decode()  # no character is cut
    share = sum(map(len, validation.values())) / sum(len(t.encode()) for t in written)
    assert 0.03 <= share <= 0.09 or size < 50


def test_many_texts_are_split_by_their_hash(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(rows(texts(400) + texts(30)))  # 30 of them twice
    splits, _ = files.splits(own(tmp_path))
    training, validation = ({d.text for d in splits[s]} for s in ("train", "validation"))
    assert not training & validation
    assert training | validation == {text.encode() for text in texts(400)}
    assert 0.01 < len(validation) / 400 < 0.08


def test_a_long_text_is_cut_after_the_split(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 100)
    content = "\n".join(texts(60)).encode()
    (tmp_path / "a.txt").write_bytes(content)
    splits, _ = files.splits(own(tmp_path))
    assert joined(splits["train"]) + joined(splits["validation"]) == content
    assert len(splits["train"]) > 20 and max(len(d.text) for d in splits["train"]) <= 100
    assert [d.name for d in splits["train"]] == sorted({d.name for d in splits["train"]})
    source = data.open_corpus(own(tmp_path)).task.source
    assert source.num_texts("train") == source.num_texts("validation") == 1
    one_line = documents.by_text("x", "é".encode() * 333)
    cut = documents.pieces(one_line)
    assert joined(cut) == one_line.text and all(piece.text.decode() for piece in cut)


def test_validation_may_have_its_own_path(tmp_path):
    (tmp_path / "a.txt").write_text("training " * 20)
    (tmp_path / "b.txt").write_text("validation " * 20)
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    corpus = data.open_corpus(own(first, validation_path=str(second)))
    assert joined(corpus.task.source.documents["train"]) == first.read_bytes()
    assert joined(corpus.task.source.documents["validation"]) == second.read_bytes()
    swapped = data.open_corpus(own(second, validation_path=str(first)))
    assert swapped.fingerprint != corpus.fingerprint
    with pytest.raises(UserError, match=r"validation_path is 'absent', but absent does not exist"):
        files.splits(own(first, validation_path="absent"))
    with pytest.raises(UserError, match=r"validation_path .* task 'python_stdlib' reads no path"):
        data.open_corpus(DataConfig(validation_path="x"))


def test_the_same_files_elsewhere_give_the_same_stream_and_processes_share_it(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        for i, text in enumerate(texts(60)):
            (tmp_path / place / f"{i:03}.txt").write_text(text * 3)
    corpora = [
        data.open_corpus(own(tmp_path / place, sequence_length=16, shuffle_tokens=1 << 10))
        for place in ("one", "two")
    ]
    assert corpora[0].fingerprint == corpora[1].fingerprint
    whole = corpora[0].train(4)
    shares = [corpora[1].train(4, host, 2) for host in (0, 1)]
    for _ in range(3):
        parts = [next(share)["targets"] for share in shares]
        np.testing.assert_array_equal(np.concatenate(parts), next(whole)["targets"])
        assert not np.array_equal(*parts)


# What a run says


def model(vocab_size=260):
    return TransformerConfig(
        vocab_size=vocab_size, num_layers=1, d_model=8, num_heads=2, head_dim=4, d_ff=8
    )


def chain(config, steps=10, vocab_size=260):
    stage = StageConfig("only", model(vocab_size), steps, 2, 1e-3, 1e-3)
    return ExperimentConfig(stages=(stage,), data=config)


def numbers(line):
    return [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*", line)]


def test_the_summary_has_the_counted_numbers(tmp_path):
    for i, text in enumerate(texts(70)):
        (tmp_path / f"{i:03}.txt").write_text(text * 9)
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    config = own(tmp_path, sequence_length=16)
    corpus = data.open_corpus(config)
    splits = corpus.task.source.documents
    counted = sum(len(row) for row in corpus.documents("train").as_numpy_iterator())
    steps = 3 * counted // 32
    lines = announcement.text(chain(config, steps), corpus)
    training, validation = (len(joined(splits[s])) for s in ("train", "validation"))
    assert numbers(lines[0])[:5] == [
        len(splits["train"]), training, counted, len(splits["validation"]), validation
    ]  # fmt: skip
    assert numbers(lines[0])[5] == pytest.approx(
        100 * validation / (training + validation), abs=0.1
    )
    assert numbers(lines[1]) == [steps * 32, pytest.approx(steps * 32 / counted, abs=0.01)]
    assert lines[2:] == ["not read: 1 other files: x.png"]
    assert "by heart" in announcement.text(chain(config, 2 * steps), corpus)[-1]


def test_19_bytes_are_warned_about(tmp_path):
    (tmp_path / "a.txt").write_text("nineteen bytes here")
    corpus = data.open_corpus(own(tmp_path))
    lines = announcement.text(chain(corpus.config), corpus)
    assert lines[0].startswith(
        "text: 1 documents, 18 bytes, 19 tokens for training; 1 documents, 1"
    )
    assert "has 19 tokens, and one batch 512" in lines[2] and "269.5 passes" in lines[3]


def test_the_line_about_devices():
    config = chain(DataConfig())
    layout = sharding.Layout(mesh.mesh_of(config.mesh, _devices(), "mesh"), config.mesh.rules)
    line = announcement.devices(config, [layout])
    assert re.fullmatch(
        r"devices: \d+ x cpu, [\d.]+ GB in this machine; mesh: data \d+ x fsdp 1 x tensor 1; "
        "precision: float32", line
    )  # fmt: skip
    two = dataclasses.replace(
        config,
        stages=(*config.stages, dataclasses.replace(
            config.stages[0], name="second", steps=200,
            model=dataclasses.replace(model(), dtype="bfloat16"),
        )),
    )  # fmt: skip
    line = announcement.devices(two, [layout, layout])
    assert line.endswith("precision: float32 (only), bfloat16 (second)")


def _devices():
    import jax

    return jax.devices()


# Vocabularies


def test_vocab_size_follows_the_vocabulary(tmp_path):
    config = chain(DataConfig(), vocab_size=0)
    assert resolved(config).stages[0].model.vocab_size == 259
    trained = dataclasses.replace(config, data=DataConfig(train_vocabulary=500))
    assert resolved(trained).stages[0].model.vocab_size == 500
    given = chain(DataConfig(train_vocabulary=500), vocab_size=512)
    assert resolved(given) == given
    with pytest.raises(UserError, match="vocab_size is 0, which only a chain fills in"):
        axes.table(config.stages[0].model) and axes.axis_sizes(config.stages[0].model)


def test_a_trained_vocabulary_belongs_to_its_run(tmp_path):
    config = DataConfig(train_vocabulary=300)
    with pytest.raises(UserError, match="only a run trains its vocabulary; train one with flm voc"):
        data.open_corpus(config)
    with pytest.raises(UserError, match="train_vocabulary is 300 and vocabulary 'x'; give one"):
        DataConfig(train_vocabulary=300, vocabulary="x")
    opened = RunFolder(tmp_path / "run").data(config)
    assert (opened.vocabulary, opened.train_vocabulary) == (f"{tmp_path}/run/vocabulary.model", 0)
    assert RunFolder(tmp_path).data(DataConfig()) == DataConfig()


@pytest.mark.parametrize(
    "content, words",
    [
        (None, r"hf download NAME tokenizer.json tokenizer_config.json --local-dir FOLDER"),
        (b"the\nof\nand\n", "'gpt2', which is a text file, not a SentencePiece model"),
        (b"\x00\xff\x01" * 9, "'gpt2', which is not a SentencePiece model"),
    ],
)
def test_a_wrong_vocabulary_says_what_is_expected(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    if content:
        (tmp_path / "gpt2").write_bytes(content)
    with pytest.raises(UserError, match=words):
        data.open_corpus(DataConfig(vocabulary="gpt2"))


# Damaged files


DEEP = b"[" * 5000 + b"]" * 5000


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", b"caf\xe9 in latin-1", r"a.txt is not UTF-8 text \(byte 0xE9 in line 1\)"),
        ("a.txt", "wide".encode("utf-16"), "a.txt is not UTF-8"),
        ("a.txt", rows(["x", "y"]), "this is JSONL; rename it so that it ends in .jsonl"),
        ("a.txt", b"", "which has no text"),
        ("a.png", b"\x89PNG\r\n\x1a\n\xff", "a.png is not UTF-8"),
        ("a.txt.gz", b"not gzip", "damaged or not compressed as its suffix says"),
        ("a.txt.gz", gzip.compress(b"cut" * 999)[:-9], "damaged or not compressed"),
        ("a.txt.zst", b"not zstd", "damaged or not compressed"),
        ("a.jsonl.zst", zstandard(rows(["x"] * 99))[:-5], "a.jsonl.zst.*(damaged|line)"),
        ("a.parquet", b"PAR1 junk PAR1", "a.parquet: no Parquet file"),
        ("a.parquet", parquet(["x"])[:-20], "a.parquet: no Parquet file"),
        ("a.jsonl", b"{", "a.jsonl, line 1: .*; make every row a JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1: it has no such text"),
        ("a.jsonl", DEEP, "a.jsonl, line 1: "),
        ("a.json", DEEP, r"a.json: not JSON \(it is nested too deeply\)"),
        ("a.json", b'[{"text": "a"}, 3]', "a.json, item 2: it has no such text"),
        ("a.json", b'{"text": "\\ud800"}', "half of a surrogate pair"),
    ],
    ids=map(str, range(17)),
)
def test_a_damaged_file_is_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with (
        hostile.patience(5),
        hostile.bounded_memory(),
        pytest.raises(UserError, match=words) as caught,
    ):
        files.splits(own(tmp_path / name))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["fifo", "loop", "zero", "socket"])
def test_what_is_no_file_is_refused_and_left_out_of_folders(tmp_path, kind):
    hostile.make_special(tmp_path / "x.txt", kind)
    with hostile.patience(5), pytest.raises(UserError, match=r"x\.txt"):
        files.splits(own(tmp_path / "x.txt"))
    (tmp_path / "a.txt").write_text("text")
    with hostile.patience(5):
        assert read(tmp_path)[0] == ["text"]


def test_bombs_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_LEAST_LIMIT", 1 << 20)
    bomb = b"0" * (8 << 20)
    for name, content in {
        "a.txt.gz": gzip.compress(bomb), "a.txt.zst": zstandard(bomb),
        "a.jsonl.gz": gzip.compress(rows([bomb.decode()])),
        "a.parquet": parquet(["x" * 4096] * 4096),
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with hostile.patience(5), pytest.raises(UserError, match=r"200 times its size"):
            files.splits(own(tmp_path / name))
        with monkeypatch.context() as patched:  # the control
            patched.setattr(readers, "_LEAST_LIMIT", 64 << 20)
            assert read(tmp_path / name)[0]


def test_a_column_that_holds_no_text(tmp_path):
    out = io.BytesIO()
    pq.write_table(pyarrow.table({"text": [1, 2], "body": ["a", None]}), out)
    (tmp_path / "a.parquet").write_bytes(out.getvalue())
    with pytest.raises(UserError, match=r"a.parquet, row 1: it has no such text"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"a.parquet, row 2: it has no such text"):
        read(tmp_path, text_field="body")
    with pytest.raises(UserError, match=r"it has columns text, body; make every row .*'absent'"):
        read(tmp_path, text_field="absent")


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr("os.access", lambda *_: False)  # the tests may run as root
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        read(tmp_path)
    monkeypatch.undo()

    def refused(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.exists", refused)
    with pytest.raises(UserError, match=r"a.txt cannot be read \(Permission denied\)"):
        read(tmp_path / "a.txt")


def test_a_folder_without_text_says_what_it_has(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no text \(it has a.png\); give files that end in .txt"):
        read(tmp_path)
    with pytest.raises(UserError, match="a pattern without any file"):
        read(f"{tmp_path}/*.txt")
    with pytest.raises(UserError, match="needs an existing file or folder"):
        files.splits(DataConfig(task="own_text"))
