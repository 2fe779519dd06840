"""Sweeps and comparisons of runs."""

import csv
import dataclasses
import json

import pytest

from flm_jax.errors import NumericsError, UserError
from flm_jax.runs import comparison
from flm_jax.store import experiment_file
from flm_jax.store.lineage import RunFolder
from flm_jax.studies import sweep
from tests import runs
from tests.commands import call, json_of, mistake
from tests.experiment_runs import experiment
from tests.runs import BYTES


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["seed"], "give FIELD=VALUE,VALUE"),
        (["seed=0,,1"], "give FIELD=VALUE,VALUE"),
        (["seed=0,1,0"], "value '0' of seed is given twice"),
        (["seed=0", "config.seed=1"], "field seed is given twice"),
        ([], "sweep is missing"),
    ],
)
def test_a_wrong_sweep_is_one_line(given, words):
    with pytest.raises(UserError) as refused:
        sweep.parse(given)
    assert words in str(refused.value)


def test_names_become_folders():
    fields = sweep.parse(["data.path=my text.txt;my-text.txt", "seed=0,1"])
    listed = sweep.trials(fields, lambda values: lambda: values)
    assert [t.name for t in listed][:2] == ["path=my text.txt seed=0", "path=my text.txt seed=1"]
    folders = [t.folder for t in listed]
    assert folders[0].startswith("path-my_text.txt_seed-0")
    assert len(set(folders)) == len(listed) == 4 and not any(set(" =/,;") & set(f) for f in folders)
    long = sweep.trials({"data.path": ["a" * 200, "a" * 201]}, lambda values: lambda: values)
    assert len({t.folder for t in long}) == 2 and all(len(t.folder) <= 60 for t in long)


def fake_run(config, path):
    """Writes a finished run of one stage, as a training would; a seed of 13 diverges."""
    if config.seed == 13:
        raise NumericsError("stage small: loss is nan at step 3")
    runs.save(path, [BYTES], seed=config.seed)
    folder = RunFolder(path)
    (entry,) = folder.stages()
    entry |= {"steps": 6, "tokens": 600, "flops": 6e6, "wall_s": 3.0, "params": 10}
    entry["eval"] = {"bpb_start": 8.0, "bpb_end": 5.0 - config.seed}
    folder.add_stage(entry)
    for step, bpb in ((0, 8.0), (3, 4.5), (6, 5.0 - config.seed)):
        folder.stage(0, "s0").metrics.append("eval", step, bpb=bpb, mask=None)
    experiment_file.keep_config(folder, config)
    return folder.stages()


@pytest.fixture
def trained(monkeypatch):
    """The seeds that were trained; no model is."""
    seeds = []

    def run(config, workdir, compiled=None):
        seeds.append(config.seed)
        return fake_run(config, workdir)

    monkeypatch.setattr(sweep.chain, "run", run)
    monkeypatch.setattr(sweep.report, "write", lambda folder: None)
    return seeds


SWEEP = ("sweep", "--config=tests/tiny_chain.py", "--sweep=seed=0,13,2")


def test_a_sweep_skips_what_is_finished_and_survives_a_failure(tmp_path, trained):
    workdir = f"--workdir={tmp_path / 'sweep'}"
    listed = json_of(*SWEEP, workdir, "--list")["runs"]
    assert {row["status"] for row in listed} == {"not begun"} and not trained
    result = json_of(*SWEEP, workdir)
    assert trained == [0, 13, 2]
    shown = [(row["name"], row["status"]) for row in result["runs"]]
    assert shown == [("seed=2", "finished"), ("seed=0", "finished"), ("seed=13", "failed")]
    best, _, failed = result["runs"]
    assert best["bpb_final"] == best["bpb_best"] == 3.0 and best["tokens"] == 600
    assert failed["failure"] == "stage small: loss is nan at step 3"
    assert len(result["files"]) == 3
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"] == result["runs"]
    # Again, with one more value: only the failed run and the new one are run.
    more = [SWEEP[0], SWEEP[1], "--sweep=seed=0,13,2,1", workdir]
    status, out, _ = call(*more)
    assert status == 0 and trained == [0, 13, 2, 13, 1]
    assert "failed: stage small: loss is nan" in out and "seed=1" in out
    # Another config makes other runs: nothing finished is taken for them.
    assert {row["status"] for row in json_of(*SWEEP, workdir, "--list", "--config.data.seed=5")[
        "runs"
    ]} == {"begun", "not begun"}  # fmt: skip


def test_a_sweep_refuses_wrong_fields_before_it_runs(tmp_path, trained):
    base = ("sweep", "--config=tests/tiny_chain.py", f"--workdir={tmp_path / 'x'}")
    assert "no field 'sead'; did you mean 'seed'?" in mistake(*base, "--sweep=sead=0,1")
    assert "--config.seed=a: give a value of type int" in mistake(*base, "--sweep=seed=0,a")
    assert "--sweep is missing" in mistake(*base)
    assert not (tmp_path / "x").exists() and not trained


def test_runs_are_compared_and_other_data_are_reported(tmp_path):
    config = experiment()
    fake_run(config, tmp_path / "one")
    fake_run(dataclasses.replace(config, seed=2), tmp_path / "two")
    other = dataclasses.replace(config, eval=dataclasses.replace(config.eval, sequences=5))
    fake_run(other, tmp_path / "three")
    names = [str(tmp_path / name) for name in ("one", "two", "three")]
    result = json_of("compare", *names, f"--output={tmp_path / 'out'}")
    assert [row["run"] for row in result["runs"]] == ["one", "two", "three"]
    assert [row["bpb_final"] for row in result["runs"]] == [5.0, 3.0, 5.0]
    assert result["runs"][0]["bpb_best"] == 4.5
    assert result["notes"][0] == "two: config.seed: 0 -> 2"
    assert "three was measured on other text than one" in result["notes"][1]
    assert "validation.sequences: 8 -> 5" in result["notes"][1]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"compared.png", "compared.svg", "compared.csv"}
    points = list(csv.DictReader((tmp_path / "out" / "compared.csv").read_text().splitlines()))
    tokens = [p for p in points if p["x_label"] == "training tokens" and p["series"] == "one"]
    # The untrained model's point is left out.
    assert [(p["x"], p["y"]) for p in tokens] == [("300.0", "4.5"), ("600.0", "5.0")]
    assert (tmp_path / "out" / "compared.svg").read_text().count("<svg") == 1
    # A stage, or a flag of the other comparison, compares two models.
    assert "are not all runs" in mistake("compare", *names, "--seed=1")
    assert "flm compare RUN RUN... compares runs" in mistake("inspect", *names[:2])


def test_a_grown_run_counts_all_its_stages(tmp_path):
    path, _ = runs.save(tmp_path / "run", [BYTES, BYTES])
    folder = RunFolder(path)
    stages = folder.stages()
    for entry, spent in zip(stages, (100, 1000), strict=True):
        entry |= {"tokens": spent, "flops": 2.0 * spent, "wall_s": 1.0, "steps": 10}
        entry["eval"] = {"bpb_start": 8.0, "bpb_end": 4.0}
        folder.add_stage(entry)
        start = 10 * entry["index"]
        for step in (start, start + 5, start + 10):
            folder.stage(entry["index"], entry["name"]).metrics.append(
                "eval", step, bpb=4.0, mask=None
            )
    run = comparison.read(path)
    assert [m.tokens for m in run.curve] == [0, 50, 100, 100, 600, 1100]
    assert run.growths == [{"tokens": 100, "flops": 200, "wall_s": 1}]
    assert run.row()["tokens"] == 1100
