"""Branches and extensions of runs, and what experiment.json says."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import pytest

from flm_jax import mapping
from flm_jax.config import DataConfig
from flm_jax.errors import UserError
from flm_jax.runs import branch, chain, extend
from flm_jax.store import experiment_file
from flm_jax.store.chunked import CheckpointReader
from flm_jax.store.lineage import RunFolder
from tests import runs
from tests.commands import ROOT, call, mistake
from tests.experiment_runs import experiment, with_steps
from tests.models import changed
from tests.runs import BYTES


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Tiny programs compile faster for one device."""
    with pytest.MonkeyPatch.context() as patch:
        device = jax.devices()[0]
        patch.setattr(jax, "devices", lambda: [device])
        yield


def train(config, path):
    return chain.run(config, str(path))


def digests(stages):
    return [stage["params_digest"] for stage in stages]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A finished chain of two stages that keeps all checkpoints."""
    path = tmp_path_factory.mktemp("source") / "run"
    train(experiment(stages=2, steps=6), path)
    return path


def branched(given, config, path):
    point = branch.find(str(given))
    origin = branch.prepare(point, config, path)
    return origin, train(config, path)


@pytest.mark.slow
def test_a_branch_without_changes_ends_with_the_same_bits(source, tmp_path, monkeypatch):
    """From the middle of a stage: optimizer state and data position are kept."""
    config = experiment_file.config_of(RunFolder(source))
    expected = runs.lineage(source)
    for place, name in ((RunFolder, "branch"), (branch, "_fingerprint")):  # killed twice
        monkeypatch.setattr(place, name, lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            branch.prepare(branch.find(f"{source}:small:3"), config, tmp_path / "same")
        monkeypatch.undo()
    origin, stages = branched(f"{source}:small:3", config, tmp_path / "same")
    assert digests(stages) == digests(expected)
    assert [s["config_digest"] for s in stages] == [s["config_digest"] for s in expected]
    # Provenance: the digest of a state that lineage.json of the source does not have.
    assert stages[0]["origin"] == mapping.to_dict(origin) and origin.step == 3
    assert origin.params_digest.startswith("v2-") and "origin" not in stages[1]
    # Called again, it changes nothing; a second branch of another config is refused.
    before = (tmp_path / "same" / "lineage.json").read_bytes()
    branched(f"{source}:small:3", config, tmp_path / "same")
    assert (tmp_path / "same" / "lineage.json").read_bytes() == before
    with pytest.raises(UserError, match=r"not empty.*seed: 0 -> 1"):
        branch.prepare(
            branch.find(f"{source}:small:3"),
            dataclasses.replace(config, seed=1),
            tmp_path / "same",
        )
    # Negative control: other rates from the branch on give other bits.
    faster = dataclasses.replace(config.stages[0], learning_rate=0.05)
    other = dataclasses.replace(config, stages=(faster,))
    _, changed_stages = branched(f"{source}:0:3", other, tmp_path / "faster")
    assert digests(changed_stages)[0] != digests(expected)[0]
    # The source is as it was.
    assert runs.lineage(source) == expected


@pytest.mark.slow
def test_a_branch_grows_otherwise_and_trains_on_other_data(source, tmp_path, monkeypatch):
    config = experiment_file.config_of(RunFolder(source))
    grown = dataclasses.replace(config.stages[1], growth=dataclasses.replace(
        config.stages[1].growth, recipe="tile,identity"
    ))  # fmt: skip
    other = dataclasses.replace(
        config, stages=(config.stages[0], grown), data=dataclasses.replace(config.data, seed=7)
    )
    monkeypatch.setattr("flm_jax.store.lineage.mark_complete", lambda path: 1 / 0)  # killed
    with pytest.raises(ZeroDivisionError):
        branch.prepare(branch.find(f"{source}:small"), other, tmp_path / "run")
    monkeypatch.undo()
    origin, stages = branched(f"{source}:small", other, tmp_path / "run")
    first = runs.lineage(source)[0]
    assert origin.restarts_data
    assert stages[0] == first | {"origin": stages[0]["origin"]}
    assert stages[0]["origin"]["params_digest"] == first["params_digest"]
    assert stages[1]["receipt"]["operator"] == "tile,identity"
    # The copied checkpoint is the same file on disk, and the data began anew.
    paths = [root / first["checkpoint"] for root in (source, tmp_path / "run")]
    files = [sorted(p for p in path.rglob("*") if p.is_file()) for path in paths]
    assert all(os.path.samefile(a, b) for a, b in zip(*files, strict=True))
    positions = [
        CheckpointReader(root / stage["checkpoint"]).progress["data"]
        for root, stage in ((source, runs.lineage(source)[1]), (tmp_path / "run", stages[1]))
    ]
    assert positions[0]["sequences"] == 2 * positions[1]["sequences"] == 2 * 6 * 8
    # Also where a stage continues.
    continued = dataclasses.replace(other, stages=other.stages[:1])
    _, stages = branched(f"{source}:small:3", continued, tmp_path / "continued")
    position = CheckpointReader(tmp_path / "continued" / stages[0]["checkpoint"]).progress["data"]
    assert position["sequences"] == 3 * 8
    # A stage that ends where it was cut: no step is trained, and it is measured there.
    short = with_steps(dataclasses.replace(config, stages=config.stages[:1]), 3)
    _, stages = branched(f"{source}:small:3", short, tmp_path / "cut")
    assert stages[0]["steps"] == 3 and stages[0]["eval"]["bpb_end"] > first["eval"]["bpb_end"]
    assert stages[0]["params_digest"] == stages[0]["origin"]["params_digest"]


@pytest.mark.slow
def test_mistakes_of_a_branch_change_nothing(source, tmp_path):
    new = f"--workdir={tmp_path / 'new'}"

    def refused(given, *args, workdir=new):
        return mistake("branch", given, workdir, *args)

    assert "has no stage 'huge'; it has 0 (small), 1 (large)" in refused(f"{source}:huge")
    assert "step 4 of stage small was not kept; it has 3, 6" in refused(f"{source}:small:4")
    assert "is no run" in refused(str(tmp_path))
    assert "is the run to branch from" in refused(f"{source}:small", workdir=f"--workdir={source}")
    line = refused(f"{source}:small", "--config.stages[0].learning_rate=0.5")
    assert "config.stages[0].learning_rate: 0.02 -> 0.5" in line and "in a later stage" in line
    line = refused(f"{source}:large:9", "--config.stages[1].batch_size=16")
    assert "batch_size: 8 -> 16" in line
    line = refused(f"{source}:small:6", "--config.stages[0].steps=3")
    assert "steps is 3, but the state is after 6 steps" in line
    assert not (tmp_path / "new").exists()
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("mine")
    line = refused(f"{source}:small", workdir=f"--workdir={occupied}")
    assert "holds files but no run" in line and list(occupied.iterdir()) == [occupied / "notes.txt"]
    gone = tmp_path / "gone"
    shutil.copytree(source, gone)
    shutil.rmtree(gone / "stages" / "0-small")
    assert "stage small was deleted" in refused(f"{gone}:small")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "step"),
    [({"kind": "constant"}, 9), ({"kind": "wsd", "decay_steps": 4}, 6)],
    ids=["constant", "wsd"],
)
def test_an_extension_ends_with_the_bits_of_a_longer_run(schedule, step, tmp_path, monkeypatch):
    config = experiment(steps=9, **schedule)
    longer = train(with_steps(config, 15), tmp_path / "longer")
    before = train(config, tmp_path / "run")
    if step == 9:  # also where the stage is a copy, in a branch
        branched(f"{tmp_path / 'run'}:small", config, tmp_path / "copy")
        begun = extend.prepare(tmp_path / "copy", "small", 6)
        assert digests(train(begun.config, tmp_path / "copy")) == digests(longer)
    # Killed between the change of the config and that of the stage, then called again.
    monkeypatch.setattr(extend, "_rewrite", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extend.prepare(tmp_path / "run", "small", 6)
    monkeypatch.undo()
    begun = extend.prepare(tmp_path / "run", "small", 6)
    assert begun.extension.step == step and begun.config == with_steps(config, 15)
    with pytest.raises(UserError, match="extension of stage small by 6 steps has begun"):
        extend.prepare(tmp_path / "run", "small", 5)
    extend.prepare(tmp_path / "run", "", 6)  # stopped before its first step
    stages = train(begun.config, tmp_path / "run")
    assert digests(stages) == digests(longer) != digests(before)
    same = ("config_digest", "steps", "tokens", "flops", "checkpoint")
    assert [stages[0][k] for k in same] == [longer[0][k] for k in same]
    # The run as it was is still there, if the extension went back before its end.
    ended = tmp_path / "run" / "ended" / "9"
    assert ended.exists() == (step < 9)
    if step < 9:
        assert experiment_file.config_of(RunFolder(ended)) == config
        assert runs.lineage(ended) == before and (ended / before[0]["checkpoint"]).is_dir()


@pytest.mark.slow
def test_an_extension_that_would_not_be_exact_says_what_is_possible(source, tmp_path):
    path = tmp_path / "cosine"
    train(experiment("cosine", steps=6), path)
    before = (path / "lineage.json").read_bytes()
    line = mistake("extend", str(path), "--stage=small", "--steps=+6")
    assert "a cosine falls over all steps" in line
    assert f"flm branch {path}:small:6 --workdir=NEW --config.stages[0].steps=12" in line
    assert "--config.schedule.total_steps=6" in line
    assert (path / "lineage.json").read_bytes() == before
    assert "is not the last one" in mistake("extend", str(source), "--stage=small", "--steps=+6")
    assert "as +400" in mistake("extend", str(source), "--stage=large", "--steps=6")
    # A cosine that was planned longer is exact.
    planned = experiment("cosine", steps=6, total_steps=24)
    train(planned, tmp_path / "planned")
    assert extend.prepare(tmp_path / "planned", "", 6).extension.step == 6


def test_a_state_is_named_by_run_stage_and_step(tmp_path):
    path, _ = runs.save(tmp_path / "a:b", [BYTES, changed(BYTES, d_ff=64)])
    for given, index, step in ((path, 1, 7), (f"{path}:s0", 0, 7), (f"{path}:0:7", 0, 7)):
        point = branch.find(given)
        assert (point.stage.index, point.step, point.run.path) == (
            index,
            step,
            RunFolder(path).path,
        )
    for given, words in (
        (f"{path}:s0:8", "step 8 of stage s0 was not kept; it has 7"),
        (f"{path}:s2", "no stage 's2'; it has 0 (s0), 1 (s1)"),
        (f"{path}:s0:7:1", "is no run"),
    ):
        with pytest.raises(UserError) as refused:
            branch.find(given)
        assert words in str(refused.value)


def test_the_config_of_an_earlier_run_is_put_together(tmp_path):
    path, _ = runs.save(tmp_path / "run", [BYTES, changed(BYTES, d_ff=64)])
    folder = RunFolder(path)
    config = experiment_file.config_of(folder)
    assert [s.name for s in config.stages] == ["s0", "s1"]
    assert config.stages[1].model.d_ff == 64 and config.data == DataConfig(sequence_length=32)
    assert config.schedule.total_steps == 0  # it was the sum of the stages' steps
    experiment_file.keep_config(folder, dataclasses.replace(config, seed=3))
    assert experiment_file.config_of(folder).seed == 3
    values = json.loads(folder.experiment.read_text())
    # A folder that came from others names no code to run.
    experiment_file.keep_config(folder, dataclasses.replace(config, tracker="shutil:rmtree"))
    assert "rmtree" not in folder.experiment.read_text()
    hostile = {**values, "config": {**values["config"], "tracker": "shutil:rmtree"}}
    folder.experiment.write_text(json.dumps(hostile))
    assert experiment_file.config_of(folder).tracker == ""
    for damage in ({"version": 9}, {"config": []}, {"origin": {"run": 1}}, {"origin": "x"}):
        folder.experiment.write_text(json.dumps(values | damage))
        with pytest.raises(UserError, match=r"experiment\.json: .*restore the file"):
            experiment_file.read(folder)


def test_branch_takes_its_config_from_the_run(tmp_path):
    """An override is checked against the fields of that run."""
    path, _ = runs.save(tmp_path / "run", [BYTES])
    line = mistake("branch", f"{path}:s0", "--workdir=x", "--config.stages[3].steps=5")
    assert "config.stages has entries 0 to 0, not 3" in line
    assert "got no argument; give flm branch RUN:STAGE[:STEP]" in mistake("branch")
    status, out, _ = call("branch", "--help")
    assert status == 0 and "flm branch runs/demo:small" in out


@pytest.mark.slow
def test_the_story_of_an_experiment_runs(tmp_path):
    story = ROOT / "tests" / "stories" / "experiment.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(story), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "the better rate: {'stages[0].learning_rate': '0.02'}" in done.stdout
    assert {p.suffix for p in (tmp_path / "figure").iterdir()} == {".png", ".svg", ".csv"}
