"""The adapter against lm-evaluation-harness's own model for Hugging Face files, on one task."""

import itertools
import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from flm_jax import data, interop
from flm_jax.config import DataConfig
from flm_jax.data.tokenizer import open_tokenizer
from flm_jax.interop.opening import open_model
from tests import runs
from tests.commands import ROOT
from tests.models import SMALL, changed, random_params

for package in ("lm_eval", "torch", "accelerate"):
    pytest.importorskip(package, reason="needs the extra [hf]")
pytestmark = pytest.mark.slow
CONTEXT = 24
END, BEGIN = "<|endoftext|>", "<|begin|>"
NAMES = {"eos_token": END, "bos_token": BEGIN}
# Texts shorter than the context, longer, exactly as long, and with names of special tokens.
TEXTS = (
    "def f(x):\n    return x  # naïve\n",
    "import os, and then a text that is much longer than a context of this many tokens. " * 3,
    "µ",
    "".join(chr(97 + i % 26) for i in range(CONTEXT)),
    f"one {END} in the text, and one at its end{END}",
    f"{BEGIN}a text that begins itself",
    " ",
)
# Before and after every text, and the names in tokenizer_config.json.
KINDS = {
    "no start": ("", "", {"eos_token": END}),
    "a named start that is not added": ("", "", NAMES),
    "a start": (BEGIN, "", NAMES),
    "a start without a name": (BEGIN, "", {"eos_token": END}),
    "the end token as start": (END, "", {"eos_token": END, "bos_token": END}),
    "a start and an end": (BEGIN, END, NAMES),
    "two starts": (f"{BEGIN} {END}", "", NAMES),
}


def save_bpe(folder, before, after, names):
    """Saves a byte-level tokenizer that adds special tokens, and limits and pads every text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[END, BEGIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=[(END, 0), (BEGIN, 1)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return str(folder)


def adapters(model, exported):
    """Returns this library's adapter for a model, and the harness's own for an exported folder."""
    from lm_eval.models.huggingface import HFLM

    from flm_jax.inference.harness import Adapter

    return (
        Adapter(open_model(str(model)), CONTEXT, batch_size=3),
        HFLM(str(exported), device="cpu", batch_size=3, dtype="float32"),
    )


def asked(adapter, kind, *arguments):
    from lm_eval.api.instance import Instance

    requests = [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]
    return getattr(adapter, kind)(requests, disable_tqdm=True)


def rolling(adapter):
    return np.array(asked(adapter, "loglikelihood_rolling", *((text,) for text in TEXTS)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function: kind of tokenizer -> a random model's folder.

    The vocabulary has one row of padding, with which the harness's own model pads its batches. That
    model may also draw it, and this library does not; with these parameters it is never drawn.
    """
    root, folders = tmp_path_factory.mktemp("exported"), {}

    def get(kind):
        if kind not in folders:
            vocabulary = save_bpe(root / f"{len(folders)} tokenizer", *KINDS[kind])
            folders[kind] = root / str(len(folders))
            size = open_tokenizer(vocabulary).vocab_size
            config = changed(SMALL, vocab_size=size + 1, dtype="float32")
            params = random_params(config, 0)
            interop.save_hf(
                folders[kind], params, config, "llama", vocabulary=vocabulary, context=CONTEXT
            )
        return folders[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_rolling_log_likelihoods_equal_the_harnesss_own(kind, exported, monkeypatch):
    ours, theirs = adapters(exported(kind), exported(kind))
    assert ours.max_length == theirs.max_length == CONTEXT
    assert ours.prefix_token_id == theirs.prefix_token_id
    want = rolling(theirs)
    np.testing.assert_allclose(rolling(ours), want, rtol=1e-6)
    # Negative controls: another prefix token, another context.
    with monkeypatch.context() as patch:
        patch.setattr(type(ours), "prefix_token_id", 77)
        assert (abs(rolling(ours) / want - 1) > 1e-5).all()
    ours.max_length -= 1
    assert abs(rolling(ours) / want - 1).max() > 1e-4


@pytest.mark.parametrize("kind", ["no start", "a named start that is not added", "a start"])
def test_other_requests_equal_the_harnesss_own(kind, exported):
    ours, theirs = adapters(exported(kind), exported(kind))
    pairs = [*itertools.pairwise(TEXTS[:4]), ("", "def"), (f"{BEGIN}a", "\n"), ("a ", f"b{END}")]
    pairs = [(context, text[:20]) for context, text in pairs]
    got, want = (asked(adapter, "loglikelihood", *pairs) for adapter in (ours, theirs))
    np.testing.assert_allclose(*([nats for nats, _ in x] for x in (got, want)), rtol=1e-6)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    settings = {"until": ["zz"], "max_gen_toks": 9}
    prompts = [(text, settings) for text in TEXTS if not text.startswith(BEGIN)]
    texts = asked(ours, "generate_until", *prompts)
    assert texts == asked(theirs, "generate_until", *prompts) and len(set(texts)) > 3


def test_a_whole_task_has_the_same_figures(exported, tmp_path):
    from flm_jax.inference import harness

    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    task = (ROOT / "tests/harness_tasks/flm_rolling.yaml").read_text()
    task = task.replace("tests/harness_tasks/samples.jsonl", str(tmp_path / "texts.jsonl"))
    task += "  - metric: byte_perplexity\n  - metric: word_perplexity\n"
    (tmp_path / "flm_rolling.yaml").write_text(task)
    ours, theirs = adapters(exported("a start"), exported("a start"))
    theirs.chats = False  # what `run` asks of this library's adapter
    got, want = (
        harness.run(adapter, ["flm_rolling"], str(tmp_path))["flm_rolling"]
        for adapter in (ours, theirs)
    )
    assert got["samples"] == len(TEXTS)
    for metric in ("bits_per_byte,none", "byte_perplexity,none", "word_perplexity,none"):
        assert got[metric] == pytest.approx(want[metric], rel=1e-5), metric


def run_and_export(folder, vocabulary):
    """Returns the folders of a random run and of its export."""
    config = DataConfig(vocabulary=vocabulary, sequence_length=CONTEXT)
    size = open_tokenizer(vocabulary).vocab_size
    run, _ = runs.save(folder / "run", (changed(SMALL, vocab_size=size, dtype="float32"),), config)
    interop.convert(run, str(folder / "exported"), "llama")
    return run, folder / "exported"


@pytest.mark.parametrize("vocabulary", ["bytes", "sentencepiece"])
def test_a_run_and_its_export_have_the_same_figures(vocabulary, tmp_path):
    """The exported tokenizer begins every text as the run's training does."""
    if vocabulary == "sentencepiece":
        (tmp_path / "documents").mkdir()
        for number, text in enumerate(TEXTS):
            (tmp_path / "documents" / f"{number}.txt").write_text(text * 20)
        vocabulary = str(tmp_path / "tokenizer.model")
        documents = DataConfig(task="text_files", path=str(tmp_path / "documents"))
        data.train_sentencepiece(documents, 300, vocabulary)
    run, exported = run_and_export(tmp_path, vocabulary)
    pairs = [("def f(", "x):"), ("", "start"), ("a ", "b")]
    (ours, theirs), (again, _) = adapters(run, exported), adapters(exported, exported)
    want = rolling(theirs), [nats for nats, _ in asked(theirs, "loglikelihood", *pairs)]
    for adapter in (ours, again):
        assert adapter.prefix_token_id == theirs.prefix_token_id == 0
        np.testing.assert_allclose(rolling(adapter), want[0], rtol=1e-6)
        got = [nats for nats, _ in asked(adapter, "loglikelihood", *pairs)]
        np.testing.assert_allclose(got, want[1], rtol=1e-6)


def test_a_run_with_another_librarys_tokenizer_has_the_rolling_figure_of_its_export(tmp_path):
    vocabulary = save_bpe(tmp_path / "tokenizer", *KINDS["a named start that is not added"])
    ours, theirs = adapters(*run_and_export(tmp_path, vocabulary))
    np.testing.assert_allclose(rolling(ours), rolling(theirs), rtol=1e-6)
