"""Reads and writes checkpoints slice by slice, and grows from disk to disk as in memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import growth
from flm_jax.errors import UserError
from flm_jax.growth import stream
from flm_jax.store import checkpoint
from flm_jax.store.checkpoint import Checkpoints, by_name
from flm_jax.store.chunk_writer import CheckpointWriter
from flm_jax.store.chunked import CheckpointReader, cells, chunk_shape
from tests.models import SMALL, changed
from tests.states import assert_same_bits, files_of_at_most, random_state

PROGRESS = {"data": {"place": [3, 1]}, "wall_s": 1.5}
CONFIG = changed(SMALL, dtype="float32")


def placed(tree):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)


@pytest.mark.parametrize("limit", [1 << 20, 300])
def test_a_written_checkpoint_is_what_the_runner_restores(tmp_path, limit):
    state = random_state(CONFIG)
    like = jax.eval_shape(lambda: state)
    chunks = {n: chunk_shape(x.shape, 4, limit) for n, x in by_name(like).items()}
    writer = CheckpointWriter(tmp_path / "7", like, PROGRESS, chunks, batch_bytes=1)
    checkpoints = Checkpoints(tmp_path)
    for n, (name, x) in enumerate(by_name(state).items()):
        if n == 3:  # as if the process was killed and started again
            writer = CheckpointWriter(tmp_path / "7", like, PROGRESS, chunks, batch_bytes=1)
        for piece in writer.pieces(name):
            assert not writer.holds(name, piece)
            writer.write(name, piece, np.asarray(x)[piece])
            assert writer.holds(name, piece)
    # It does not count as a checkpoint until it is finished.
    assert checkpoints.latest is None and not (tmp_path / "7").exists()
    writer.finish()
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest == 7
    restored, progress = checkpoints.restore(7, placed(state))
    assert progress == PROGRESS
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_same_bits(restored, state)
    checkpoints.save(8, state, {})  # other checkpoints can be saved beside it
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
        for c, n in zip(chunk, shape, strict=True):  # padding at the end: less than a row per piece
            assert -(-n // c) * c - n < -(-n // c)


def test_another_checkpoint_started_in_the_same_place_is_refused(tmp_path):
    like = {"a": jax.ShapeDtypeStruct((4, 3), np.float32)}
    CheckpointWriter(tmp_path / "1", like, PROGRESS)
    CheckpointWriter(tmp_path / "1", like, PROGRESS)
    wider = {"a": jax.ShapeDtypeStruct((4, 5), np.float32)}
    for other in ((wider, PROGRESS), (like, {}), (like, PROGRESS, {"a": (1, 3)})):
        with pytest.raises(UserError, match=r"1\.partial: another checkpoint was started here"):
            CheckpointWriter(tmp_path / "1", *other)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="is no checkpoint"):
            CheckpointReader(path)


def test_a_disk_that_refuses_is_one_line_and_the_rest_goes_on(tmp_path):
    like = {"a": jax.ShapeDtypeStruct((8, 10_000), np.float32)}
    values = np.random.default_rng(0).normal(size=(8, 10_000)).astype(np.float32)
    begin = functools.partial(CheckpointWriter, tmp_path / "1", like, {}, {"a": (2, 10_000)}, 1)
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


class Held:
    """A source or target in memory, used instead of a checkpoint on disk."""

    def __init__(self, like, chunks=None):
        self.leaves = checkpoint.shapes(like)
        self.chunks = {n: x.shape for n, x in self.leaves.items()} | (chunks or {})
        self.arrays = {n: np.asarray(x) for n, x in by_name(like).items() if hasattr(x, "devices")}
        self.written = set()

    def read(self, name, slices=None):
        array = self.arrays[name]
        index = [np.arange(n) if slices is None else np.arange(n)[s]
                 for n, s in zip(array.shape, slices or array.shape, strict=True)]  # fmt: skip
        return array[np.ix_(*index)] if index else array

    def chunk(self, name):
        return tuple(1 for _ in self.leaves[name].shape)

    def pieces(self, name):
        return cells(self.leaves[name].shape, self.chunks[name])

    def holds(self, name, piece):
        return (name, str(piece)) in self.written

    def write(self, name, piece, values):
        x = self.leaves[name]
        array = self.arrays.setdefault(name, np.full(x.shape, 77, x.dtype))
        array[piece or ...] = values
        self.written.add((name, str(piece)))


BIG = changed(
    CONFIG, num_layers=5, d_model=18, d_ff=30, num_heads=9, num_kv_heads=3, output_mult=1.9
)
TILED = changed(CONFIG, num_layers=4, d_model=36, d_ff=60, num_heads=4, input_mult=0.9)


def names_of(tree):
    return jax.tree.unflatten(jax.tree.structure(tree), list(by_name(tree)))


def streamed(state, plan, key, limit):
    want = jax.eval_shape(functools.partial(growth.grow, plan=plan), state, key=key)
    source, memory = Held(state), limit * stream.WORKERS * stream._COPIES
    target = Held(want, stream.chunks(plan, checkpoint.shapes(want), source, memory))
    done = []
    total = stream.grow(source, target, names_of(state), plan, key, done.append)
    assert sum(done) == total == sum(x.nbytes for x in target.arrays.values())
    return target


def grown_state(config=CONFIG):
    """A random state; some entries of Adam's moments are too small for normal floats."""
    state = random_state(config, 3)
    adam = state.opt_state[1]
    tiny = jax.tree.map(lambda x: x * jnp.where(x > 0, jnp.float32(1e-30), 1), adam.nu)
    nu = jax.tree.map(lambda x: x * jnp.where(x > 0, jnp.float32(1e-9), 1), tiny)
    adam = adam._replace(nu=nu)
    return dataclasses.replace(state, opt_state=(state.opt_state[0], adam, *state.opt_state[2:]))


@pytest.mark.filterwarnings("ignore::flm_jax.growth.LockedCopiesWarning")
@pytest.mark.parametrize(
    ("recipe", "big", "how", "limit"),
    [
        ("msg", BIG, {"moments": "asym"}, 500),
        pytest.param("aki,layers=stack", BIG, {"moments": "dual", "rates": "carry"}, 900,
                     marks=pytest.mark.slow),
        pytest.param("zero_pad", BIG, {"moments": "dual", "rates": "ramp"}, 150,
                     marks=pytest.mark.slow),
        pytest.param("tile,identity", TILED, {"moments": "asym", "rates": "carry"}, 700,
                     marks=pytest.mark.slow),
        pytest.param("net2net,fresh", BIG, {"moments": "asym"}, 300, marks=pytest.mark.slow),
        pytest.param("repeat,mlp=uneven,interpose", "heads", {"moments": "reset"}, 200,
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_growth_by_pieces_has_the_bits_of_growth_in_memory(recipe, big, how, limit):
    if big == "heads":
        big = changed(CONFIG, num_kv_heads=4, d_ff=60, num_layers=3)
    if "zero" in recipe:
        big = changed(big, rms_norm_eps=growth.norm_eps(CONFIG, big, recipe))
    plan = growth.plan(CONFIG, big, recipe, layer_distances=[0.3, 0.1], **how)
    state, key = grown_state(), jax.random.key(11)
    want = jax.jit(functools.partial(growth.grow, plan=plan))(state, key=key)
    target = streamed(state, plan, key, limit)
    assert_same_bits(target.arrays, by_name(want))
    assert all(name in target.chunks for name in by_name(want))
    assert any(len(list(target.pieces(n))) > 3 for n in target.leaves)


@pytest.mark.slow
def test_moments_in_bfloat16_grow_by_pieces_alike():
    state, key = grown_state(), jax.random.key(11)
    adam = state.opt_state[1]
    mu, nu = (
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), moment) for moment in (adam.mu, adam.nu)
    )
    rest = (state.opt_state[0], adam._replace(mu=mu, nu=nu), *state.opt_state[2:])
    state = dataclasses.replace(state, opt_state=rest)
    plan = growth.plan(CONFIG, BIG, "msg", moments="asym")
    want = jax.jit(functools.partial(growth.grow, plan=plan))(state, key=key)
    assert want.opt_state[1].nu["head"].dtype == jnp.bfloat16
    assert_same_bits(streamed(state, plan, key, 500).arrays, by_name(want))


KEY = jax.random.key(11)
UP = "params/layers/mlp/up"
WIDE = growth.plan(CONFIG, changed(CONFIG, d_ff=30), "msg")


class Shifted(Held):
    """A source that reads parameter `UP` shifted by one slot."""

    def read(self, name, slices=None):
        values = super().read(name, slices)
        return np.roll(values, 1, axis=-1) if name == UP else values


def streamed_up(source, key=KEY):
    """Parameter `UP` after a growth piece by piece."""
    state = grown_state()
    want = jax.eval_shape(functools.partial(growth.grow, plan=WIDE), state, key=key)
    target = Held(want, {UP: (1, 5, 30)})
    stream.grow(source, target, names_of(state), WIDE, key)
    return target.arrays[UP]


def test_a_piece_from_the_wrong_place_is_noticed():
    """Negative controls of the test above: another key; sources shifted by one slot."""
    state = grown_state()
    want = jax.jit(functools.partial(growth.grow, plan=WIDE))
    want = np.asarray(want(state, key=KEY).params["layers"]["mlp"]["up"])
    new = WIDE.by_axis["mlp"].new
    np.testing.assert_array_equal(streamed_up(Held(state)), want)
    other = streamed_up(Held(state), jax.random.key(12))
    np.testing.assert_array_equal(other[..., ~new], want[..., ~new])
    assert (other[..., new] != want[..., new]).all()
    assert (streamed_up(Shifted(state))[..., ~new] != want[..., ~new]).all()
