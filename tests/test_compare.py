"""The comparison of two models: differences, gates, exit statuses."""

import dataclasses
import json
import shlex
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax.config import DataConfig, ExperimentConfig, StageConfig
from flm_jax.errors import UserError
from flm_jax.sft import chats, comparison, scoring, synthetic
from flm_jax.sft.chats import Check, Message, Sample
from flm_jax.sft.comparison import Gate
from flm_jax.sft.scoring import ResponseLoss, Scored
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.store.files import write_json
from flm_jax.store.lineage import RunFolder, identity
from flm_jax.train.train_step import TrainState
from tests.commands import call, mistake
from tests.models import SMALL, changed, random_params
from tests.runs import entry


def scored(right, nats, category="c"):
    samples = [
        Sample(
            (Message("user", str(n)), Message("assistant", "x")),
            category,
            str(n),
            None if r is None else Check("exact", "x"),
        )
        for n, r in enumerate(right)
    ]
    return [
        Scored(s, ResponseLoss(float(n), 2, 1), "x", r)
        for s, r, n in zip(samples, right, nats, strict=True)
    ]


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(1, 20, 80)  # each sample's difficulty, the same for both models
    one = scored([True] * 40 + [False] * 40, difficulty)
    two = scored([True] * 36 + [False] * 44, difficulty + rng.uniform(0.1, 0.2, 80))
    total = comparison.compare(one, two)["all"]
    assert total["accuracy"]["difference"] == pytest.approx(-0.05)
    assert total["accuracy"]["low"] <= -0.05 <= total["accuracy"]["high"]
    # A small rise of the loss is significant, although each model's own interval is wide.
    alone = scoring.summarise(one)["all"]["loss"]
    assert alone.high - alone.low > 1 and total["loss"]["low"] > 0
    assert total["loss"]["high"] - total["loss"]["low"] < 0.05
    # Negative control: without pairs the rise is not significant.
    permuted = rng.permutation(np.array(two, dtype=object))
    shuffled = [dataclasses.replace(s, sample=o.sample) for s, o in zip(permuted, one, strict=True)]
    assert comparison.compare(one, shuffled)["all"]["loss"]["low"] < 0
    same = comparison.compare(one, one)["all"]
    assert all(row[k] == 0 for row in same.values() for k in ("difference", "low", "high"))


def test_gates_know_which_direction_is_worse():
    difference = comparison.compare(
        scored([True] * 10, [1] * 10), scored([True] * 9 + [False], [2] * 10)
    )
    difference["retention"] = {"bpb": comparison.retained(1.5, 1.52)}

    def failure(text):
        return Gate.parse(text).failure(difference)

    assert failure("c/accuracy:0.05") == (
        "c/accuracy went from 1.0000 to 0.9000, worse by 0.1000; the margin is 0.05"
    )
    assert failure("c/accuracy:0.2") == ""
    assert "worse by 0.5000" in failure("all/loss:0.4") and not failure("all/loss:0.5")
    assert failure("retention/bpb:0.01") and not failure("retention/bpb:0.03")
    # No gate fails if everything is better.
    better = comparison.compare(scored([False] * 2, [2, 2]), scored([True] * 2, [1, 1]))
    assert not any(Gate("all", m, 0.0).failure(better) for m in comparison.METRICS)
    # NaN does not pass.
    broken = comparison.compare(scored([None], [1]), scored([None], [float("nan")]))
    assert Gate("all", "loss", 5.0).failure(broken)


def test_gates_that_would_always_pass_are_refused():
    for text in ("accuracy:0.1", "c/accuracy", "c/f1:0.1", "c/accuracy:-1", "c/accuracy:nan"):
        with pytest.raises(UserError, match="write category/metric:margin"):
            Gate.parse(text)
    available = comparison.metrics_of({"lists": True, "describe": False})
    Gate.parse("a/b/accuracy:0.1")
    for text in ("lists/accuracy:0", "all/accuracy:0", "describe/bpb:0", "retention/bpb:0"):
        Gate.parse(text).check(available)
    for text in ("describe/accuracy:0", "poems/bpb:0", "retention/accuracy:0"):
        with pytest.raises(UserError, match="not measured here; choose one of lists/accuracy"):
            Gate.parse(text).check(available)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two untrained stages, with its own text: `one`, and `two`, which is worse."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text"
    text.mkdir()
    for n in range(4):
        (text / f"{n}.txt").write_text(f"some text, number {n}. " * 40)
    model = changed(SMALL, vocab_size=384, dtype="float32")
    stages = tuple(StageConfig(name, model, 100, 1, 1e-3, 1e-3) for name in ("one", "two"))
    data = DataConfig(task="text_files", path=str(text), sequence_length=64)
    experiment = ExperimentConfig(stages, data)
    run_folder = RunFolder(folder / "run")
    entries = []
    for index, stage in enumerate(stages):
        stage_folder = run_folder.stage(index, stage.name)
        write_json(stage_folder.config, identity(experiment, index, "none"))
        checkpoints = Checkpoints(stage_folder.checkpoints)
        params = random_params(model, 0)
        params["head"] = params["head"] * (1 + 4 * index)  # `two` is more confident in its guesses
        checkpoints.save(1, TrainState(jnp.zeros((), jnp.int32), params, ()), {})
        checkpoints.wait()
        checkpoints.close()
        entries.append(entry(index, stage.name, step=1))
    write_json(run_folder.lineage, {"version": 1, "stages": entries})
    return run_folder.path


COMMAND = ("compare", "--retention_sequences=4", "--max_new_tokens=8")


@pytest.mark.slow
def test_the_command_gates_a_release(workdir, tmp_path):
    path, out_path = tmp_path / "held_out.jsonl", tmp_path / "out"
    samples = synthetic.make(0, 2, "evaluation", ["lists", "describe"])
    chats.write_jsonl(path, [*samples, Sample((Message("user", "never answered"),))])
    code = "import json; print(json.dumps({'winner': 'tie'}))"
    judge = shlex.join([sys.executable, "-I", "-S", "-c", code])
    status, out, err = call(
        *COMMAND,
        f"{workdir}:one",
        f"{workdir}:two",
        f"--samples={path}",
        "--json",
        f"--judge={judge}",
        f"--output={out_path}",
        "--fail_if=all/loss:0.5",
        "--fail_if=all/accuracy:0.5",
    )
    # One of the two gates fails and prints one line; the JSON object is printed too.
    assert status == 3
    lines = [line for line in err.splitlines() if line.startswith("flm compare: ")]
    assert len(lines) == 1 and "all/loss went from" in lines[0] and "accuracy" not in lines[0]
    result = json.loads(out)
    assert len(result["failed"]) == 1 and set(result["difference"]) == {
        "lists",
        "describe",
        "all",
        "retention",
    }
    assert result["a"]["scores"]["lists"]["accuracy_n"] == 2
    assert result["samples"] == {"scored": 4, "without_answer": 1}
    assert 5 < result["retention"]["bpb_a"] < result["retention"]["bpb_b"]
    assert result["judge"]["categories"]["all"]["win_rate"] == 0.5
    assert json.loads((out_path / "compare.json").read_text()) == result
    answers = [json.loads(line) for line in (out_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4
    # Each pair gives two questions. With equal answers both are the same, and it is asked once.
    questions = sum(1 if row["answer_a"] == row["answer_b"] else 2 for row in answers)
    assert (out_path / "verdicts.jsonl").read_text().count("\n") == questions


@pytest.mark.slow
def test_mistakes_are_one_line(workdir):
    model = str(workdir)
    assert "not measured here" in mistake(*COMMAND, model, model, "--fail_if=poems/bpb:1")
    assert "no finished stage 'three'" in mistake(*COMMAND, f"{workdir}:three", model)
