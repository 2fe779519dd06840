"""Damaged and missing files of a run: every reader notices, a run continues where it can."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flm_jax.errors import DamageError, Exit, UserError
from flm_jax.interop.opening import open_model, open_state
from flm_jax.runs.loop import run_stages
from flm_jax.store import audit, checkpoint, integrity
from flm_jax.store.checkpoint import Checkpoints, by_name
from flm_jax.store.chunk_writer import CheckpointWriter
from flm_jax.store.chunked import CheckpointReader
from flm_jax.store.lineage import RunFolder
from tests import damage, runs
from tests.commands import call
from tests.runs import BYTES
from tests.test_loop import Measure, a_stage, saved

PROGRESS = {"data": {"place": 3}, "wall_s": 1.5}


def a_state():
    key = jax.random.key(0)
    return {
        "params": {"a": jax.random.normal(key, (64, 64)), "b": jnp.arange(7)},
        "opt": {"m": jax.random.normal(key, (3, 5)).astype(jnp.bfloat16), "n": jnp.int32(4)},
    }


def as_structs(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def by_orbax(path, state):
    """Writes a checkpoint as the training loop does."""
    checkpoints = Checkpoints(path.parent)
    checkpoints.save(int(path.name), state, PROGRESS, loss=2.0)
    checkpoints.close()


def by_pieces(path, state):
    """Writes a checkpoint as growth from disk to disk does."""
    writer = CheckpointWriter(path, state, PROGRESS)
    for name, x in by_name(state).items():
        writer.write(name, None, np.asarray(x))
    writer.finish()


def restored(path, like):
    """Reads a checkpoint as a resumed run does."""
    checkpoints = Checkpoints(path.parent)
    try:
        assert checkpoints.latest == checkpoints.best == int(path.name)
        state, progress = checkpoints.restore(int(path.name), like)
    finally:
        checkpoints.close()
    return by_name(state), progress


def read(path, like):
    """Reads a checkpoint as conversion, generation and growth on disk do: in parts."""
    reader = CheckpointReader(path)
    leaves = {name: reader.read(name) for name in reader.leaves}
    row = reader.read("params/a", (slice(5, 6), slice(None)))
    np.testing.assert_array_equal(row, leaves["params/a"][5:6])
    return leaves, reader.progress


def same(got, state):
    leaves, progress = got
    want = by_name(state)
    return progress == PROGRESS and all(
        leaves[name].dtype == x.dtype and np.array_equal(leaves[name], x)
        for name, x in want.items()
    )


def attempts(tmp_path, write, kinds, seeds):
    """Damages each file of a checkpoint in each way, and reads it with each reader.

    Returns the outcomes: "noticed", "same" or "wrong", each with file, kind and reader.
    """
    state = a_state()
    like = as_structs(state)
    whole = tmp_path / "whole"
    write(whole / "1", state)
    for reader in (restored, read):
        assert same(reader(whole / "1", like), state)
    outcomes = []
    for file in damage.files_of(whole):
        for kind in kinds:
            for seed in range(seeds):
                copy = tmp_path / "copy"
                shutil.copytree(whole, copy)
                damage.inflict(copy / file.relative_to(whole), kind, seed)
                for reader in (restored, read):
                    try:
                        outcome = "same" if same(reader(copy / "1", like), state) else "wrong"
                    except DamageError as error:
                        assert error.status == Exit.DAMAGE and str(copy / "1") in str(error)
                        outcome = "noticed"
                    outcomes.append((outcome, file.name, kind, reader.__name__))
                shutil.rmtree(copy)
    return outcomes


@pytest.mark.parametrize("write", [by_orbax, by_pieces])
def test_every_reader_notices_a_flipped_bit_in_any_file(tmp_path, write):
    outcomes = attempts(tmp_path, write, ["bit"], 1)
    assert not [x for x in outcomes if x[0] == "wrong"]
    assert [x[0] for x in outcomes].count("noticed") >= 8


@pytest.mark.slow
@pytest.mark.parametrize("write", [by_orbax, by_pieces])
def test_every_reader_notices_every_kind_of_damage(tmp_path, write):
    outcomes = attempts(tmp_path, write, list(damage.KINDS), 5)
    assert not [x for x in outcomes if x[0] == "wrong"]
    assert [x[0] for x in outcomes].count("noticed") > len(outcomes) / 3


def test_without_the_checks_a_flipped_bit_is_silently_wrong(tmp_path, monkeypatch):
    """Negative control of the two tests above."""
    monkeypatch.setattr(
        checkpoint.tensorstore_utils,
        "_build_zarr3_metadata",
        checkpoint.tensorstore_utils._build_zarr3_metadata.__wrapped__,
    )
    monkeypatch.setattr(checkpoint.integrity, "sealed", lambda metadata, leaves, loss: metadata)
    state, path = a_state(), tmp_path / "run" / "1"
    by_orbax(path, state)
    data = max(damage.files_of(path), key=lambda file: file.stat().st_size)
    damage.inflict(data, "bit", 1)
    assert not same(read(path, None), state)


def test_empty_nodes_of_a_state_have_no_arrays(tmp_path):
    """As the state of optax.sgd without momentum has."""
    state = a_state() | {"none": (), "nested": [{}, optax.sgd(0.1).init(jnp.ones(2))]}
    by_orbax(tmp_path / "3", state)
    leaves, _ = read(tmp_path / "3", as_structs(state))
    assert sorted(leaves) == sorted(by_name(a_state()))
    assert sorted(restored(tmp_path / "3", as_structs(state))[0]) == sorted(leaves)


def test_the_error_names_the_array(tmp_path):
    path = tmp_path / "1"
    by_pieces(path, a_state())
    data = max(damage.files_of(path), key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    content[content.index(np.asarray(a_state()["params"]["a"]).tobytes()[:64]) + 9] ^= 1
    data.write_bytes(content)
    with pytest.raises(DamageError, match=r"1 is damaged: params/a \("):
        CheckpointReader(path).read("params/a", (slice(0, 2), slice(None)))
    assert list(audit.damage(path)) == ["params/a"]
    CheckpointReader(path).read("params/b")  # the other arrays are intact


def test_both_writers_put_checksums_on_disk(tmp_path):
    """Orbax gets them through a private function; an update of orbax may lose them."""
    for name, write in (("1", by_orbax), ("2", by_pieces)):
        write(tmp_path / name / name, a_state())
        reader = CheckpointReader(tmp_path / name / name)
        assert all(map(integrity.has_checksums, reader._arrays.values()))


def test_damage_that_one_process_finds_is_known_to_all(tmp_path, monkeypatch):
    path = tmp_path / "1"
    by_orbax(path, a_state())
    audit.check_together(path)
    found = {"opt/m": "1 is damaged: opt/m"}
    monkeypatch.setattr(audit.processes, "everyone", lambda mine: [mine, found])
    with pytest.raises(DamageError, match="1 is damaged: opt/m"):
        audit.check_together(path)


def test_a_value_that_is_not_finite_counts_as_damage(tmp_path):
    state = a_state()
    state["opt"]["m"] = state["opt"]["m"].at[1, 2].set(jnp.nan)
    path = tmp_path / "1"
    by_orbax(path, state)
    assert list(audit.damage(path)) == ["opt/m"]
    with pytest.raises(DamageError, match="opt/m has values that are NaN"):
        restored(path, as_structs(state))


def test_a_checkpoint_of_an_earlier_version_has_no_checksums_and_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.integrity, "sealed", lambda metadata, leaves, loss: metadata)
    monkeypatch.setattr(
        checkpoint.tensorstore_utils,
        "_build_zarr3_metadata",
        checkpoint.tensorstore_utils._build_zarr3_metadata.__wrapped__,
    )
    by_orbax(tmp_path / "1", a_state())
    monkeypatch.undo()
    assert same(read(tmp_path / "1", None), a_state())


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A stage with checkpoints 3, 6 and 7 that is not finished, and the digest of its end."""
    run = RunFolder(tmp_path_factory.mktemp("integrity") / "half")
    run_stages([a_stage(Measure(), save_every=3)], run)
    assert saved(run) == [3, 6, 7]
    digest = run.finished_stage()["params_digest"]
    run.lineage.unlink()
    return run.path, digest


def resumed(half, tmp_path, kind, seed, among):
    """Damages one of the files `among(run)`, and resumes; returns the run."""
    run = RunFolder(tmp_path / "run")
    shutil.copytree(half, run.path)
    files = among(run.path / "stages/0-s/checkpoints")
    damage.inflict(files[seed % len(files)], kind, seed)
    run_stages([a_stage(Measure(), save_every=3)], run)
    return run


def newest(folder):
    return damage.files_of(folder / "7" / "state" / "ocdbt.process_0" / "d")


def test_a_run_continues_from_the_newest_intact_checkpoint(half, tmp_path, capsys):
    folder, digest = half
    run = resumed(folder, tmp_path, "zeroed", 3, newest)
    entry = run.finished_stage()
    assert entry["params_digest"] == digest  # nothing is lost but the steps since then
    (row,) = entry["damage"]
    assert row["checkpoint"] == "stages/0-s/checkpoints/7" and row["step"] == 7
    assert (run.path / row["moved_to"]).is_dir() and row["moved_to"] == "stages/0-s/damaged/7"
    assert run.stage(0, "s").metrics.rows("damage") == entry["damage"]
    lines = [x for x in capsys.readouterr().err.splitlines() if "damaged" in x]
    assert len(lines) == 1 and "moved to stages/0-s/damaged/7" in lines[0]
    assert saved(run) == [3, 6, 7]


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(damage.KINDS))
def test_a_run_survives_damage_of_any_file_of_a_checkpoint(half, tmp_path, kind):
    folder, digest = half
    for seed in range(4):
        run = resumed(folder, tmp_path, kind, seed, lambda path: damage.files_of(path / "7"))
        assert run.finished_stage()["params_digest"] == digest
        shutil.rmtree(run.path)


@pytest.mark.slow
def test_without_any_intact_checkpoint_the_stage_starts_again(half, tmp_path):
    folder, digest = half
    run = RunFolder(tmp_path / "run")
    shutil.copytree(folder, run.path)
    for step in (3, 6, 7):
        place = run.path / f"stages/0-s/checkpoints/{step}/state/ocdbt.process_0/d"
        damage.inflict(damage.files_of(place)[0], "deleted", step)
    run_stages([a_stage(Measure(), save_every=3)], run)
    entry = run.finished_stage()
    assert entry["params_digest"] == digest and len(entry["damage"]) == 3


def test_a_missing_config_is_no_default(half, tmp_path):
    folder, _ = half
    run = RunFolder(tmp_path / "run")
    shutil.copytree(folder, run.path)
    run.stage(0, "s").config.unlink()
    with pytest.raises(DamageError, match=r"config\.json is missing .*--repair"):
        run_stages([a_stage(Measure(), save_every=3)], run)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A run with two stages that can be opened."""
    return pathlib.Path(runs.save(tmp_path_factory.mktemp("models") / "run", [BYTES, BYTES])[0])


READERS = {
    "open_model": lambda run: open_model(str(run)),
    "generate": lambda run: _command(
        "generate", f"--checkpoint={run}", "--prompt=a", "--max_new_tokens=1"
    ),
    "convert": lambda run: _command(
        "convert", f"--source={run}", f"--target={run.parent / 'export'}", "--format=flm"
    ),
}


def _command(*words):
    status, _, err = call(*words)
    if status == Exit.DAMAGE:
        assert len(err.strip().splitlines()) == 1
        raise DamageError(err)
    assert status == 0, err


@pytest.mark.parametrize("reader", READERS)
def test_the_commands_end_with_the_status_of_damage(models, tmp_path, reader):
    run = tmp_path / "run"
    shutil.copytree(models, run)
    READERS[reader](run)
    shutil.rmtree(tmp_path / "export", ignore_errors=True)
    data = damage.files_of(run / "stages/1-s1/checkpoints/7/state/ocdbt.process_0/d")
    # Not every bit of it is used.
    damage.inflict(max(data, key=lambda file: file.stat().st_size), "foreign", 0)
    with pytest.raises(DamageError, match="checkpoints/7 is damaged"):
        READERS[reader](run)
    assert not (tmp_path / "export").exists()


def test_readers_refuse_what_is_missing(models, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(models, run)
    (run / "lineage.json").rename(run / "kept")
    with pytest.raises(DamageError, match=r"lineage\.json is missing .*--repair"):
        open_model(str(run))
    (run / "kept").rename(run / "lineage.json")
    (run / "stages/1-s1/config.json").unlink()
    with pytest.raises(DamageError, match=r"config\.json is missing"):
        open_model(str(run))
    with pytest.raises(UserError):
        open_state(str(run))
