"""Runs, sources, data and exports on emulated buckets, through the real clients."""

import contextlib
import os
import signal
import time
from unittest import mock

import fsspec
import jax
import pytest

from flm_jax.config import DataConfig
from flm_jax.data.files import splits
from flm_jax.errors import UserError
from flm_jax.interop import load_hf, save_hf
from flm_jax.interop.converter import convert
from flm_jax.interop.opening import open_stored_model
from flm_jax.runtime import paths
from flm_jax.store import files, lock, objects
from flm_jax.store.checkpoint import Checkpoints, by_name, complete
from flm_jax.store.chunk_writer import CheckpointWriter
from flm_jax.store.chunked import CheckpointReader
from flm_jax.store.lineage import RunFolder
from tests import buckets
from tests.commands import mistake, run, start
from tests.models import SMALL, changed, random_params
from tests.runs import entry
from tests.states import assert_same_bits

pytestmark = pytest.mark.slow

CHAIN = (
    "train", "--config=tests/tiny_chain.py", "--config.mesh.data=1", "--config.mesh.fsdp=1",
    "--config.mesh.tensor=1", "--config.eval.every_steps=6", "--config.checkpoint.every_steps=6",
)  # fmt: skip


@contextlib.contextmanager
def clients(emulator):
    with emulator() as environment, mock.patch.dict(os.environ, environment):
        fsspec.config.conf.clear()
        paths._prepare.cache_clear()
        yield
        for protocol in ("gs", "s3"):
            with contextlib.suppress(ImportError):
                fsspec.get_filesystem_class(protocol).clear_instance_cache()


@pytest.fixture(scope="module")
def gcs():
    with clients(buckets.gcs):
        yield "gs://bucket"


@pytest.fixture(scope="module")
def s3():
    with clients(buckets.s3):
        yield "s3://bucket"


def stages(folder):
    """The lineage of a run without times."""
    times = ("wall_s", "goodput")
    return [{k: v for k, v in s.items() if k not in times} for s in folder.stages()]


def await_object(path, process, timeout=300):
    end = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.05)


def test_a_chain_on_a_bucket_killed_and_resumed_is_the_chain_on_a_disk(gcs, tmp_path):
    folder = RunFolder(f"{gcs}/run")
    killed = start(*CHAIN, f"--workdir={folder.path}")
    await_object(folder.path / "stages/1-large/checkpoints/18/commit_success.txt", killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    status, _, err = run(*CHAIN, f"--workdir={folder.path}")
    assert status == 0, err
    assert "takes it over" in err
    local = RunFolder(tmp_path / "run")
    status, _, err = run(*CHAIN, f"--workdir={local.path}")
    assert status == 0, err

    assert stages(folder) == stages(local)
    for done in local.stages():
        there, here = (f.stage(done["index"], done["name"]) for f in (folder, local))
        for file in ("config", "plan", "receipt"):
            if getattr(here, file).exists():
                assert getattr(there, file).read_text() == getattr(here, file).read_text()
        # A row of the kind "train" is a mean since the last start.
        assert there.metrics.rows("eval") == here.metrics.rows("eval")
        steps = [[row["step"] for row in f.metrics.rows("train")] for f in (there, here)]
        assert steps[0] == steps[1]
        one, other = (CheckpointReader(f.path / done["checkpoint"]) for f in (folder, local))
        assert one.progress["data"] == other.progress["data"]
        assert_same_bits(*({n: r.read(n) for n in r.leaves} for r in (one, other)))
    names = {p.name for p in paths.files(folder.path)}
    assert {"report.md", "curve.png"} <= names and lock.NAME not in names
    assert any(name.startswith("events.out") for name in names)
    status, out, _ = run(*CHAIN, f"--workdir={folder.path}")
    assert status == 0 and "the run is complete" in out


def test_a_lease_is_refused_while_renewed_and_taken_over_when_not(gcs, capsys):
    folder = paths.of(f"{gcs}/leased")
    held = lock.acquire(folder, lease=1.0)
    with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .* since 20"):
        lock.acquire(folder, lease=1.0)
    held._ended.set()  # as if the process was killed
    held._thread.join()
    other = lock.acquire(folder, lease=1.0)
    assert "takes it over" in capsys.readouterr().err
    ended = []
    with mock.patch.object(lock._Lease, "_give_up", lambda self, reason: ended.append(reason)):
        held._ended.clear()
        held._lease = 0.1
        with mock.patch.object(held._ended, "wait", side_effect=[False, True]):
            held._renew()
    assert len(ended) == 1 and "took it over" in ended[0]
    other.release()
    assert objects.read(folder / lock.NAME)[0] == b""


def test_two_writers_of_one_lineage_do_not_lose_a_stage(gcs):
    folder = RunFolder(f"{gcs}/lineage")
    folder.add_stage(entry(0, "a"))
    with (
        pytest.raises(UserError, match="another process wrote it meanwhile"),
        files.replacing(folder.lineage) as write,
    ):
        folder.add_stage(entry(1, "b"))
        write({"version": 1, "stages": []})
    assert [s["name"] for s in folder.stages()] == ["a", "b"]


def test_what_a_client_refuses_is_one_line_before_anything_is_made(gcs, tmp_path):
    assert "there is no bucket nobody" in mistake(*CHAIN[:2], "--workdir=gs://nobody/run")
    words = mistake(*CHAIN[:2], f"--workdir={tmp_path}/run", "--config.data.task=text_files",
                    "--config.data.path=gs://nobody/text")  # fmt: skip
    assert "no bucket nobody" in words
    assert not list(tmp_path.iterdir())


def test_no_checkpoints_on_s3(s3):
    assert "orbax writes no checkpoints to s3://" in mistake(*CHAIN[:2], f"--workdir={s3}/run")
    assert not list(paths.files(paths.of(f"{s3}/run")))
    with pytest.raises(UserError, match="there is no bucket nobody"):
        paths.check_bucket(paths.of("s3://nobody/x"))


def test_a_checkpoint_written_on_a_bucket_appears_when_it_is_whole(gcs):
    state = {"params": random_params(changed(SMALL, dtype="float32"), 0)}
    path = paths.of(f"{gcs}/written/checkpoints/5")
    leaves = {name: x for name, x in by_name(state).items()}
    writer = CheckpointWriter(path, state, {"data": 1}, batch_bytes=1)
    for name in list(leaves)[:3]:
        writer.write(name, None, leaves[name])
    assert not complete(path)
    writer = CheckpointWriter(path, state, {"data": 1})  # as if the process was killed
    for n, (name, x) in enumerate(leaves.items()):
        assert all(writer.holds(name, piece) == (n < 3) for piece in writer.pieces(name))
        writer.write(name, None, x)
    writer.finish()
    reader = CheckpointReader(path)
    assert reader.progress == {"data": 1}
    assert_same_bits({n: reader.read(n) for n in reader.leaves}, leaves)
    checkpoints = Checkpoints(path.parent)
    assert checkpoints.latest == 5
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
    assert_same_bits(checkpoints.restore(5, like)[0], state)
    checkpoints.close()


@pytest.mark.parametrize("kind", ["gcs", "s3"])
def test_models_and_text_on_a_bucket_are_read_as_on_a_disk(kind, request, tmp_path):
    bucket = request.getfixturevalue(kind)
    config = changed(SMALL, dtype="float32", vocab_size=300)
    params = random_params(config, 0)
    save_hf(f"{bucket}/export", params, config, "llama", vocabulary="bytes")
    save_hf(tmp_path / "export", params, config, "llama", vocabulary="bytes")
    there, here = paths.of(f"{bucket}/export"), tmp_path / "export"
    names = sorted(p.name for p in here.iterdir())
    assert sorted(p.name for p in there.iterdir()) == names
    for name in names:
        assert (there / name).read_bytes() == (here / name).read_bytes()
    loaded, read = load_hf(f"{bucket}/export")
    assert read == load_hf(here)[1]
    assert_same_bits(loaded, load_hf(here)[0])
    assert open_stored_model(f"{bucket}/export").vocabulary.num_tokens() == 259
    with pytest.raises(UserError, match="exists and is not empty"):
        save_hf(f"{bucket}/export", params, config, "llama")
    run = f"{bucket}/imported"
    if kind == "gcs":
        convert(f"{bucket}/export", run, "flm")
        got = CheckpointReader(f"{run}/stages/0-imported/checkpoints/0")
        assert_same_bits({n: got.read(n) for n in got.leaves}, by_name({"params": loaded}))
    else:
        with pytest.raises(UserError, match="orbax writes no checkpoints to s3"):
            convert(f"{bucket}/export", run, "flm")
    for name in ("a.txt", "b/c.txt"):
        paths.copy(here / "config.json", paths.of(f"{bucket}/text/{name}"))
        paths.copy(here / "config.json", tmp_path / "text" / name)
    found = [
        [(d.name, d.text) for d in splits(DataConfig("text_files", path), whole=True)[0]["all"]]
        for path in (f"{bucket}/text", str(tmp_path / "text"))
    ]
    assert found[0] == found[1] and len(found[0]) == 2
