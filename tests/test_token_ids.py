"""Token ids against the tokenizers' own libraries, over random texts."""

import io
import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from flm_jax import data
from flm_jax.config import DataConfig
from flm_jax.data.tokenizer import open_tokenizer
from flm_jax.errors import UserError

sentencepiece = pytest.importorskip("sentencepiece")

RNG = np.random.default_rng(0)
WORDS = ["".join(RNG.choice(list("abcde"), RNG.integers(1, 8))) for _ in range(200)]
# Repeated characters and spaces give ties; the last ones are rare, or not in the vocabulary.
CHARACTERS = [*"aaabbcde    \n\té1ßµ\u3000\u2028🙂\u2581字\u0301"]


def sentences(count):
    return [" ".join(RNG.choice(WORDS, 12)) for _ in range(count)]


def texts(count, longest=40):
    rng = np.random.default_rng(1)
    return ["".join(rng.choice(CHARACTERS, rng.integers(0, longest))) for _ in range(count)]


def sentencepiece_model(path, kind, ties=False, **options):
    """Trains a model; with `ties` all segmentations of a text into as many pieces score alike."""
    from sentencepiece import sentencepiece_model_pb2

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(300)), model_writer=file, vocab_size=400,
        model_type=kind, hard_vocab_limit=False, byte_fallback=True, minloglevel=2, **options,
    )  # fmt: skip
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(file.getvalue())
    for piece in proto.pieces:
        if ties and piece.type == piece.NORMAL:
            piece.score = -1.0
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(proto.SerializeToString())
    return proto


def unigram_json(proto, path):
    """Writes a unigram SentencePiece model as a tokenizer.json."""
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    made = tokenizers.Tokenizer(
        models.Unigram(vocabulary, unk_id=proto.trainer_spec.unk_id, byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
            normalizers.Strip(),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(path))
    return made


def byte_level(path, **options):
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(sentences(200), trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(str(path))
    return made


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Kind -> the tokenizer's file, and its library's function from a text to ids."""
    root = tmp_path_factory.mktemp("ids")
    found = {}
    for kind, ties in (("bpe", False), ("unigram", False), ("unigram", True)):
        name = f"{kind} with ties" if ties else kind
        path = root / name / "tokenizer.model"
        proto = sentencepiece_model(path, kind, ties)
        found[name] = path, sentencepiece.SentencePieceProcessor(model_file=str(path)).encode
        if kind == "unigram":
            path = root / f"{name} as json" / "tokenizer.json"
            path.parent.mkdir()
            made = unigram_json(proto, path)
            found[f"{name} as json"] = path, lambda text, made=made: made.encode(text).ids
    for name, prefix in (("byte-level", False), ("byte-level with a space", True)):
        path = root / name / "tokenizer.json"
        made = byte_level(path, add_prefix_space=prefix)
        found[name] = path, lambda text, made=made: made.encode(text, add_special_tokens=False).ids
    return found


KINDS = ("bpe", "unigram", "unigram with ties", "unigram as json", "unigram with ties as json",
         "byte-level", "byte-level with a space")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_training_have_the_librarys_ids(libraries, kind, tmp_path):
    path, library = libraries[kind]
    tokenizer = open_tokenizer(str(path))
    wanted = [library(text) for text in texts(300)]
    assert [tokenizer.encode(text) for text in texts(300)] == wanted
    rows = [json.dumps({"text": text}) + "\n" for text in texts(300)]
    (tmp_path / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    config = DataConfig(
        task="jsonl_files", path=str(tmp_path), vocabulary=str(path), sequence_length=64
    )
    corpus = data.open_corpus(config, whole=True)
    documents = corpus.documents("all").as_numpy_iterator()
    got = {tuple(map(int, document[:-1])) for document in documents}
    assert got == {tuple(ids) for ids, text in zip(wanted, texts(300), strict=True) if text}


@pytest.mark.parametrize("kind", ["bpe", "unigram", "unigram as json", "byte-level with a space"])
def test_no_space_is_added_inside_a_text(libraries, kind):
    path, library = libraries[kind]
    tokenizer = open_tokenizer(str(path))
    words = WORDS[:50]
    assert all(tokenizer.decode(tokenizer.encode(word, inside=True)) == word for word in words)
    # Negative control: at the beginning of a text the library adds one.
    assert all(tokenizer.decode(library(word)) == f" {word}" for word in words)
    joined = tokenizer.encode("abc") + tokenizer.encode(" de", inside=True)
    assert tokenizer.decode(joined) == " abc de"


@pytest.mark.parametrize("prepend", [True, False])
def test_a_normalizer_that_prepends_is_off_inside_a_text(tmp_path, prepend):
    """Llama 2's tokenizer.json puts its space in a normalizer."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"\u2581abcde"]
    made = tokenizers.Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    steps = [normalizers.Prepend("\u2581")] * prepend + [normalizers.Replace(" ", "\u2581")]
    made.normalizer = normalizers.Sequence(steps)
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("abé", inside=True)) == "abé"
    assert tokenizer.decode(tokenizer.encode("abé")) == " abé"[not prepend :]
    ids = tokenizer.encode("<s>ab</s>", special=True, inside=True)
    assert (ids[0], ids[-1]) == (1, 2) and tokenizer.decode(ids) == "ab"


def test_control_tokens_of_sentencepiece_are_read_in_templates_alone(tmp_path):
    sentencepiece_model(tmp_path / "t.model", "bpe", control_symbols=["<user>", "<user>2"])
    tokenizer = open_tokenizer(str(tmp_path / "t.model"))
    plain = tokenizer.encode("<user>ab")
    assert tokenizer.decode(plain) == " <user>ab"
    first, *rest = tokenizer.encode("<user>2ab<user>c", special=True, inside=True)
    assert tokenizer.pieces[first] == b"" and tokenizer.decode(rest) == "abc"
    assert first not in plain


@pytest.mark.parametrize("add_bos", [None, False, True])
@pytest.mark.parametrize("add_eos", [None, False, True])
@pytest.mark.parametrize("processor", ["none", "bos", "bos and eos"])
def test_start_and_end_tokens_are_those_of_transformers(tmp_path, add_bos, add_eos, processor):
    transformers = pytest.importorskip("transformers")
    made = byte_level(tmp_path / "tokenizer.json", add_prefix_space=False)
    special = [("<s>", 0), ("</s>", 1)]
    single = {"none": "$A", "bos": "<s> $A", "bos and eos": "<s> $A </s>"}[processor]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    made.enable_truncation(3)
    made.enable_padding(length=32)
    made.save(str(tmp_path / "tokenizer.json"))
    keys = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    values = {key: value for key, value in keys.items() if value is not None}
    named = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | values))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ours = open_tokenizer(str(tmp_path))
    for text in texts(20):
        assert ours.with_special(ours.encode(text)) == theirs(text).input_ids
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)


@pytest.mark.parametrize(
    ("files", "eos", "bos", "stops"),
    [
        ({"config.json": {"eos_token_id": [1, 7]}}, 1, None, (1, 7)),
        ({"config.json": {"eos_token_id": 7, "bos_token_id": 3}}, 7, 3, (7,)),
        ({"generation_config.json": {"eos_token_id": [7, 1]},
          "config.json": {"eos_token_id": 9, "bos_token_id": 3}}, 7, 3, (7, 1)),
        ({"tokenizer_config.json": {"eos_token": "</s>", "bos_token": None},
          "config.json": {"eos_token_id": [7, 9], "bos_token_id": 3}}, 1, None, (1, 7, 9)),
        ({"special_tokens_map.json": {"eos_token": {"content": "</s>"}, "bos_token": "<s>"},
          "config.json": {"eos_token_id": None}}, 1, 0, (1,)),
        ({"config.json": {"text_config": {"eos_token_id": [9, 7]}}}, 9, None, (9, 7)),
        ({"config.json": {"eos_token_id": [100_000, 7]}}, 7, None, (7, 100_000)),
    ],
)  # fmt: skip
def test_end_tokens_come_from_all_files(tmp_path, files, eos, bos, stops):
    byte_level(tmp_path / "tokenizer.json")
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    tokenizer = open_tokenizer(str(tmp_path))
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.stop_ids) == (eos, bos, stops)


@pytest.mark.parametrize("text", ["cut \ud83d", "\ude00 cut"])
def test_half_a_surrogate_pair_is_refused(libraries, text):
    for path in ("bytes", *(str(path) for path, _ in libraries.values())):
        with pytest.raises(UserError, match="half of a surrogate pair, U\\+D") as error:
            open_tokenizer(path).encode(text)
        str(error.value).encode("utf-8")
