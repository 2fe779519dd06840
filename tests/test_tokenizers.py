"""Tokenizers: decoding, byte counts, end tokens, and agreement with the data pipeline."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from flm_jax import data
from flm_jax.config import DataConfig
from flm_jax.data.tokenizer import open_tokenizer
from flm_jax.errors import UserError

TEXTS = (
    "def f(x):\n    return x  # naïve\n",
    "  two  spaces\t\ttabs, µP, 分词器, 🙂\r\n",
    "one <|endoftext|> in the text",
    "",
)


def save(tokenizer, folder, **config):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder / "tokenizer.json")


def byte_level(bos=False):
    """Makes a tokenizer like those of GPT-2 and Llama 3."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
        )
    return tokenizer


def with_fallback():
    """Makes a tokenizer like Llama 2's: SentencePiece's spaces, and a fallback to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"\u2581defrtuxnw"]
    merges = [("\u2581", "r"), ("d", "e"), ("de", "f")]
    vocab = {p: i for i, p in enumerate([*pieces, *(a + b for a, b in merges)])}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    documents = root / "documents"
    documents.mkdir()
    for number, text in enumerate(TEXTS[:3]):
        (documents / f"{number}.txt").write_text(text * 20)
    train = DataConfig(task="text_files", path=str(documents), sequence_length=16)
    data.train_sentencepiece(train, 300, str(root / "own" / "tokenizer.model"))
    return {
        "bytes": "bytes",
        "byte-level": save(byte_level(), root / "gpt", eos_token="<|endoftext|>"),
        "byte-level with start": save(byte_level(bos=True), root / "llama3"),
        "fallback": save(with_fallback(), root / "llama2", eos_token={"content": "</s>"}),
        "sentencepiece": str(root / "own" / "tokenizer.model"),
        "folder": str(root / "own"),
        "documents": str(documents),
    }


KINDS = ("bytes", "byte-level", "byte-level with start", "fallback", "sentencepiece", "folder")


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_returns_the_text_and_its_bytes(files, kind):
    tokenizer = open_tokenizer(files[kind])
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        # Token by token, as in streamed generation.
        assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()
    assert tokenizer.pieces[tokenizer.eos_id] == b""
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""  # the extra tokens of a padded model
    # Negative control: one byte too many in every piece is noticed.
    wrong = tokenizer.token_bytes + 1
    assert wrong[tokenizer.encode(TEXTS[0])].sum() != len(TEXTS[0].encode())


@pytest.mark.parametrize("kind", ["byte-level", "fallback"])
def test_token_bytes_equal_the_librarys_decoding(files, kind):
    """Compares with the decoder of `tokenizers`, token by token."""
    library = tokenizers.Tokenizer.from_file(files[kind])
    tokenizer = open_tokenizer(files[kind])
    compared = 0
    for token, piece in enumerate(tokenizer.pieces):
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            continue  # part of a character: the library returns U+FFFD
        assert library.decode([token]) == text
        compared += 1
    assert compared > 128


def test_special_tokens_are_text_unless_requested(files):
    tokenizer = open_tokenizer(files["byte-level"])
    assert tokenizer.eos_id not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.encode("<|endoftext|>", special=True) == [tokenizer.eos_id]
    assert tokenizer.eos_id not in tokenizer.encode("<|endoftext|>")


def test_start_ids(files):
    expected = {
        "bytes": 0,
        "byte-level": 0,
        "byte-level with start": 1,
        "fallback": 2,
        "sentencepiece": 0,
    }
    assert {k: open_tokenizer(files[k]).start_id for k in expected} == expected
    expected = {
        "bytes": (0,),
        "byte-level": (),
        "byte-level with start": (1,),
        "sentencepiece": (0,),
    }
    assert {k: open_tokenizer(files[k]).starts for k in expected} == expected


@pytest.mark.parametrize(
    ("before", "after"),
    [("", ""), ("E", ""), ("B", ""), ("", "E"), ("B", "E"), ("E", "E"), ("B E", "E B")],
)
def test_added_special_tokens_equal_the_librarys(before, after, tmp_path):
    """Whatever the post-processor adds, also if the file limits and pads every text."""
    library = byte_level()
    template = f"{before} $A {after}".replace("E", "<|endoftext|>").replace("B", "<|begin|>")
    library.post_processor = processors.TemplateProcessing(
        single=template.strip(), special_tokens=[("<|endoftext|>", 0), ("<|begin|>", 1)]
    )
    wanted = [library.encode(text).ids for text in TEXTS]
    library.enable_truncation(4)
    library.enable_padding(length=64)
    names = {"eos_token": "<|endoftext|>", "bos_token": {"content": "<|begin|>"}}
    tokenizer = open_tokenizer(save(library, tmp_path, **names))
    got = [tokenizer.with_special(tokenizer.encode(text, special=True)) for text in TEXTS]
    assert got == wanted
    assert tokenizer.bos_id == 1 and tokenizer.eos_id == 0
    plain = [tokenizer.encode(text, special=True) for text in TEXTS]
    assert (plain == wanted) == (not before + after)  # negative control


@pytest.mark.parametrize("kind", KINDS)
def test_the_pipeline_has_the_same_tokens(files, kind):
    """Compares seqio's tokens of every document, and the model's input at a segment's start."""
    config = DataConfig(
        task="text_files", path=files["documents"], vocabulary=files[kind], sequence_length=64
    )
    corpus, tokenizer = data.open_corpus(config), open_tokenizer(files[kind])
    np.testing.assert_array_equal(corpus.token_bytes, tokenizer.token_bytes)
    assert corpus.vocab_size == tokenizer.vocab_size
    wanted = sorted([*tokenizer.encode(text * 20), tokenizer.eos_id] for text in TEXTS[:3])
    got = [
        [int(t) for t in document]
        for split in ("train", "validation")
        for document in corpus.documents(split).as_numpy_iterator()
    ]
    assert sorted(got) == wanted
    batch = next(corpus.train(2))
    starts = (batch["positions"] == 0) & (batch["weights"] > 0)
    assert (batch["tokens"][starts] == tokenizer.start_id).all()
    assert (batch["tokens"][batch["weights"] == 0] == 0).all()
    text = "naïve x"
    assert list(corpus.vocabulary.encode(text)) == tokenizer.encode(text)
    assert corpus.vocabulary.decode(tokenizer.encode(text)) == text


def test_a_registered_task_may_tokenize_in_the_graph(files):
    import tensorflow as tf

    from flm_jax.data import tasks

    vocabulary = tasks.make_vocabulary(open_tokenizer(files["byte-level"]))
    encoded = vocabulary.encode_tf(tf.constant(TEXTS[0]))
    assert list(encoded.numpy()) == vocabulary.encode(TEXTS[0])
    assert vocabulary.decode_tf(encoded).numpy().decode() == TEXTS[0]
    assert vocabulary == tasks.make_vocabulary(open_tokenizer(files["byte-level"]))
    assert vocabulary != tasks.make_vocabulary(open_tokenizer(files["fallback"]))


def test_user_errors_name_the_file(files, tmp_path):
    no_end = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    no_end.decoder = decoders.ByteLevel()
    words = tokenizers.Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "broken.model").write_text("nothing")
    broken_beside = save(byte_level(), tmp_path / "beside")
    (tmp_path / "beside" / "tokenizer_config.json").write_text("{")
    for path, message in (
        (str(tmp_path / "absent"), "no such file exists; give 'bytes', a tokenizer.json"),
        (str(tmp_path), "a folder without tokenizer.json and tokenizer.model"),
        (str(tmp_path / "broken.json"), "not a tokenizer.json"),
        (str(tmp_path / "broken.model"), "not a SentencePiece model"),
        (save(no_end, tmp_path / "no_end"), "no end-of-sequence token: eos_token in tokenizer_c"),
        (
            save(words, tmp_path / "words"),
            r"bytes of its tokens are not known \(its decoder is WordPiece",
        ),
        (broken_beside, "tokenizer_config.json: not JSON"),
    ):
        with pytest.raises(UserError, match=message):
            open_tokenizer(path)
