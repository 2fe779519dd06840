"""Run folders and exports of an earlier version still open, and a stopped run resumes.

tests/stored/README.md says how they were written.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import platform
import tarfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import data, growth, interop
from flm_jax.commands import config_files
from flm_jax.errors import UserError
from flm_jax.inference.evaluation import score
from flm_jax.interop.opening import open_model, open_state
from flm_jax.params import sharding, trees
from flm_jax.runs import chain
from flm_jax.store.lineage import RunFolder
from tests.commands import ROOT, json_of, run
from tests.models import farthest
from tests.stored import chain as stored_chain

CHAIN = ("train", "--config=tests/stored/chain.py")
# The step and the digest of the stopped run's last checkpoint, computed by the earlier version.
STOPPED_AT = 14
STOPPED_DIGEST = "eaed4352106eba0c9468f8d14174d9e8565e0c09cee5a1b9fe884095d8d62d3d"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The folder that holds `run`, `stopped` and `export`."""
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(ROOT / "tests" / "stored" / "runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def stopped(tmp_path):
    """A copy of the stopped run; a test may change it."""
    with tarfile.open(ROOT / "tests" / "stored" / "runs.tar.xz") as archive:
        members = [m for m in archive.getmembers() if m.name.split("/")[0] == "stopped"]
        archive.extractall(tmp_path, members, filter="data")
    return tmp_path / "stopped"


def config_of(**changes):
    """Returns the stored run's config with some changes."""
    config = stored_chain.get_config()
    config.update(changes)
    return config_files.experiment(config)


def earlier_digest(params):
    """Computes the earlier version's digest of parameters: the SHA-256 of all bytes."""
    hashed = hashlib.sha256()
    for path, x in trees.flatten(jax.device_get(params)):
        hashed.update(f"{path} {x.dtype.name} {x.shape}".encode())
        hashed.update(np.ascontiguousarray(x).data)
    return hashed.hexdigest()


def rounds_as_recorded():
    """Tells whether XLA rounds here as on the machine that recorded the runs."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    return (
        platform.machine() == "x86_64"
        and cpuinfo.exists()
        and {"avx2", "fma"} <= set(cpuinfo.read_text().split())
        and importlib.metadata.version("jaxlib") == "0.10.2"
    )


@pytest.mark.parametrize(
    ("name", "layers", "width"), [("small", 1, 4), ("large", 2, 8), ("sft", 2, 8)]
)
def test_every_stage_opens_with_its_parameters(stored, name, layers, width):
    folder = RunFolder(stored / "run")
    entry = folder.finished_stage(name)
    opened = open_model(str(folder.path), name)
    assert earlier_digest(opened.params) == entry["params_digest"]
    assert (opened.config.num_layers, opened.config.d_model) == (layers, width)
    assert opened.name == name and opened.trained
    assert opened.context == (256 if name == "sft" else 32)
    assert opened.tokenizer.name == "bytes"
    by_path = open_model(str(folder.path / entry["checkpoint"]))
    chex.assert_trees_all_equal(by_path.params, opened.params)
    assert by_path.config == opened.config


def test_a_stage_opens_with_its_whole_state(stored):
    for name, end, sequences in (("small", 12, 48), ("large", 24, 96)):
        opened = open_state(str(stored / "run"), name)
        adam = opened.state.opt_state[1]
        assert int(opened.state.step) == int(adam.steps) == end
        assert all(float(jnp.abs(x).max()) > 0 for _, x in trees.flatten(adam.mu))
        born = 0 if name == "small" else 12
        assert int(adam.born["layers"].max()) == int(adam.born["embed"].max()) == born
        assert opened.data["sequences"] == sequences
    with pytest.raises(UserError, match="stage sft was trained on conversations"):
        open_state(str(stored / "run"))


def test_the_stopped_run_opens_inside_its_ramp(stored):
    folder = RunFolder(stored / "stopped")
    assert [entry["name"] for entry in folder.stages()] == ["small"]
    path = folder.stage(1, "large").checkpoints / str(STOPPED_AT)
    assert earlier_digest(open_model(str(path)).params) == STOPPED_DIGEST
    small = folder.finished_stage()
    assert earlier_digest(open_model(str(folder.path)).params) == small["params_digest"]


def test_an_earlier_config_and_its_data_compare_equal_today(stored, monkeypatch):
    """A resumed run compares each stage's config.json and the data's fingerprint."""
    monkeypatch.chdir(ROOT)
    folder = RunFolder(stored / "run")
    entries = folder.stages()
    chain.check_finished(config_of(), folder, entries)
    corpus = data.open_corpus(config_of().data_of(0))
    assert {entry["data_fingerprint"] for entry in entries[:2]} == {corpus.fingerprint}
    with pytest.raises(UserError, match=r"0-small.config\.json: .*config\.seed: 0 -> 1"):
        chain.check_finished(config_of(seed=1), folder, entries)


def test_an_earlier_plan_is_read_and_has_its_digest(stored):
    folder = RunFolder(stored / "run")
    entry = folder.finished_stage("large")
    stage = folder.stage(1, "large")
    plan = growth.Plan.from_json(stage.plan.read_text())
    assert plan.digest() == entry["plan_digest"]
    small, large = (stage.model for stage in config_of().stages)
    assert plan == growth.plan(
        small, large, "msg", moments="asym", layer_distances=entry["receipt"]["layer_distances"]
    )
    assert json.loads(stage.receipt.read_text()) == entry["receipt"]


@pytest.mark.parametrize("name", ["small", "large"])
def test_an_earlier_model_has_its_validation_loss(stored, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    opened = open_model(str(stored / "run"), name)
    config = config_of()
    corpus = data.open_corpus(config.data_of(0))
    batches = corpus.validation(config.eval.batch_size, config.eval.sequences)
    mesh = sharding.one_device()
    with jax.set_mesh(mesh):
        got = score(opened.params, opened.config, batches, corpus.token_bytes, mesh)
    want = RunFolder(stored / "run").finished_stage(name)["eval"]["bpb_end"]
    assert got.bits_per_byte == pytest.approx(want, rel=1e-6)


def test_an_earlier_export_equals_its_stage(stored):
    params, config = interop.load_hf(stored / "export")
    opened = open_model(str(stored / "run"), "large")
    chex.assert_trees_all_equal(params, jax.device_get(opened.params))
    for field in ("d_model", "num_layers", "input_mult", "logit_mult", "rms_norm_eps"):
        assert getattr(config, field) == getattr(opened.config, field), field


def test_inspect_reads_an_earlier_run(stored):
    printed = json_of("inspect", str(stored / "run"), "--compare=small,sft")
    assert printed["stages"] == json.loads((stored / "run" / "lineage.json").read_text())["stages"]
    assert "config.stage.model.d_model: 4 -> 8" in printed["compare"]["config"]


@pytest.mark.slow
def test_the_stopped_run_resumes_to_the_recorded_end(stored, stopped):
    """Bit-identically where XLA rounds as in the recording; elsewhere up to float32 rounding.

    It runs in a separate process, with one device and the compiler flags of the recording.
    """
    before = (stopped / "stages" / "1-large" / "plan.json").read_bytes()
    status, _, err = run(*CHAIN, f"--workdir={stopped}")
    assert status == 0, err
    assert (stopped / "stages" / "1-large" / "plan.json").read_bytes() == before
    got, want = (RunFolder(path).finished_stage("large") for path in (stopped, stored / "run"))
    for key in ("steps", "tokens", "config_digest", "plan_digest", "receipt", "checkpoint"):
        assert got[key] == want[key], key
    ended, recorded = (open_model(str(path), "large").params for path in (stopped, stored / "run"))
    assert farthest(ended, recorded) < 1e-5
    paused = open_model(str(stored / "stopped/stages/1-large/checkpoints" / str(STOPPED_AT))).params
    assert farthest(paused, recorded) > 0.1  # negative control: the last steps change the result
    evaluations = [
        [
            (row["step"], row["mask"], row["bpb"])
            for row in folder.stage(1, "large").metrics.rows("eval")
        ]
        for folder in (RunFolder(stopped), RunFolder(stored / "run"))
    ]
    np.testing.assert_allclose(*np.array(evaluations, float), rtol=1e-5)
    if rounds_as_recorded():
        assert earlier_digest(ended) == want["params_digest"]
        assert evaluations[0] == evaluations[1]


@pytest.mark.slow
def test_the_second_archive_resumes_to_its_recorded_end(tmp_path):
    """Its checkpoints have checksums. The comparison is as in the test above."""
    with tarfile.open(ROOT / "tests" / "stored" / "second.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    stopped, recorded = (RunFolder(tmp_path / name) for name in ("stopped", "run"))
    assert [e["name"] for e in stopped.stages()] == ["small"]
    large = stopped.stage(1, "large")
    assert sorted(path.name for path in large.checkpoints.iterdir()) == ["16"]
    status, _, err = run(*CHAIN, f"--workdir={stopped.path}")
    assert status == 0, err
    got, want = stopped.finished_stage("large"), recorded.stages()[1]
    for key in ("steps", "tokens", "config_digest", "plan_digest", "receipt", "checkpoint"):
        assert got[key] == want[key], key
    evaluations = [
        [
            (row["step"], row["mask"], row["bpb"])
            for row in folder.stage(1, "large").metrics.rows("eval")
        ]
        for folder in (stopped, recorded)
    ]
    np.testing.assert_allclose(*np.array(evaluations, float), rtol=1e-5)
    assert [row["step"] for row in large.starts.rows("start")] == [12, 16]
    if rounds_as_recorded():
        assert got["params_digest"] == want["params_digest"]
        assert evaluations[0] == evaluations[1]
