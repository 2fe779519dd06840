"""Growth from disk to disk: equal to growth in memory, in bounded memory; mistakes are refused."""

import dataclasses
import errno
import functools
import itertools
import json
import shutil
import signal

import jax
import numpy as np
import pytest

from flm_jax import growth
from flm_jax.config import DataConfig, ExperimentConfig, GrowthConfig, StageConfig
from flm_jax.errors import UserError
from flm_jax.growth import measure
from flm_jax.growth.operators import uses_distances
from flm_jax.growth.receipt import measured
from flm_jax.runs import grow_on_disk
from flm_jax.runs.stage import plan_of
from flm_jax.store import chunk_writer
from flm_jax.store.checkpoint import Checkpoints, by_name
from flm_jax.store.chunked import CheckpointReader
from flm_jax.store.files import write_json
from flm_jax.store.lineage import RunFolder, identity
from tests.commands import mistake, peak_memory, run, start, wait_for
from tests.models import SMALL, changed, packed_batch, random_params
from tests.runs import entry, lineage
from tests.states import assert_same_bits, random_state

KEY_OF_STAGE_1 = jax.random.fold_in(jax.random.key(0), 1)


def two_stages(small, big, **growth_fields):
    """Returns a chain of two stages with four steps each."""
    stage = functools.partial(
        StageConfig, steps=4, batch_size=2, learning_rate=1e-3, matrix_learning_rate=1e-3
    )
    grown = GrowthConfig(**{"ramp_steps": 2, "rewarmup_steps": 1, **growth_fields})
    stages = (stage("small", small), stage("big", big, growth=grown))
    return ExperimentConfig(stages=stages, data=DataConfig(sequence_length=16))


def finished_run(config, path, state=None):
    """Writes a run whose first stage is finished, without training; returns its state."""
    folder = RunFolder(path)
    stage = folder.stage(0, "small")
    state = random_state(config.stages[0].model) if state is None else state
    write_json(stage.config, identity(config, 0, "no data"))
    checkpoints = Checkpoints(stage.checkpoints)
    checkpoints.save(4, state, {"data": {"place": 3}, "wall_s": 1.0})
    checkpoints.close()
    own = {"data_fingerprint": "no data", "params_digest": str(path)}
    folder.add_stage(entry(0, "small", 4) | own)
    return state


CONFIG = changed(SMALL, dtype="float32", mup_base_width=0)
WIDER = two_stages(CONFIG, changed(CONFIG, d_ff=3000))


def test_after_a_full_disk_the_same_call_continues(tmp_path, monkeypatch):
    state = finished_run(WIDER, tmp_path / "run")
    grow = functools.partial(
        grow_on_disk.grow, WIDER, tmp_path / "run", tmp_path / "grown", memory=1 << 20
    )
    commits = itertools.count()
    commit = chunk_writer._Batch.commit

    def full_after_two(batch):
        if next(commits) >= 2:
            raise OSError(errno.ENOSPC, "the disk is full")
        return commit(batch)

    with monkeypatch.context() as patched:
        patched.setattr(chunk_writer._Batch, "commit", full_after_two)
        with pytest.raises(UserError, match=r"cannot be written \(No space left"):
            grow()
    checkpoints = tmp_path / "grown/stages/1-big/checkpoints"
    assert [p.name for p in checkpoints.iterdir()] == ["4.partial"]
    unfinished = Checkpoints(checkpoints)
    assert unfinished.latest is None
    unfinished.close()
    again = grow()
    assert 0 < again["bytes_written"] < again["bytes"]
    reader = CheckpointReader(again["checkpoint"])
    plan = plan_of(CONFIG, WIDER.stages[1])
    want = jax.jit(functools.partial(growth.grow, plan=plan))(state, key=KEY_OF_STAGE_1)
    assert_same_bits({n: reader.read(n) for n in reader.leaves}, by_name(want))
    assert reader.progress == {"data": {"place": 3}, "wall_s": 0.0}
    # The target has all files that training reads.
    target = RunFolder(tmp_path / "grown")
    assert target.stages() == RunFolder(tmp_path / "run").stages()
    folder = target.stage(1, "big")
    assert growth.Plan.from_json(folder.plan.read_text()) == plan
    assert json.loads(folder.config.read_text()) == identity(WIDER, 1, "no data")
    receipt = json.loads(folder.receipt.read_text())
    assert not measured(receipt) and receipt["exactness"] == "EXACT"
    # The growth is complete: a third call writes nothing.
    before = sorted((p, p.stat().st_mtime_ns) for p in target.path.rglob("*"))
    assert grow()["bytes"] == 0
    assert sorted((p, p.stat().st_mtime_ns) for p in target.path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore::flm_jax.growth.UselessNoiseWarning")
def test_mistakes_are_refused_and_write_nothing(tmp_path, monkeypatch):
    source, target = tmp_path / "run", tmp_path / "grown"
    finished_run(WIDER, source)

    def refused(words, config=WIDER, source=source, target=target, **options):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=words):
            grow_on_disk.grow(config, source, target, **options)
        assert sorted(tmp_path.rglob("*")) == before

    refused("source and target are both", target=tmp_path / "grown/../run")
    refused("has no finished stage", source=tmp_path / "none")
    refused(r"no finished stage '7'; it has 0 \(small\)", stage="7")
    one = dataclasses.replace(WIDER, stages=WIDER.stages[:1])
    refused("is the config's last", config=one)
    other = two_stages(changed(CONFIG, d_ff=21), WIDER.stages[1].model)
    refused("d_ff: 20 -> 21", config=other)
    refused(r"^memory is 1,000 bytes, but .* give memory=\d+$", memory=1000)
    noisy = two_stages(CONFIG, WIDER.stages[1].model, recipe="zero_pad", noise_db=10.0)
    refused("noise_db 10.0, .* grow in memory", config=noisy)
    ligo = two_stages(CONFIG, WIDER.stages[1].model, recipe="ligo")
    refused("'mlp' by 'ligo', a dense map", config=ligo)
    words = two_stages(CONFIG, changed(CONFIG, vocab_size=29))
    refused("'vocab' by 'msg', with the mean", config=words)
    with monkeypatch.context() as patched:
        usage = shutil.disk_usage(tmp_path)
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
        with pytest.raises(UserError, match=r"needs .* more bytes, but its disk has 10,000 left"):
            grow_on_disk.grow(WIDER, source, target)
        assert not list(target.iterdir())

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("x")
    refused("holds files but no run", target=tmp_path / "thesis")
    finished_run(WIDER, tmp_path / "another")
    refused(r"not those of .*run/lineage.json; give another target", target=tmp_path / "another")
    # A checkpoint of another config.
    shutil.rmtree(source / "stages/0-small/checkpoints")
    checkpoints = Checkpoints(source / "stages/0-small/checkpoints")
    checkpoints.save(4, random_state(changed(CONFIG, d_ff=21)), {"data": {}})
    checkpoints.close()
    refused(r"down is float32\[2, 21, 12\], the config needs float32\[2, 20, 12\]")
    shutil.rmtree(source / "stages/0-small/checkpoints/4")
    refused("is no checkpoint")


@pytest.mark.parametrize("recipe", ["msg", "identity", "zero_pad", "stack", "middle", "fresh"])
@pytest.mark.parametrize(("source", "layers"), [(1, 2), (2, 3), (2, 4), (3, 4), (3, 5), (3, 6)])
def test_distances_are_used_exactly_where_the_plan_depends_on_them(recipe, source, layers):
    small, big = (changed(CONFIG, num_layers=n) for n in (source, layers))
    plans = [
        growth.plan(small, big, recipe, layer_distances=order)
        for order in itertools.permutations(range(source))
    ]
    depends = any(plan != plans[0] for plan in plans)
    assert uses_distances(recipe, small.num_layers, big.num_layers) == depends
    assert not uses_distances(recipe, small.num_layers, small.num_layers)


def test_distances_are_measured_one_layer_at_a_time():
    config = changed(CONFIG, num_layers=3)
    params, batch = random_params(config, 2), packed_batch(config)
    leaves = {f"params/{n}": x for n, x in by_name(params).items()}

    def read(path, slices):
        index = [np.arange(n)[s] for n, s in zip(leaves[f"params/{path}"].shape, slices)]  # noqa: B905
        return np.asarray(leaves[f"params/{path}"])[np.ix_(*index)]

    got = measure.layer_distances(read, jax.tree.map(np.asarray, batch), config)
    want = measure.source(params, batch, config)["distances"]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert np.ptp(want) > 1e-2  # the layers differ, so a wrong order would be noticed


CHAIN = """
import dataclasses
from flm_jax import config
from flm_jax.commands import config_files

def get_config():
    smoke = config.experiment(config_files.plain(config_files.shipped("demo").get_config("smoke")))
    stages = tuple(dataclasses.replace(stage, steps=12) for stage in smoke.stages[:2])
    return config_files.to_config_dict(dataclasses.replace(smoke, stages=stages))
"""


@pytest.mark.slow
def test_a_run_grown_on_disk_trains_as_if_grown_in_memory(tmp_path):
    (tmp_path / "chain.py").write_text(CHAIN)
    config = f"--config={tmp_path / 'chain.py'}"
    status, _, err = run("train", config, f"--workdir={tmp_path / 'run'}")
    assert status == 0, err
    target = tmp_path / "grown"
    args = (
        "growth",
        "checkpoint",
        config,
        f"--source={tmp_path / 'run'}",
        f"--target={target}",
        "--stage=small",
    )
    process = start(*args)
    wait_for("stages/1-medium/checkpoints/12.partial", target, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (target / "stages/1-medium/checkpoints/12").exists()
    status, out, err = run(*args)
    assert status == 0 and "were written" in out and "/s" in err, err
    status, _, err = run("train", config, f"--workdir={target}")
    assert status == 0, err
    times = {"wall_s": 0, "goodput": None}
    for a, b in zip(lineage(target), lineage(tmp_path / "run"), strict=True):
        assert a | times == b | times  # digests, receipts, evaluations
    assert "target are both" in mistake(*args, f"--target={tmp_path / 'run'}")


@pytest.mark.slow
def test_a_state_grows_in_less_memory_than_its_size(tmp_path):
    """A state of 0.6 GB grows to 2.8 GB in a process with less than 1.5 GiB."""
    small = changed(
        CONFIG,
        vocab_size=8192,
        num_layers=4,
        d_model=768,
        num_heads=12,
        num_kv_heads=0,
        head_dim=64,
        d_ff=3072,
    )
    big = changed(small, num_layers=8, d_model=1280, num_heads=20, d_ff=5120)
    config = two_stages(small, big)
    finished_run(config, tmp_path / "run")
    (tmp_path / "chain.py").write_text(
        "from flm_jax import config\nfrom flm_jax.commands import config_files\n"
        f"VALUES = {dataclasses.asdict(config)!r}\n"
        "def get_config():\n    return config_files.to_config_dict(config.experiment(VALUES))\n"
    )
    peak = peak_memory(
        "growth",
        "checkpoint",
        f"--config={tmp_path / 'chain.py'}",
        f"--source={tmp_path / 'run'}",
        f"--target={tmp_path / 'grown'}",
    )
    reader = CheckpointReader(tmp_path / "grown/stages/1-big/checkpoints/4")
    assert sum(4 * x.size for x in reader.leaves.values()) > 2e9
    shutil.rmtree(tmp_path)
    assert peak < 1.5 * 2**30
