"""Whole runs by the commands: stopped, killed, resumed bit-identically; mistakes are refused."""

import itertools
import json
import pathlib
import shutil
import signal
import time

import pytest
from ml_collections.config_flags import config_path
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from flm_jax.commands import config_files
from flm_jax.errors import Exit, UserError
from flm_jax.runs import chain
from flm_jax.store.files import MetricsFile
from tests.commands import call, json_of, mistake, run, start, wait_for
from tests.runs import lineage

SMOKE = ("train", "--config=configs/demo.py:smoke")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was not interrupted."""
    workdir = tmp_path_factory.mktemp("run") / "uninterrupted"
    status, _, err = run(*SMOKE, f"--workdir={workdir}")
    assert status == 0, err
    return workdir


KINDS = ("png", "svg", "csv")  # of each figure


def test_the_run_folder_keeps_its_contract(finished):
    data = json.loads((finished / "lineage.json").read_text())
    assert data["version"] == 1 and len(data["stages"]) == 3
    for index, stage in enumerate(data["stages"]):
        folder = finished / "stages" / f"{index}-{stage['name']}"
        assert stage["index"] == index
        assert stage["parent"] == (data["stages"][index - 1]["name"] if index else None)
        assert (finished / stage["checkpoint"]).is_dir()
        assert not pathlib.Path(stage["checkpoint"]).is_absolute()
        assert stage["tokens"] > 0 and stage["flops"] > 0 and stage["wall_s"] > 0
        assert (folder / "config.json").is_file()
        receipt = stage["receipt"]
        assert (receipt is None) == (index == 0)
        if receipt:
            assert json.loads((folder / "receipt.json").read_text()) == receipt
            assert (folder / "plan.json").is_file()
            assert receipt["exactness"] == "EXACT" and receipt["operator"] == "msg"
            assert abs(receipt["loss_after"] - receipt["loss_before"]) <= 1e-5
            assert receipt["max_abs_logit_diff"] <= 1e-4 * receipt["logit_scale"]
            assert receipt["dead_slots"] == receipt["locked_copies"] == 0
            before = data["stages"][index - 1]["eval"]["bpb_end"]
            assert abs(stage["eval"]["bpb_start"] - before) < 1e-4
    ends = [s["eval"]["bpb_end"] for s in data["stages"]]
    assert ends == sorted(ends, reverse=True)
    assert {p.name for p in (finished / "report").iterdir()} == {
        "report.md",
        *(f"{name}.{kind}" for name in ("curve", "ramp", "distances") for kind in KINDS),
    }


def test_curves_have_groups_and_both_values_at_a_growth(finished):
    board = EventAccumulator(str(finished / "tensorboard"), {"tensors": 0}).Reload()
    tags = {
        tag: board.SummaryMetadata(tag).plugin_data.plugin_name for tag in board.Tags()["tensors"]
    }
    assert {tag for tag, kind in tags.items() if kind == "scalars"} == {
        *(
            f"train/{name}"
            for name in ("loss", "grad_norm", "learning_rate", "mask", "tokens_per_s")
        ),
        *("eval/bits_per_byte", "growth/bits_per_byte_before", "growth/bits_per_byte_after"),
    }
    evals = [event.step for event in board.Tensors("eval/bits_per_byte")]
    stages, start = lineage(finished), 0
    for before, after in itertools.pairwise(stages):
        start += before["steps"]
        for name, want in (
            ("eval/bits_per_byte", before["eval"]["bpb_end"]),
            ("growth/bits_per_byte_before", before["eval"]["bpb_end"]),
            ("growth/bits_per_byte_after", after["eval"]["bpb_start"]),
        ):
            (value,) = [
                make_ndarray(e.tensor_proto) for e in board.Tensors(name) if e.step == start
            ]
            assert abs(value - want) < 1e-5
    assert len(evals) == len(set(evals))  # no step has two values
    texts = {tag for tag, kind in tags.items() if kind == "text"}
    assert texts == {"config", "growth", "report"}


def test_a_second_call_reports_completion_and_changes_nothing(finished):
    before = (finished / "lineage.json").read_bytes()
    start_time = time.monotonic()
    status, out, _ = run(*SMOKE, f"--workdir={finished}")
    assert status == 0 and "the run is complete" in out
    assert time.monotonic() - start_time < 60
    assert (finished / "lineage.json").read_bytes() == before


@pytest.mark.slow
def test_a_run_killed_and_stopped_anywhere_resumes_bit_identically(finished, tmp_path):
    workdir = tmp_path / "interrupted"
    (workdir / "stages").mkdir(parents=True)
    # The compiled programs are copied, so restarts are fast. The test is about the state.
    shutil.copytree(finished / "compiled", workdir / "compiled")
    interruptions = [
        ("stages/0-small/checkpoints/20", signal.SIGKILL),  # in the middle of a stage
        ("stages/1-medium/plan.json", signal.SIGKILL),  # in the middle of a growth
        ("stages/1-medium/checkpoints/40", signal.SIGKILL),  # grown, without its receipt
        ("stages/1-medium/checkpoints/50", signal.SIGTERM),  # a request to stop, during a ramp
        ("stages/2-large/metrics.jsonl", signal.SIGKILL),  # just after a growth
        ("stages/2-large/checkpoints/84*", signal.SIGKILL),  # while a checkpoint is written
    ]
    for pattern, number in interruptions:
        process = start(*SMOKE, f"--workdir={workdir}")
        wait_for(pattern, workdir, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        if number == signal.SIGTERM:
            assert process.returncode == 128 + signal.SIGTERM
            assert "SIGTERM: stopped at step" in err.strip().splitlines()[-1]
        else:
            assert process.returncode == -signal.SIGKILL
    status, _, err = run(*SMOKE, f"--workdir={workdir}")
    assert status == 0, err
    for a, b in zip(lineage(workdir), lineage(finished), strict=True):
        assert a["params_digest"] == b["params_digest"], a["name"]
        assert a["eval"] == b["eval"] and a["plan_digest"] == b["plan_digest"]
        assert a["receipt"] == b["receipt"] and a["gradient_reduction"] == "float32"


@pytest.mark.slow
def test_another_seed_gives_another_digest(finished, tmp_path):
    """Negative control of the test above: the digest depends on the parameters."""
    args = ("--config.seed=1", "--config.stages[0].steps=20", f"--workdir={tmp_path / 'run'}")
    process = start(*SMOKE, *args)
    wait_for("lineage.json", tmp_path / "run", process)
    process.kill()
    process.communicate()
    digest = lineage(tmp_path / "run")[0]["params_digest"]
    assert digest != lineage(finished)[0]["params_digest"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.stages[2].learning_rate=0.5", ("learning_rate", "0.0004", "0.5")),
        ("--config.data.seed=3", ("data.seed", "0 -> 3")),
        ("--config.stages[1].name=middle", ("medium", "middle")),
    ],
)
def test_a_changed_config_is_refused_on_resume(finished, override, words):
    before = (finished / "lineage.json").read_bytes()
    line = mistake(*SMOKE, f"--workdir={finished}", override, by=run)
    assert all(word in line for word in (*words, "--workdir")), line
    assert (finished / "lineage.json").read_bytes() == before


@pytest.mark.slow
def test_accumulate_may_change_on_resume(finished, tmp_path):
    """The last stage resumes before its end, in two microbatches; the result is nearly the same."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    data = json.loads((workdir / "lineage.json").read_text())
    *_, last = data["stages"]
    (workdir / "lineage.json").write_text(json.dumps({**data, "stages": data["stages"][:2]}))
    end = workdir / last["checkpoint"]
    shutil.rmtree(end)
    (latest,) = (path for path in end.parent.iterdir() if path.name.isdigit())
    status, _, err = run(*SMOKE, "--config.stages[2].accumulate=2", f"--workdir={workdir}")
    assert status == 0, err
    again = lineage(workdir)[-1]
    assert abs(again["eval"]["bpb_end"] / last["eval"]["bpb_end"] - 1) < 1e-4
    stage = workdir / "stages" / f"2-{last['name']}"
    (row,) = MetricsFile(stage / "metrics.jsonl").rows("changed")
    assert row["step"] == int(latest.name)
    assert row["settings"] == ["config.stage.accumulate: 1 -> 2"]
    assert json.loads((stage / "config.json").read_text())["stage"]["accumulate"] == 2
    # Negative control: a finished stage's other settings are still compared.
    line = mistake(*SMOKE, "--config.stages[2].batch_size=4", f"--workdir={workdir}", by=run)
    assert "batch_size: " in line and " -> 4" in line


@pytest.mark.slow
def test_changed_data_is_refused_on_resume(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(30):
        (texts / f"{i}.txt").write_text(f"the {i}th text, and some words of its own\n" * 20)
    args = ("--config.data.task=text_files", f"--config.data.path={texts}")
    workdir = tmp_path / "run"
    process = start(*SMOKE, *args, f"--workdir={workdir}")
    wait_for("stages/0-small/config.json", workdir, process)
    process.kill()
    process.communicate()
    (texts / "3.txt").write_text("changed\n")
    status, _, err = run(*SMOKE, *args, f"--workdir={workdir}")
    taken_over, *_, line = err.splitlines()  # between them, how long the data took to open
    assert status == 2 and "takes it over" in taken_over
    assert "data_fingerprint" in line and "->" in line


def test_mistakes_are_refused_before_anything_is_written(tmp_path):
    new = tmp_path / "new"
    cases = [
        (
            {"stages[1].model.d_model": 16, "stages[1].model.mup_base_width": 16},
            ("'embed' from 32 to 16",),
        ),
        (
            {"stages[1].model.num_heads": 5, "stages[1].model.num_kv_heads": 2},
            ("num_heads is 5", "num_kv_heads 2"),
        ),
        ({"stages[1].growth.recipe": "magic"}, ("'magic'", "msg")),
        ({"stages[1].growth.ramp_steps": 999}, ("ramp_steps is 999", "steps 24")),
        ({"mesh.data": 3}, ("data 3", "devices")),
    ]
    for changes, words in cases:
        line = refusal(new, changes)
        assert all(word in line for word in words), line
        assert not new.exists()

    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(tmp_path / "file" / "run")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    assert "holds files but no run" in refusal(other)
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]

    empty = tmp_path / "empty"
    empty.mkdir()
    texts = {"data.task": "text_files", "data.path": str(empty)}
    assert str(empty) in refusal(new, texts)
    (empty / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert "latin.txt" in refusal(new, texts)
    line = refusal(new, {f"stages[{i}].model.vocab_size": 100 for i in range(3)})
    assert "vocab_size" in line and "100" in line
    assert not list(new.iterdir())


def refusal(workdir, changes=()):
    """Returns the error of a chain with these changes, in this process."""
    config = config_files.shipped("demo").get_config("smoke")
    config.quick_compile = False  # the tests set it already (tests/conftest.py)
    for stage in config.stages:
        stage.batch_size = 8  # the number of devices
    for field, value in dict(changes).items():
        config_path.set_value(field, config, value)
    with pytest.raises(UserError) as raised:
        chain.run(config_files.experiment(config), str(workdir))
    return str(raised.value)


def test_a_mistake_is_one_line(tmp_path):
    assert "--workdir is missing" in mistake(*SMOKE)
    eight = [f"--config.stages[{n}].batch_size=8" for n in range(3)]  # the number of devices
    args = (f"--workdir={tmp_path / 'new'}", "--config.stages[1].growth.recipe=magic")
    assert "'magic'" in mistake(*SMOKE, *args, *eight)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path):
    args = ("--config.stages[0].learning_rate=1e30", "--config.stages[0].matrix_learning_rate=1e30")
    line = mistake_after_progress(*SMOKE, *args, f"--workdir={tmp_path / 'run'}")
    assert "is nan at step" in line and "last good checkpoint is none" in line


def mistake_after_progress(*args):
    status, _, err = run(*args)
    assert status == Exit.NUMERICS and "Traceback" not in err
    return err.strip().splitlines()[-1]


def test_inspect_prints_and_compares(finished):
    status, out, _ = call("inspect", str(finished), "--compare=0,large")
    assert status == 0
    assert "grown by msg (EXACT)" in out and "config.stage.model.d_model: 32 -> 80" in out
    printed = json_of("inspect", str(finished))
    assert [s["name"] for s in printed["stages"]] == ["small", "medium", "large"]
    assert "no finished stage '7'" in mistake("inspect", str(finished), "--compare=0,7")
    assert "no lineage.json" in mistake("inspect", str(finished.parent))


@pytest.mark.slow
def test_benchmark_has_its_keys():
    result = json_of("benchmark", "step", "--config=configs/demo.py:smoke", "--steps=2", by=run)
    keys = {
        "tokens_per_s",
        "step_s",
        "compile_s",
        "model_flops_per_s",
        "matmul_peak_flops_per_s",
        "utilisation",
        "peak_bytes",
    }
    assert keys <= result.keys() and keys == result["masked"].keys()
    assert 0 < result["utilisation"] < 1


def test_metrics_are_rewound_and_an_incomplete_line_is_ignored(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        metrics.append("train", step, loss=1.0, mask=1.0)
        metrics.append("eval", step, bpb=2.0)
    with open(metrics.path, "a") as file:
        file.write('{"kind": "train", "st')
    assert len(metrics.rows()) == 6
    metrics.rewind(20)
    assert [r["step"] for r in metrics.rows("eval")] == [10, 20]
    metrics.append("eval", 30, bpb=1.0)
    assert [r["bpb"] for r in metrics.rows("eval")] == [2.0, 2.0, 1.0]
