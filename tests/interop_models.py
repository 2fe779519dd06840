"""Helpers of the interop tests: a small model, its logits, and comparisons."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from flm_jax import interop
from flm_jax.config import TransformerConfig
from flm_jax.interop.opening import open_model, open_stored_model
from flm_jax.interop.weights import load
from flm_jax.params import trees
from flm_jax.params.digest import params_digest
from flm_jax.store.lineage import RunFolder
from tests.models import logits_of

VOCAB = 50
SMALL = TransformerConfig(VOCAB, 2, 24, 6, 8, 40, 2, rope_theta=500.0, rms_norm_eps=1e-3)
CONTEXT = 64
TARGETS = {
    "msg": dataclasses.replace(
        SMALL, num_layers=3, d_model=40, num_heads=10, num_kv_heads=2, d_ff=52
    ),
    "tile": dataclasses.replace(SMALL, d_model=48, num_heads=12, num_kv_heads=4, d_ff=80),
    "identity": dataclasses.replace(SMALL, num_layers=4),
}
# A full row, a row padded on the right, and a row padded on the left.
SEGMENTS = np.ones((3, 11), int)
SEGMENTS[1, 7:] = SEGMENTS[2, :4] = 0
POSITIONS = np.maximum(np.cumsum(SEGMENTS, 1) - 1, 0)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, SEGMENTS.shape)


def ours(params, config, masks=None):
    """Returns this package's logits on the test tokens."""
    batch = {"tokens": TOKENS, "segment_ids": SEGMENTS, "positions": POSITIONS}
    batch = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
    return np.asarray(logits_of(config, params, batch, masks))


def distance(a, b):
    """Returns the largest difference on real tokens, divided by the root mean square of `a`."""
    a, b = a[SEGMENTS > 0], b[SEGMENTS > 0]
    return np.abs(a - b).max() / np.sqrt(np.mean(a**2))


def equal(one, two):
    """Tells whether two parameter trees are equal."""
    leaves = [dict(trees.flatten(tree)) for tree in (one, two)]
    same = all(np.array_equal(leaves[0][p], leaves[1].get(p)) for p in leaves[0])
    return same and set(leaves[0]) == set(leaves[1])


def check_round_trip_of_a_run(folder, tmp_path):
    """Checks that weights in format granite survive a conversion to a run and back."""
    params, config = interop.load_hf(folder)
    done = interop.convert(str(folder), str(tmp_path / "run"), "flm", memory=1 << 16)
    assert done["params"] == sum(x.size for _, x in trees.flatten(params))
    run = RunFolder(tmp_path / "run")
    (entry,) = run.stages()
    assert entry["params_digest"] == params_digest(params)
    assert entry["name"] == "imported" and entry["parent"] is None and entry["receipt"] is None
    assert run.stage(0, "imported").experiment().stages[0].model == config
    interop.convert(str(tmp_path / "run"), str(tmp_path / "out"), "granite", memory=1 << 16)
    assert equal(params, interop.load_hf(tmp_path / "out")[0])
    checkpoint = tmp_path / "run" / entry["checkpoint"]
    opened = open_stored_model(str(checkpoint))
    assert equal(params, load(opened.weights)) and opened.name == "imported"
    for path in (folder, tmp_path / "run"):
        model = open_model(str(path))
        assert equal(params, model.params) and model.config == config
        assert model.context == 64 and not model.trained
