"""Several processes, and growth between meshes: every layout gives the same numbers."""

import contextlib
import dataclasses
import functools
import json
import shutil
import signal
import socket
import time

import chex
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from flm_jax import growth
from flm_jax.config import MESH_AXES, ExperimentConfig, MeshConfig, StageConfig
from flm_jax.errors import Exit, UserError
from flm_jax.params import sharding
from flm_jax.params.digest import params_digest
from flm_jax.runtime import processes
from flm_jax.store.lineage import identity
from flm_jax.train.train_step import init_state
from tests.commands import mistake, run, start
from tests.models import TABLE, TINY, TINY_GROWN, grow, optimizer, stage_of
from tests.runs import lineage

CHAIN = ("train", "--config=tests/tiny_chain.py")
MESHES = [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2), MeshConfig(1, 4, 2), MeshConfig(1, 1, 8)]


# --- In one process ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("order", [np.arange(8), np.array([0, 4, 1, 5, 2, 6, 3, 7])], ids=str)
def test_a_process_gets_the_rows_that_its_devices_need(monkeypatch, shape, count, order):
    """For any assignment of devices to processes, and for batches that do not divide."""
    like = sharding.make_mesh(shape)
    mesh = Mesh(like.devices.reshape(-1)[order].reshape(like.devices.shape), like.axis_names)
    needed = NamedSharding.devices_indices_map

    for process in range(count):
        mine = jax.devices()[process * 8 // count : (process + 1) * 8 // count]
        monkeypatch.setattr(
            NamedSharding,
            "addressable_devices_indices_map",
            lambda self, s, mine=mine: {d: at for d, at in needed(self, s).items() if d in mine},
        )
        for rows in (16, 4):
            index, parts = sharding.share_of_batch(rows, mesh)
            assert 0 <= index < parts and rows % parts == 0
            part = range(rows * index // parts, rows * (index + 1) // parts)
            if rows == 4 and 4 % (shape.data * shape.fsdp):
                assert (index, parts) == (0, 1)
            places = needed(NamedSharding(mesh, sharding.BATCH), (16,))
            if rows == 16:
                for device in mine:
                    first, last, _ = places[device][0].indices(16)
                    assert first in part and last - 1 in part
                if shape.tensor == 1 and (order == np.arange(8)).all():
                    assert parts == count  # no process reads what it does not need


def test_a_placed_batch_is_the_batch():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    for rows in (8, 3):  # split over the devices, and whole on every device
        x = np.arange(rows * 5).reshape(rows, 5)
        placed = sharding.place_batch({"x": x}, mesh)["x"]
        np.testing.assert_array_equal(placed, x)
        assert placed.addressable_shards[0].data.shape[0] == (2 if rows == 8 else 3)


@functools.cache
def fresh():
    tx = optimizer(stage_of(TINY))
    return jax.device_get(jax.jit(lambda: init_state(TINY, tx, jax.random.key(0)))())


def start_on(mesh):
    return jax.device_put(fresh(), sharding.shardings(fresh(), TABLE, mesh))


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True])
def test_growth_between_meshes_is_bit_identical(turned):
    """Also if the meshes order the devices differently."""
    plan = growth.plan(TINY, TINY_GROWN)
    old, target = (sharding.make_mesh(m) for m in (MeshConfig(2, 2, 2), MeshConfig(1, 8, 1)))
    if turned:
        target = Mesh(target.devices[:, ::-1], target.axis_names, axis_types=target.axis_types)
    here = grow(fresh(), plan, jax.random.key(1))
    source = start_on(old)
    layouts = sharding.Layout(old), sharding.Layout(target)
    there = growth.grow_on_mesh(source, plan, jax.random.key(1), *layouts)
    up = there.params["layers"]["mlp"]["up"]
    assert up.sharding.mesh == target and up.addressable_shards[0].data.size == up.size // 8
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(source))
    chex.assert_trees_all_equal(jax.device_get(here), jax.device_get(there))
    # Negative control: another key gives other parameters.
    other = grow(fresh(), plan, jax.random.key(2))
    assert params_digest(other.params) != params_digest(there.params)


def test_a_stages_mesh_is_not_part_of_its_identity():
    stages = (stage_of(TINY), dataclasses.replace(stage_of(TINY_GROWN), name="b", steps=200))
    config = ExperimentConfig(stages=stages, mesh=MeshConfig(8))
    own = dataclasses.replace(stages[1], mesh=MeshConfig(1, 8))
    moved = dataclasses.replace(config, stages=(stages[0], own))
    assert [moved.mesh_of(n) for n in (0, 1)] == [MeshConfig(8), MeshConfig(1, 8)]
    assert identity(config, 1, "x") == identity(moved, 1, "x")
    assert isinstance(moved.stages[1], StageConfig)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"coordinator": "a:1"}, ("process, processes is missing", "coordinator")),
        ({"process": 0, "processes": 2}, ("coordinator is missing",)),
        ({"coordinator": "a:1", "process": 2, "processes": 2}, ("process=2", "0 to 1")),
        ({"coordinator": "a:1", "process": 0, "processes": 0}, ("processes=0",)),
        ({"coordinator": "a", "process": 0, "processes": 1}, ("coordinator=a", "HOST:PORT")),
        ({"coordinator": "a:b", "process": 0, "processes": 1}, ("coordinator=a:b",)),
        ({"distributed": True, "process": 0}, ("distributed", "process")),
        ({"lost_after": 0}, ("lost_after=0",)),
    ],
)
def test_a_group_that_does_not_fit_is_refused(given, words):
    with pytest.raises(UserError) as error:
        processes.Group(**given)
    assert all(word in str(error.value) for word in words), error.value


def test_a_single_process_decides_alone():
    with processes.joined(processes.Group()):
        assert processes.first()
        assert processes.once(lambda: {1: "kept as it is"}) == {1: "kept as it is"}
        assert int(processes.largest(7)) == 7
        processes.check_same("a value", "x")


# --- In several processes ----------------------------------------------------------------------


def free_port():
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start_group(*args, devices):
    """Starts the command in several processes; `devices`: of each."""
    group = (f"--coordinator=localhost:{free_port()}", f"--processes={len(devices)}")
    return [
        start(*args, *group, "--lost_after=20", f"--process={i}", devices=n)
        for i, n in enumerate(devices)
    ]


def start_two(*args):
    """Starts the command in two processes with four devices each."""
    return start_group(*args, devices=(4, 4))


def ended(started, timeout=400):
    """Returns each process's status, output, and lines of standard error without Gloo's log."""
    results = []
    for process in started:
        out, err = process.communicate(timeout=timeout)
        lines = [line for line in err.splitlines() if "[Gloo]" not in line]
        results.append((process.returncode, out, lines))
    return results


def wait_for(pattern, workdir, started, timeout=400):
    end = time.monotonic() + timeout
    while not list(workdir.glob(pattern)):
        for process in started:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"no {pattern}"
        time.sleep(0.02)


def evaluations(workdir):
    """Returns the validation bits per byte of every evaluated step of the chain."""
    rows = []
    for stage in ("0-small", "1-large"):
        text = (workdir / "stages" / stage / "metrics.jsonl").read_text()
        rows += [json.loads(line) for line in text.splitlines()]
    return np.array([row["bpb"] for row in rows if row["kind"] == "eval"])


def assert_same_run(workdir, other):
    """Compares two runs up to float32 rounding; the measured difference is 8e-8."""
    ours, theirs = evaluations(workdir), evaluations(other)
    assert len(ours) == len(theirs) == 14 and theirs[0] - theirs[-1] > 0.5
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    for one, two in zip(lineage(workdir), lineage(other), strict=True):
        assert one["config_digest"] == two["config_digest"]
        assert (one["receipt"] is None) == (two["receipt"] is None)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The chain in one process with eight devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    ((status, _, err),) = ended([start(*CHAIN, f"--workdir={workdir}", devices=8)])
    assert status == 0, err
    return workdir


@pytest.mark.slow
def test_two_processes_killed_stopped_and_resumed_train_like_one(alone, tmp_path):
    """If one is killed, the other ends; a signal to one stops both; the results are the same."""
    workdir = tmp_path / "run"
    started = start_two(*CHAIN, f"--workdir={workdir}")
    wait_for("stages/0-small/checkpoints/3", workdir, started)
    started[1].kill()
    killed = time.monotonic()
    (status, _, lines), _ = ended(started)
    assert time.monotonic() - killed < 60
    assert status == Exit.LOST
    assert "process 0 of 2: another process was lost; start all of them again" in lines[-1]
    # No traceback from this package. orbax logs one if the kill comes during a save.
    assert not any("flm_jax/commands" in line for line in lines)

    started = start_two(*CHAIN, f"--workdir={workdir}")
    wait_for("stages/0-small/checkpoints/6", workdir, started)
    started[1].send_signal(signal.SIGTERM)
    (one, _, lines), (two, _, theirs) = ended(started)
    assert one == two == Exit.PREEMPTED, lines + theirs
    assert "SIGTERM: stopped at step" in lines[-1] and lines[-1] == theirs[-1]

    for status, out, lines in ended(start_two(*CHAIN, "--json", f"--workdir={workdir}")):
        assert status == 0, lines
        assert json.loads(out)["stages"] == lineage(workdir)
    assert_same_run(workdir, alone)
    receipts = [lineage(w)[1]["receipt"] for w in (workdir, alone)]
    for name in ("dead_slots", "locked_copies", "layer_map", "exactness"):
        assert receipts[0][name] == receipts[1][name]
    assert receipts[0]["max_abs_logit_diff"] < 1e-4 * receipts[0]["logit_scale"]


@pytest.mark.slow
def test_a_checkpoint_resumes_in_another_layout(alone, tmp_path):
    """From 8 devices to 4, with a growth onto another mesh, then to 2 processes with 4 each."""
    workdir = tmp_path / "run"
    shutil.copytree(alone / "stages" / "0-small", workdir / "stages" / "0-small")
    shutil.rmtree(workdir / "stages" / "0-small" / "checkpoints" / "12")

    def layout(first, second):
        """The command with these meshes of its two stages."""
        meshes = {"config.mesh": first, "config.stages[1].mesh": second}
        sizes = [
            f"--{name}.{axis}={getattr(mesh, axis)}"
            for name, mesh in meshes.items()
            for axis in MESH_AXES
        ]
        return (CHAIN[0], f"{CHAIN[1]}:relayout", f"--workdir={workdir}", *sizes)

    four = [start(*layout(MeshConfig(1, 2, 2), MeshConfig(1, 4, 1)), devices=4)]
    wait_for("stages/1-large/checkpoints/15", workdir, four)
    four[0].send_signal(signal.SIGTERM)
    ((status, _, lines),) = ended(four)
    assert status == Exit.PREEMPTED, lines
    two = start_two(*layout(MeshConfig(8, 1, 1), MeshConfig(2, 1, 4)))
    for status, _, lines in ended(two):
        assert status == 0, lines
    assert_same_run(workdir, alone)


@pytest.mark.slow
def test_after_losing_hosts_the_others_finish_the_run(alone, tmp_path):
    """Of four processes two are killed; the same command resumes on two, with a mesh for them.

    The checkpoints come by wall time, so each needs all processes to agree on its step.
    """
    workdir = tmp_path / "run"
    command = (*CHAIN, f"--workdir={workdir}", "--config.mesh.data=1")
    by_time = ("--config.checkpoint.every_steps=0", "--config.checkpoint.every_minutes=1e-6")
    four = start_group(*command, *by_time, devices=(1, 1, 1, 1))
    wait_for("stages/0-small/checkpoints/6", workdir, four)
    for lost in four[2:]:
        lost.kill()
    statuses = [status for status, _, _ in ended(four)]
    assert statuses == [Exit.LOST, Exit.LOST, -signal.SIGKILL, -signal.SIGKILL]
    assert not (workdir / "lineage.json").exists()

    two = start_group(*command, "--config.mesh.tensor=1", devices=(1, 1))
    for status, _, lines in ended(two):
        assert status == 0, lines
    assert_same_run(workdir, alone)
    time_spent = lineage(workdir)[0]["goodput"]["seconds"]
    assert time_spent["down"] > 0 and time_spent["steps"] > 0


@pytest.mark.slow
def test_unequal_processes_are_named_before_anything_runs(tmp_path):
    """`flm doctor` describes them; `flm train` refuses them, and writes nothing."""
    told = "process 1 sees 2 devices, but process 0 sees 4"
    for status, out, _ in ended(start_group("doctor", "--json", devices=(4, 2))):
        assert status == 1 and json.loads(out)["problems"] == [told]
    for status, out, lines in ended(start_group("doctor", "--json", devices=(2, 2))):
        assert status == 0, lines
        assert [one["process"] for one in json.loads(out)["processes"]] == [0, 1]
    workdir = tmp_path / "run"
    for status, _, lines in ended(start_group(*CHAIN, f"--workdir={workdir}", devices=(4, 2))):
        assert status == Exit.MISTAKE and told in lines[-1]
    assert not workdir.exists()


@pytest.mark.slow
def test_mistakes_of_a_group_are_refused_in_every_process(tmp_path):
    """Every process prints one line and exits with status 2; nothing is written."""
    new = tmp_path / "new"
    port = free_port()
    args = (*CHAIN, f"--workdir={new}", "--processes=2", f"--coordinator=localhost:{port}")
    line = mistake(*args, "--process=1", "--join_within=2", by=run)
    assert "process 0 did not answer within 2 s" in line
    with contextlib.closing(socket.create_server(("", port))):
        assert f"cannot listen on port {port}" in mistake(*args, "--process=0", by=run)
    assert not new.exists()

    (tmp_path / "thesis.tex").write_text("x")
    for status, _, lines in ended(start_two(*CHAIN, f"--workdir={tmp_path}")):
        assert status == 2
        assert len(lines) == 1 and "holds files but no run" in lines[0]
