"""The adapter to lm-evaluation-harness: compared with direct computation, and whole tasks."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from flm_jax.interop.opening import open_model
from tests import runs
from tests.commands import ROOT, mistake
from tests.models import changed
from tests.runs import nats_of, next_token

pytest.importorskip("lm_eval", reason="needs the extra [hf]")
pytestmark = pytest.mark.slow
TASKS = ROOT / "tests" / "harness_tasks"
SAMPLES = [json.loads(line) for line in (TASKS / "samples.jsonl").read_text().splitlines()]
CONTEXT = 32
# Runs the command; any connection to the network is an error.
OFFLINE = """
import socket, sys
from flm_jax.commands import front
def refuse(self, address, *rest):
    raise AssertionError(f"reached out to {address}")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda *a, **k: refuse(None, a)
front.main()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, _ = runs.save(tmp_path_factory.mktemp("runs") / "run", (runs.BYTES,))
    return folder


def continuation(model, prompt):
    """Returns the greedy continuation: 6 tokens, up to the end token or the end of the line."""
    ids, new = model.prompt(prompt)[-(CONTEXT - 6) :], []
    for _ in range(6):
        new.append(next_token(model.params, model.config, ids + new))
    text = model.tokenizer.decode(new[: new.index(1)] if 1 in new else new)
    return text.split("\n")[0]


@pytest.fixture(scope="module")
def tasks(run, tmp_path_factory):
    """The local tasks; the model generates exactly the first and the last of the three texts."""
    folder = tmp_path_factory.mktemp("tasks")
    shutil.copytree(TASKS, folder, dirs_exist_ok=True)
    model = open_model(run)
    texts = [continuation(model, s["question"]) for s in SAMPLES]
    texts[1] += " not"
    rows = [{**s, "text": text} for s, text in zip(SAMPLES, texts, strict=True)]
    path = folder / "generated.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = folder / "flm_generate.yaml"
    task.write_text(task.read_text().replace("tests/harness_tasks/samples.jsonl", str(path)))
    return folder


@pytest.fixture(scope="module")
def results(run, tasks, tmp_path_factory):
    """The results of three local tasks in one command, without a network."""
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path_factory.mktemp("cache")),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            OFFLINE,
            "harness",
            f"--checkpoint={run}",
            "--tasks=flm_choice,flm_rolling,flm_generate",
            f"--include_path={tasks}",
            "--batch_size=4",
            "--json",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def direct(model, context, continuation):
    """Computes log P(continuation | context) by one forward pass without padding."""
    ids = [0, *model.tokenizer.encode(context), *model.tokenizer.encode(continuation)]
    nats, _ = nats_of(model.params, model.config, ids)
    return -nats[-len(model.tokenizer.encode(continuation)) :].sum()


def test_tasks_give_the_numbers_of_a_direct_computation(run, results):
    model, by_task = open_model(run), results["results"]
    assert results["context"] == CONTEXT
    assert all(task["samples"] == len(SAMPLES) for task in by_task.values())
    right = [
        int(np.argmax([direct(model, s["question"], c) for c in s["choices"]])) == s["answer"]
        for s in SAMPLES
    ]
    assert by_task["flm_choice"]["acc,none"] == pytest.approx(np.mean(right))
    nats = size = 0
    for text in (s["text"] for s in SAMPLES):
        # The prefix token precedes the start token, which is predicted too.
        ids = [0, *model.tokenizer.encode(text)]
        size += len(text.encode())
        for start in range(0, len(ids), CONTEXT):
            # The context is the last token before the window, or the prefix token.
            before = ids[start - 1] if start else 0
            window = ids[start : start + CONTEXT]
            if start + CONTEXT > len(ids) and start:  # the last window is as long as the others
                inputs = ids[len(ids) - CONTEXT - 1 :]
                nats += nats_of(model.params, model.config, inputs)[0][-len(window) :].sum()
            else:
                nats += nats_of(model.params, model.config, [before, *window])[0].sum()
    assert by_task["flm_rolling"]["bits_per_byte,none"] == pytest.approx(
        nats / math.log(2) / size, rel=1e-5
    )
    assert by_task["flm_generate"]["exact_match,none"] == pytest.approx(2 / 3)


def test_answers_of_the_adapter(run):
    from lm_eval.api.instance import Instance

    from flm_jax.inference.harness import Adapter

    model = open_model(run)
    adapter = Adapter(model, CONTEXT, batch_size=2)

    def ask(kind, *arguments):
        instances = [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]
        return getattr(adapter, kind)(instances)

    pairs = [("def f(", "x):"), ("", "start"), ("a ", "b"), (" \n", "c"), ("x" * 60, "end")]
    got = [value for value, _ in ask("loglikelihood", *pairs)]
    split = [("def f(", "x):"), ("", "start"), ("a", " b"), ("", " \nc")]
    np.testing.assert_allclose(got[:4], [direct(model, c, t) for c, t in split], rtol=1e-5)
    # The start of a long context is cut, with its start token: the model reads 32 tokens.
    ids = model.tokenizer.encode("x" * 60 + "end")[-CONTEXT - 1 :]
    cut = -nats_of(model.params, model.config, ids)[0][-3:].sum()
    np.testing.assert_allclose(got[4], cut, rtol=1e-5)
    assert abs(direct(model, "x" * 58, "end") - got[4]) > 1e-4  # negative control: another cut

    settings = {"until": ["\n"], "max_gen_toks": 6}
    prompts = [("def f(", settings), ("import os", settings), ("x" * 80, settings)]
    texts = ask("generate_until", *prompts)
    assert texts == [ask("generate_until", prompt)[0] for prompt in prompts]
    assert texts == [continuation(model, prompt) for prompt, _ in prompts]
    assert len(set(texts)) > 1


def test_mistakes(run):
    command = ("harness", f"--checkpoint={run}")
    assert "--tasks is missing" in mistake(*command)
    assert "the harness has no task 'nonsense'" in mistake(
        *command, "--tasks=nonsense", f"--include_path={TASKS}"
    )


def test_a_model_with_a_padded_vocabulary_is_scored(tmp_path):
    """The model's vocabulary is larger than the tokenizer's."""
    folder, _ = runs.save(tmp_path / "run", (changed(runs.BYTES, vocab_size=320),))
    assert open_model(folder).tokenizer.vocab_size == 259
