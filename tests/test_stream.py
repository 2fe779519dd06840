"""Checkpoints slice by slice, and growth from one to another, against the same in memory."""

import contextlib
import functools
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import checkpoint, optim, train
from flm_jax.checkpoint import Checkpoints, by_name
from flm_jax.config import OptimizerConfig, StageConfig
from flm_jax.errors import UserError
from flm_jax.leaves import CheckpointReader, CheckpointWriter, chunk_shape
from tests.models import SMALL, changed

PROGRESS = {"data": {"place": [3, 1]}, "wall_s": 1.5}
CONFIG = changed(SMALL, dtype="float32")


def random_state(config, seed=0):
    """A train state with random entries everywhere."""
    stage = StageConfig("s", config, 9, 2, 1e-3, 1e-3)
    tx = optim.optimizer(stage, OptimizerConfig(), optim.steady)
    like = jax.eval_shape(lambda: train.init_state(config, tx, jax.random.key(0)))
    rng = np.random.default_rng(seed)

    def draw(x):
        if x.dtype == jnp.int32:
            return jnp.asarray(rng.integers(0, 50, x.shape), jnp.int32)
        return jnp.asarray(rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(draw, like)


def placed(tree):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)


def assert_same_bits(got, want):
    got, want = by_name(got), by_name(want)
    assert got.keys() == want.keys()
    for name, x in want.items():
        x, y = np.asarray(x), np.asarray(got[name])
        assert x.dtype == y.dtype and x.shape == y.shape, name
        assert x.tobytes() == y.tobytes(), name


@pytest.mark.parametrize("limit", [1 << 20, 300])
def test_a_written_checkpoint_is_what_the_runner_restores(tmp_path, limit):
    state = random_state(CONFIG)
    like = jax.eval_shape(lambda: state)
    chunks = {n: chunk_shape(x.shape, 4, limit) for n, x in by_name(like).items()}
    writer = CheckpointWriter(tmp_path / "7", like, PROGRESS, chunks)
    checkpoints = Checkpoints(tmp_path)
    for n, (name, x) in enumerate(by_name(state).items()):
        if n == 3:  # this process is killed, and called again
            writer = CheckpointWriter(tmp_path / "7", like, PROGRESS, chunks)
        for piece in writer.pieces(name):
            assert not writer.holds(name, piece)
            writer.write(name, piece, np.asarray(x)[piece])
            assert writer.holds(name, piece)
    # Until it is finished it is no checkpoint.
    assert checkpoints.latest is None and not (tmp_path / "7").exists()
    writer.finish()
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest == 7
    restored, progress = checkpoints.restore(7, placed(state))
    assert progress == PROGRESS
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_same_bits(restored, state)
    checkpoints.save(8, state, {})  # it is a checkpoint among others
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["7", "8"]
    with pytest.raises(UserError, match="7 exists"):
        CheckpointWriter(tmp_path / "7", like, PROGRESS)


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 600])
def test_what_the_runner_saved_is_read_by_slices(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk_bytes)
    state = random_state(CONFIG)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, state, PROGRESS)
    checkpoints.close()
    reader = CheckpointReader(tmp_path / "4")
    assert reader.progress == PROGRESS
    assert_same_bits({n: reader.read(n) for n in reader.leaves}, by_name(state))
    up = np.asarray(state.params["layers"]["mlp"]["up"])
    got = reader.read("params/layers/mlp/up", (slice(1, 2), np.array([3, 3, 11]), slice(None)))
    np.testing.assert_array_equal(got, up[1:2][:, [3, 3, 11]])
    whole = (2, *up.shape[1:])
    assert (reader.chunk("params/layers/mlp/up") == whole) == (chunk_bytes > 600)
    assert reader.chunk("params/layers/mlp/up")[0] == (2 if chunk_bytes > 600 else 1)


def test_half_precision_is_kept(tmp_path):
    tree = {"params": {"a": jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4) / 7}}
    writer = CheckpointWriter(tmp_path / "0", tree, {})
    writer.write("params/a", None, np.asarray(tree["params"]["a"]))
    writer.finish()
    assert_same_bits({"params/a": CheckpointReader(tmp_path / "0").read("params/a")}, by_name(tree))


def test_pieces_are_consecutive_even_and_within_the_limit():
    rng = np.random.default_rng(0)
    for _ in range(200):
        shape = tuple(rng.integers(1, 30, rng.integers(0, 5)).tolist())
        limit = int(rng.integers(4, 5000))
        chunk = chunk_shape(shape, 4, limit)
        assert 4 * np.prod(chunk, dtype=int) <= limit or limit < 4
        cut = [d for d, (c, n) in enumerate(zip(chunk, shape, strict=True)) if c < n]
        assert all(c == 1 for c in chunk[: max(cut, default=0)])
        for c, n in zip(chunk, shape, strict=True):  # padding at the end: less than a row a piece
            assert -(-n // c) * c - n < -(-n // c)


def test_another_checkpoint_begun_in_the_same_place_is_refused(tmp_path):
    like = {"a": jax.ShapeDtypeStruct((4, 3), np.float32)}
    CheckpointWriter(tmp_path / "1", like, PROGRESS)
    CheckpointWriter(tmp_path / "1", like, PROGRESS)
    wider = {"a": jax.ShapeDtypeStruct((4, 5), np.float32)}
    for other in ((wider, PROGRESS), (like, {}), (like, PROGRESS, {"a": (1, 3)})):
        with pytest.raises(UserError, match=r"1\.partial: another checkpoint was begun here"):
            CheckpointWriter(tmp_path / "1", *other)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="is no checkpoint"):
            CheckpointReader(path)


@contextlib.contextmanager
def files_of_at_most(size):
    """The disk refuses larger ones."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_refuses_is_one_line_and_the_rest_goes_on(tmp_path):
    like = {"a": jax.ShapeDtypeStruct((8, 10_000), np.float32)}
    values = np.random.default_rng(0).normal(size=(8, 10_000)).astype(np.float32)
    begin = functools.partial(CheckpointWriter, tmp_path / "1", like, {}, {"a": (2, 10_000)})
    with files_of_at_most(30), pytest.raises(UserError, match=r"1 cannot be written \(File too"):
        begin()
    assert not list(tmp_path.iterdir())
    writer = begin()
    first, second, *rest = writer.pieces("a")
    writer.write("a", first, values[first])
    with (
        files_of_at_most(50_000),
        pytest.raises(UserError, match=r"a cannot be written \(File too"),
    ):
        writer.write("a", second, values[second])
    assert writer.holds("a", first) and not writer.holds("a", second)
    with pytest.raises(ValueError, match="never written"):
        writer.finish()
    writer = begin()
    assert writer.holds("a", first)
    for piece in (second, *rest):
        writer.write("a", piece, values[piece])
    writer.finish()
    np.testing.assert_array_equal(CheckpointReader(tmp_path / "1").read("a"), values)
