"""The digest of parameters: the same in every layout, and another one after any change."""

import contextlib
import json
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import multihost_utils

from flm_jax.config import MeshConfig
from flm_jax.params import digest, sharding, trees
from flm_jax.params.digest import LANES, SCHEME, digest_of_pieces, params_digest
from flm_jax.store.chunked import cells
from tests.commands import ROOT
from tests.models import TABLE, TINY, random_params

MESHES = [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2), MeshConfig(1, 4, 2), MeshConfig(1, 8, 1)]
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float64, np.int32]
MASK = (1 << 32) - 1


def bits(dtype, shape, seed):
    """Random bits, among them those of NaNs and denormals."""
    rng = np.random.default_rng(seed)
    size = np.dtype(dtype).itemsize
    return rng.integers(0, 256, (*shape, size), np.uint8).view(dtype)[..., 0]


def mixed(x):
    """The mixing in Python's integers."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK
    return x ^ (x >> 16)


def lanes_by_hand(x):
    """The lanes of a leaf, word by word, as the module's text defines them."""
    size = x.dtype.itemsize
    words = x.view(np.uint32).reshape(*x.shape, 2) if size == 8 else x.view(f"uint{8 * size}")
    start, steps = digest._START.tolist(), digest._MULTIPLIERS.tolist()
    return [
        sum(
            mixed(int(word) ^ mixed((start[lane] + sum(map(int.__mul__, at, steps[lane]))) & MASK))
            for at, word in np.ndenumerate(words)
        )
        & MASK
        for lane in range(LANES)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_the_lanes_are_those_of_the_definition(dtype):
    x = bits(dtype, (2, 3, 5), 0)
    program = digest.digest_program({"x": digest._words(x)})
    with jax.enable_x64(True):
        on_device = jnp.asarray(x)
        assert on_device.dtype == x.dtype
        here, there = (program({"x": v}) for v in (digest._words(x), on_device))
    np.testing.assert_array_equal(here[0], np.array(lanes_by_hand(x), np.uint32))
    np.testing.assert_array_equal(here, there)


def test_it_does_not_depend_on_the_layout():
    params = random_params(TINY, 0)
    whole = params_digest(params)
    assert re.fullmatch(SCHEME + "-[0-9a-f]{64}", whole)
    assert params_digest(jax.device_get(params)) == whole
    placed = sharding.shardings(params, TABLE, sharding.make_mesh(MeshConfig(2, 2, 2)))
    assert params_digest(jax.device_put(params, placed)) == whole


def test_it_does_not_depend_on_the_pieces():
    leaves = {"a": bits(np.float32, (4, 6), 0), "b": bits(np.float64, (2, 3), 1)}
    for chunk in ((2, 3), (4, 4)):
        pieces = (
            (path, x, ((at, x[at]) for at in reversed([*cells(x.shape, chunk)])))
            for path, x in leaves.items()
        )
        assert digest_of_pieces(pieces) == params_digest(leaves)
    misplaced = [(path, x, [((slice(1, 9),) * 2, x)]) for path, x in leaves.items()]
    assert digest_of_pieces(misplaced) != params_digest(leaves)  # negative control


@pytest.mark.parametrize("shape", MESHES, ids=lambda m: f"{m.data}x{m.fsdp}x{m.tensor}")
def test_devices_exchange_only_sums(shape, monkeypatch):
    """No collective of the program brings an entry of a leaf; no process gathers a leaf."""
    params = random_params(TINY, 0)
    leaves = dict(trees.flatten(params))
    placed = jax.device_put(leaves, sharding.shardings(leaves, TABLE, sharding.make_mesh(shape)))
    text = digest.digest_program(placed).lower(placed).compile().as_text()
    found = re.findall(r"= (.*?) ((?:all|collective|reduce-scatter)[\w-]*)\(", text)
    assert {kind for _, kind in found} == ({"all-reduce"} if shape.data < 8 else set())
    received = re.findall(r"(\w+)\[([\d,]*)\]", " ".join(shapes for shapes, _ in found))
    assert {kind for kind, _ in received} <= {"u32"}
    numbers = sum(int(np.prod([int(n) for n in dims.split(",") if n])) for _, dims in received)
    assert numbers <= 2 * len(leaves) * LANES  # XLA may sum over one mesh axis after the other
    monkeypatch.setattr(multihost_utils, "process_allgather", None)
    params_digest(trees.unflatten(placed))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_one_flipped_bit_changes_every_lane(dtype):
    x, rng = bits(dtype, (3, 4, 5), 1), np.random.default_rng(2)
    program = digest.digest_program({"x": digest._words(x)})
    before = np.asarray(program({"x": digest._words(x)}))
    everything = x.size * 8 * x.dtype.itemsize
    for at in {0, everything - 1, *rng.integers(0, everything, 60).tolist()}:
        raw = np.frombuffer(x.tobytes(), np.uint8).copy()
        raw[at // 8] ^= 1 << (at % 8)
        other = raw.view(dtype).reshape(x.shape)
        assert (np.asarray(program({"x": digest._words(other)})) != before).all(), at


def test_other_changes_change_it():
    base = {"a": bits(np.float32, (4, 4), 0), "b": bits(np.float32, (4, 4), 1)}
    a, b = base["a"], base["b"]
    exchanged = a.copy()
    exchanged[0, 1], exchanged[2, 3] = a[2, 3], a[0, 1]
    zeros = np.zeros((4, 4), np.float32)
    quiet, other = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    others = [
        {"a": b, "b": a},
        {"a": a, "c": b},
        {"a": a},
        {"a": exchanged, "b": b},
        {"a": a.T.copy(), "b": b},
        {"a": a[::-1].copy(), "b": b},
        {"a": a.reshape(2, 8), "b": b},
        {"a": a.view(np.int32), "b": b},
        {"a": -a, "b": -b},
        {"a": zeros, "b": b},
        {"a": -zeros, "b": b},
        {"a": np.full((4, 4), quiet), "b": b},
        {"a": np.full((4, 4), other), "b": b},
        {"a": np.zeros((4, 0), np.float32), "b": b},
        {"a": np.zeros((0, 4), np.float32), "b": b},
        {"a": np.float32(0), "b": b},
    ]
    digests = [params_digest(tree) for tree in (base, *others)]
    assert len(set(digests)) == len(digests)


def test_all_exchanges_of_two_rows_or_entries_change_it():
    """Structured contents: small integers, equal rows but for one entry."""
    x = np.arange(48, dtype=np.int32).reshape(6, 8) % 7
    program = digest.digest_program({"x": digest._words(x)})
    seen = {tuple(np.asarray(program({"x": digest._words(x)}))[0].tolist()): x.tobytes()}
    trials = [x[np.roll(np.arange(6), n)] for n in range(1, 6)]
    trials += [np.roll(x, n, 1) for n in range(1, 8)]
    for i in range(48):
        for j in range(i):
            flat = x.reshape(-1).copy()
            flat[[i, j]] = flat[[j, i]]
            trials.append(flat.reshape(x.shape))
    for trial in trials:
        lanes = tuple(np.asarray(program({"x": digest._words(trial)}))[0].tolist())
        assert seen.setdefault(lanes, trial.tobytes()) == trial.tobytes()


SCRIPT = """
import json, sys
import jax
from jax.experimental import multihost_utils
from flm_jax.config import MeshConfig
from flm_jax.params import sharding
from flm_jax.params.digest import params_digest
from flm_jax.runtime import processes
from tests.models import TABLE, TINY, random_params

with processes.joined(processes.Group(sys.argv[1], int(sys.argv[2]), 2)):
    params = jax.device_get(random_params(TINY, 0))
    found = []
    for shape in ((8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4)):
        mesh = sharding.make_mesh(MeshConfig(*shape))
        placed = jax.device_put(params, sharding.shardings(params, TABLE, mesh))
        here = placed["layers"]["mlp"]["up"].is_fully_addressable
        gather, multihost_utils.process_allgather = multihost_utils.process_allgather, None
        found.append([params_digest(placed), here])  # no process receives a leaf
        multihost_utils.process_allgather = gather
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_find_the_digest_of_one():
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, f"localhost:{port}", str(process)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={"PATH": "", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
        )
        for process in range(2)
    ]  # fmt: skip
    want = params_digest(random_params(TINY, 0))
    ended = [(*process.communicate(timeout=300), process.returncode) for process in started]
    for out, err, status in ended:
        assert status == 0, err
        found = json.loads(out.splitlines()[-1])
        assert [digest for digest, _ in found] == [want] * 4
        assert not any(here for _, here in found)  # each process holds a part only
