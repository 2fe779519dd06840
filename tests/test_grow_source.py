"""A model from elsewhere grows from disk to disk: as in memory, in bounded memory; mistakes."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from flm_jax import growth, interop
from flm_jax.config import DataConfig, ExperimentConfig, GrowthConfig, StageConfig
from flm_jax.errors import UserError
from flm_jax.interop.stage_source import resolved
from flm_jax.params.digest import params_digest
from flm_jax.runs import grow_on_disk
from flm_jax.runs.stage import with_derived
from flm_jax.store.checkpoint import by_name
from flm_jax.store.chunked import CheckpointReader
from flm_jax.store.lineage import RunFolder
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import init_state
from tests.commands import ROOT, json_of, mistake, run
from tests.models import SMALL, changed, random_params
from tests.runs import lineage
from tests.states import assert_same_bits, files_of_at_most

MODEL = changed(SMALL, vocab_size=260, dtype="float32", mup_base_width=0, tied=True)
MODEL_OF_FILES = changed(MODEL, matrix_init_std=0.02, vector_init_std=0.02)
KEY_OF_STAGE_1 = jax.random.fold_in(jax.random.key(0), 1)
WIDER = {"base": "source", "d_ff": 31}  # compiles little
BIGGER = {"base": "source", "d_model": 18, "num_layers": 3, "d_ff": 31}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(8):
        (folder / f"{i}.txt").write_text("def add(a, b):\n    return a + b\n" * 30)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "hf"
    interop.save_hf(folder, random_params(MODEL, 0), MODEL, "granite", vocabulary="bytes")
    return folder


def two_stages(source, texts, second=BIGGER, steps=0, recipe="msg"):
    stage = functools.partial(
        StageConfig, batch_size=8, learning_rate=1e-3, matrix_learning_rate=1e-3
    )
    grown = GrowthConfig(recipe=recipe, ramp_steps=2, rewarmup_steps=1, calibration_sequences=2)
    data = DataConfig(
        task="text_files", path=str(texts), vocabulary="source", sequence_length=32,
        shuffle_tokens=1 << 12,
    )  # fmt: skip
    return ExperimentConfig(
        stages=(
            stage("base", "source", steps, source=str(source)),
            stage("grown", second, 4, growth=grown),
        ),
        data=data,
        quick_compile=True,
    )


def leaves(path):
    reader = CheckpointReader(path)
    return {name: reader.read(name) for name in reader.leaves}


def fresh(config, params):
    """The state in which the first stage starts, made in memory."""
    stage = config.stages[0]
    tx = optim.optimizer(stage, config.optimizer, schedules.steady)
    state = init_state(stage.model, tx, jax.random.key(3))
    return dataclasses.replace(state, params=jax.tree.map(jnp.asarray, params))


@pytest.mark.parametrize(
    ("kind", "second"),
    [
        ("folder", WIDER),
        *(pytest.param(k, BIGGER, marks=pytest.mark.slow) for k in ("folder", "import", "half")),
    ],
)
def test_a_source_grows_on_disk_as_in_memory(kind, second, source, texts, tmp_path):
    if kind == "import":
        interop.convert(str(source), str(tmp_path / "run"), "flm")
        source = tmp_path / "run"
    if kind == "half":
        interop.convert(str(source), str(tmp_path / "half"), "granite", dtype="bfloat16")
        source = tmp_path / "half"
    chain = config = two_stages(source, texts, second)
    done = grow_on_disk.grow(config, str(source), str(tmp_path / "grown"), memory=1 << 16)
    config = with_derived(resolved(config))
    params = interop.open_model(str(source)).params
    state = fresh(config, params)
    target = RunFolder(tmp_path / "grown")
    (entry,) = target.stages()
    assert_same_bits(leaves(target.path / entry["checkpoint"]), by_name(state))
    assert entry["params_digest"] == params_digest(params) and entry["name"] == "base"
    plan = growth.Plan.from_json(target.stage(1, "grown").plan.read_text())
    assert plan.source == MODEL_OF_FILES and plan.config == config.stages[1].model
    want = jax.jit(functools.partial(growth.grow, plan=plan))(state, key=KEY_OF_STAGE_1)
    assert_same_bits(leaves(done["checkpoint"]), by_name(want))
    # Negative control: another source gives other bits.
    other = fresh(config, random_params(MODEL, 1))
    with pytest.raises(AssertionError):
        assert_same_bits(leaves(target.path / entry["checkpoint"]), by_name(other))
    # The growth is complete: a second call writes nothing.
    before = sorted((p, p.stat().st_mtime_ns) for p in target.path.rglob("*"))
    again = grow_on_disk.grow(chain, str(source), str(target.path))
    assert again["bytes"] == 0 and again["checkpoint"] == done["checkpoint"]
    assert sorted((p, p.stat().st_mtime_ns) for p in target.path.rglob("*")) == before


@pytest.mark.parametrize("most", [400, pytest.param(3000, marks=pytest.mark.slow)])
def test_after_a_full_disk_the_same_call_continues(most, source, texts, tmp_path):
    config = two_stages(source, texts, WIDER)
    grow = functools.partial(grow_on_disk.grow, config, str(source))
    with files_of_at_most(most), pytest.raises(UserError, match="File too large"):
        grow(str(tmp_path / "a"))
    grow(str(tmp_path / "a"))
    grow(str(tmp_path / "b"))
    for path in ("stages/0-base/checkpoints/0", "stages/1-grown/checkpoints/0"):
        assert_same_bits(leaves(tmp_path / "a" / path), leaves(tmp_path / "b" / path))
    assert lineage(tmp_path / "a") == lineage(tmp_path / "b")


def test_mistakes_are_refused_and_write_nothing(source, texts, tmp_path, monkeypatch):
    config = two_stages(source, texts)

    def refused(words, config=config, source=source, **options):
        with pytest.raises(UserError, match=words) as caught:
            grow_on_disk.grow(config, str(source), str(tmp_path / "grown"), **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "grown").exists()

    refused("steps is 3, but a source is grown .* untrained; set steps to 0", two_stages(
        source, texts, steps=3))  # fmt: skip
    refused(f"stage is 'base', but {source} is the source of stage base", stage="base")
    one = dataclasses.replace(config, stages=config.stages[:1])
    refused("stage base is the config's last one; add the stage", one)
    refused(r"^memory is 100 bytes, but .* give memory=\d+$", memory=100)
    refused("'mlp' by 'ligo', a dense map", two_stages(source, texts, recipe="ligo"))
    bytes_ = dataclasses.replace(config.data, vocabulary=str(tmp_path / "missing"))
    refused("no such file exists", dataclasses.replace(config, data=bytes_))
    wrong = resolved(config)
    first = dataclasses.replace(wrong.stages[0], model=changed(MODEL, d_ff=21))
    refused("model.d_ff is 21, but source", dataclasses.replace(
        wrong, stages=(first, wrong.stages[1])))  # fmt: skip
    # A source that the config does not name.
    plain = dataclasses.replace(wrong.stages[0], source="")
    named = dataclasses.replace(wrong, stages=(plain, wrong.stages[1]))
    refused(f"set config.stages.0..source to {source}, and its steps to 0", named)
    interop.convert(str(source), str(tmp_path / "run"), "flm")
    refused("set config.stages.0..source to .*run, and its", named, tmp_path / "run")
    with monkeypatch.context() as patched:
        usage = shutil.disk_usage(tmp_path)
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
        with pytest.raises(UserError, match=r"needs .* more bytes, but its disk has 10,000 left"):
            grow_on_disk.grow(config, str(source), str(tmp_path / "grown"))
        assert not list((tmp_path / "grown").iterdir())


CONFIG_FILE = """
import dataclasses
from flm_jax.commands import config_files
from tests.test_grow_source import two_stages

def get_config():
    return config_files.to_config_dict(two_stages({source!r}, {texts!r}, {second!r}))
"""


def config_file(tmp_path, source, texts, second=BIGGER):
    values = {"source": str(source), "texts": str(texts), "second": second}
    (tmp_path / "chain.py").write_text(CONFIG_FILE.format(**values))
    return f"--config={tmp_path / 'chain.py'}"


@pytest.mark.slow
def test_a_source_grown_on_disk_trains_as_if_grown_in_memory(source, texts, tmp_path):
    config = config_file(tmp_path, source, texts)
    grown = json_of(
        "growth", "checkpoint", config, f"--source={source}", f"--target={tmp_path / 'a'}", by=run
    )
    assert grown["source"] == str(source) and grown["bytes_written"] == grown["bytes"]
    for name in ("a", "b"):
        status, _, err = run("train", config, f"--workdir={tmp_path / name}")
        assert status == 0, err
    (one, two), (first, second) = lineage(tmp_path / "a"), lineage(tmp_path / "b")
    times = {"wall_s": 0, "goodput": None}
    assert two | times == second | times  # digests, receipt, evaluations
    assert one["eval"] == {"bpb_start": None, "bpb_end": None}
    assert one | times | {"eval": 0} == first | times | {"eval": 0}
    words = mistake(
        "train", config, f"--workdir={tmp_path / 'a'}", "--config.stages[1].model.d_ff=32", by=run
    )
    assert "d_ff: 31 -> 32" in words


MEMORY_SCRIPT = """
import json, sys
from flm_jax.runtime import host
host.keep_freed()
from flm_jax import data
from flm_jax.runs import grow_on_disk
from flm_jax.runs.stage import with_derived
from tests.test_grow_source import two_stages

def mib(key):
    return int(open("/proc/self/status").read().split(key)[1].split()[0]) / 1024

source, target, texts, second = json.loads(sys.argv[1])
config = two_stages(source, texts, second)
data.open_corpus(with_derived(config).data)  # TensorFlow is part of the process
base = mib("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")
grow_on_disk.grow(config, source, target)
print(json.dumps(mib("VmHWM:") - base))
"""


@pytest.mark.slow
def test_a_folder_grows_in_less_memory_than_its_state(texts, tmp_path):
    """Files of 0.2 GB become states of 0.6 and 2.8 GB in at most 1.2 GiB beyond the process."""
    small = changed(
        MODEL, vocab_size=8192, num_layers=4, d_model=768, num_heads=12, num_kv_heads=0,
        head_dim=64, d_ff=3072, tied=False,
    )  # fmt: skip
    params = jax.tree.map(lambda x: x.astype("float32"), random_params(small, 0))
    interop.save_hf(tmp_path / "hf", params, small, "granite", vocabulary="bytes")
    second = {"base": "source", "num_layers": 8, "d_model": 1280, "num_heads": 20,
              "num_kv_heads": 20, "d_ff": 5120}  # fmt: skip
    values = [str(tmp_path / "hf"), str(tmp_path / "grown"), str(texts), second]
    command = [sys.executable, "-c", MEMORY_SCRIPT, json.dumps(values)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    reader = CheckpointReader(tmp_path / "grown/stages/1-grown/checkpoints/0")
    assert sum(4 * x.size for x in reader.leaves.values()) > 2e9
    shutil.rmtree(tmp_path)
    above = float(done.stdout.splitlines()[-1])
    print(f"{above:.0f} MiB above the process")
    assert above < 1.2 * 1024
