"""Opening of models, bits per byte of files, log-likelihoods of continuations, the commands."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import data
from flm_jax.config import DataConfig
from flm_jax.errors import UserError
from flm_jax.inference import evaluation
from flm_jax.inference.likelihood import loglikelihoods
from flm_jax.interop.opening import open_model
from flm_jax.params import sharding
from flm_jax.params.digest import params_digest
from flm_jax.studies import reported
from tests import runs
from tests.commands import ROOT, json_of, mistake
from tests.models import SMALL, changed, random_params
from tests.runs import LONG, full_logits, nats_of

TEXTS = ("def f(x):\n    return 'naïve'\n" * 4, "another one, µ\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two stages, and the parameters of both."""
    models = (runs.BYTES, changed(runs.BYTES, num_layers=3))
    return runs.save(tmp_path_factory.mktemp("runs") / "run", models)


def test_a_model_is_opened_from_a_run_or_a_checkpoint(run):
    folder, params = run
    for path, stage, index in (
        (folder, "", 1),
        (folder, "s0", 0),
        (folder, "0", 0),
        (f"{folder}/stages/0-s0/checkpoints/7", "", 0),
    ):
        model = open_model(path, stage)
        assert params_digest(model.params) == params_digest(params[index])
        assert (model.name, model.context) == (f"s{index}", 32)
        assert model.config.num_layers == 2 + index
        assert model.prompt("a") == [0, 100]


def test_wrong_paths_of_models_are_named(run, tmp_path):
    folder, _ = run
    for path, stage, message in (
        (str(tmp_path), "", "holds no model; give a run's folder"),
        (folder, "s2", r"no finished stage 's2'; it has 0 \(s0\), 1 \(s1\)"),
        (f"{folder}/stages/0-s0/checkpoints/7", "s0", "leave stage and step out"),
        (f"{folder}/stages/0-s0/checkpoints/8", "", "is no checkpoint; give a folder"),
    ):
        with pytest.raises(UserError, match=message):
            open_model(path, stage)
    other, _ = runs.save(tmp_path / "other", (runs.BYTES,))
    config = tmp_path / "other" / "stages" / "0-s0" / "config.json"
    config.write_text(config.read_text().replace('"d_ff": 20', '"d_ff": 21'))
    with pytest.raises(UserError, match=r"params/layers/mlp/down is \[2, 20, 12\], config.json of"):
        open_model(other)


def test_a_file_is_scored_whole(tmp_path):
    """Compares with one forward pass per segment, without padding and packing.

    The last 41 rows of the vocabulary are padding.
    """
    length = 16
    with jax.enable_x64(True):
        config = changed(SMALL, vocab_size=300)
        params = random_params(config, 1)
        for number, text in enumerate(TEXTS):
            (tmp_path / f"{number}.txt").write_text(text)
        settings = DataConfig(task="text_files", path=str(tmp_path), sequence_length=length)
        corpus = data.open_corpus(settings, whole=True)
        mesh = sharding.one_device()
        batches = list(corpus.sequences("all", 4))
        with jax.set_mesh(mesh):
            unpadded = config.with_tokens(corpus.vocab_size)
            got = evaluation.score(params, unpadded, batches, corpus.token_bytes, mesh)
        size = sum(len(text.encode()) for text in TEXTS)
        assert (got.bytes, got.tokens) == (size, size + len(TEXTS))
        stream = [[byte + 3 for byte in text.encode()] + [1] for text in TEXTS]
        want, padded, place = 0.0, 0.0, 0
        for document in stream:
            while document:
                room = length - place % length
                tokens = [0, *document[:room]]
                want += nats_of(params, config, tokens, corpus.vocab_size)[0].sum()
                padded += nats_of(params, config, tokens)[0].sum()
                place += len(document[:room])
                document = document[room:]
        np.testing.assert_allclose(got.nats, want, rtol=1e-12)
        np.testing.assert_allclose(got.bits_per_byte, want / math.log(2) / size, rtol=1e-12)
        assert abs(padded / want - 1) > 1e-3  # negative control: padding in the softmax
        # Negative control: documents that attend to each other have another score.
        for batch in batches:
            batch["segment_ids"] = np.minimum(batch["segment_ids"], 1)
        with jax.set_mesh(mesh):
            control = evaluation.score(params, unpadded, batches, corpus.token_bytes, mesh)
        assert abs(control.nats / want - 1) > 1e-6


def test_log_likelihoods_equal_single_forward_passes():
    with jax.enable_x64(True):
        config = changed(SMALL, vocab_size=40)
        params = random_params(config, 2)
        rng = np.random.default_rng(0)
        pairs = [
            ([int(t) for t in rng.integers(0, 40, a)], [int(t) for t in rng.integers(0, 40, b)])
            for a, b in ((1, 1), (5, 9), (30, 2), (2, 40), (7, 0), (12, 3), (1, 20))
        ]
        # The continuation of this pair is the model's most likely token.
        first = full_logits(params, jnp.asarray([[3] + [0] * (LONG - 1)], jnp.int32), config)
        pairs.append(([3], [int(first[0, 0].argmax())]))
        got = loglikelihoods(params, config, pairs, batch_size=3)
        for (context, continuation), (value, greedy) in zip(pairs, got, strict=True):
            nats, _ = nats_of(params, config, [*context, *continuation])
            _, all_greedy = nats_of(params, config, [*context, *continuation])
            scored = nats[len(context) - 1 :]
            np.testing.assert_allclose(value, -scored.sum(), atol=1e-11)
            if len(context) == 1:
                assert greedy == all_greedy
        assert got[4] == (0.0, True)
        assert got[-1][1]
        assert not got[1][1]
        with pytest.raises(UserError, match="pair 0 has no context"):
            loglikelihoods(params, config, [([], [1])])


def test_the_papers_averages_follow_from_their_rows():
    model = "Tele-FLM-52B"

    def average(group, count):
        rows = [b for b in reported.benchmarks() if b.group == group and "average" not in b.name]
        assert len(rows) == count
        return sum(b.scores[model] for b in rows) / count

    stated = {b.group: b.scores[model] for b in reported.benchmarks() if "average of" in b.name}
    assert average("English", 8) == pytest.approx(stated["English"], abs=0.006)
    assert average("Chinese", 5) == pytest.approx(stated["Chinese"], abs=0.006)


def test_every_reported_score_has_a_source():
    file = json.loads((ROOT / "flm_jax/studies/reported.json").read_text(encoding="utf-8"))
    assert {b.source for b in reported.benchmarks()} == set(file["sources"])


def test_own_scores_are_listed_next_to_the_papers():
    results = {"arc_challenge": {"samples": 3, "acc,none": 0.2, "acc_norm,none": 0.25}}
    own = {b.name: reported.own_score(b, results) for b in reported.benchmarks()}
    assert own["ARC"] == 25.0
    assert own["GSM8K"] is None


@pytest.mark.slow
def test_the_commands(run, tmp_path):
    folder, _ = run
    text = tmp_path / "text.txt"
    text.write_text(TEXTS[0])
    got = json_of("evaluate", f"--checkpoint={folder}", f"--data={text}")
    assert got["bytes"] == text.stat().st_size
    assert got["tokens"] == got["bytes"] + 1
    assert got["bits_per_byte"] * math.log(2) * got["bytes"] == pytest.approx(
        got["loss"] * got["tokens"]
    )
    generate = ("generate", f"--checkpoint={folder}", "--stage=s0")
    flags = ("--prompt=def", "--prompt=x", "--max_new_tokens=9", "--temperature=1", "--seed=3")
    completions = json_of(*generate, *flags)["completions"]
    assert [c["prompt"] for c in completions] == ["def", "x"]
    assert completions == json_of(*generate, *flags)["completions"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def"}\n"x"\n')
    again = json_of(*generate, f"--prompts={prompts}", *flags[2:])["completions"]
    assert again == completions
    for arguments, message in (
        (("--prompt=a", "--max_new_tokens=31"), "prompt 0 has 2 tokens, with max_new_tokens 31"),
        (("--prompt=a", "--top_p=0"), "top_p is 0"),
        ((), "no prompt; give --prompt=TEXT"),
        ((f"--prompts={tmp_path}/absent",), "give a text file"),
    ):
        assert message in mistake(*generate, *arguments)
    empty = tmp_path / "empty.txt"
    empty.touch()
    evaluate_ = ("evaluate", f"--checkpoint={folder}")
    assert "holds no text" in mistake(*evaluate_, f"--data={empty}")
    assert "give either --data=FILE or --task=NAME" in mistake(*evaluate_)

    results = tmp_path / "results.json"
    results.write_text('{"results": {"mmlu": {"acc,none": 0.5}}}')
    rows = json_of("reported", f"--results={results}")["benchmarks"]
    assert [r["own"] for r in rows if r["name"] == "MMLU"] == [50.0]
    results.write_text("[]")
    assert "is not what flm harness" in mistake("reported", f"--results={results}")
    timed = json_of("benchmark", "generate", "--config=configs/demo.py:smoke", "--new_tokens=3")
    assert timed["cached_tokens_per_s"] / timed["uncached_tokens_per_s"] == timed["ratio"]
    talk = json_of(*generate, "--chat", "--prompt=hello", "--max_new_tokens=4")
    assert talk["completions"][0]["prompt"] == "hello"
