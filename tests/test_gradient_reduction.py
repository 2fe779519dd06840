"""The dtype in which devices add up their gradients."""

import re

import jax
import numpy as np
import pytest

from flm_jax import mapping
from flm_jax.config import MeshConfig, TransformerConfig
from flm_jax.errors import UserError
from flm_jax.params import axes, sharding, trees
from flm_jax.train.train_step import gradients
from tests.models import SMALL, changed, logits_of, packed_batch, random_params

MODEL = changed(
    SMALL, vocab_size=32, d_model=16, d_ff=24, num_heads=2, dtype="bfloat16", qkv_bias=True,
    out_bias=True, mlp_bias=True, qk_norm="head", norms="both", rms_norm_eps=1e-5,
)  # fmt: skip
WIDE = changed(MODEL, gradient_reduction="float32")


def sums_of(config, mesh_config, folder):
    """The dtypes that devices add up in the gradient's program, after XLA's partitioner.

    A later pass of the CPU's compiler widens all sums of bfloat16. Other compilers do not.
    """
    mesh = sharding.make_mesh(mesh_config)
    shapes = jax.eval_shape(lambda: random_params(config, 0))
    placed = sharding.shardings(shapes, axes.table(config), mesh)

    def shaped(x, at):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)

    batch = packed_batch(config, batch=8, length=8)
    rows = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    with jax.set_mesh(mesh):
        jitted = jax.jit(lambda p, b: gradients(p, b, config)[1], out_shardings=placed)
        params = jax.tree.map(shaped, shapes, placed)
        lowered = jitted.lower(params, {name: shaped(x, rows) for name, x in batch.items()})
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partition.*"}
    lowered.compile(compiler_options=options)
    (after,) = folder.glob("*after_spmd-partitioning*.txt")
    found = re.findall(r"= \(?(\w+)\[.*? (?:all-reduce|reduce-scatter)\(", after.read_text())
    assert len(found) > 10
    return set(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [WIDE, changed(WIDE, tied=True), changed(WIDE, loss_chunks=2)],
    ids=["head", "tied", "chunks"],
)
def test_gradients_are_added_up_in_float32(config, tmp_path):
    """Split over the batch alone, devices add up nothing but gradients and losses."""
    narrow = changed(config, gradient_reduction="compute")
    mesh = MeshConfig(2, 4, 1)
    assert "bf16" not in sums_of(config, mesh, tmp_path / "wide")
    assert "bf16" in sums_of(narrow, mesh, tmp_path / "narrow")  # negative control


@pytest.mark.slow
def test_the_function_is_the_same_and_its_gradient_close():
    """Forward bits are equal; gradients differ by rounding, on one device and on many."""
    params, batch = random_params(MODEL, 0), packed_batch(MODEL, batch=4)
    np.testing.assert_array_equal(logits_of(MODEL, params, batch), logits_of(WIDE, params, batch))
    exact = changed(MODEL, dtype="float32")
    program = jax.jit(lambda config, p, b: gradients(p, b, config)[1], static_argnums=0)

    def error(config, mesh):
        with jax.set_mesh(mesh):
            got, want = (dict(trees.flatten(program(c, params, batch))) for c in (config, exact))
        scale = {path: float(abs(x).max()) for path, x in want.items()}
        return {path: float(abs(got[path] - want[path]).max()) / scale[path] for path in want}

    for mesh in (sharding.one_device(), sharding.make_mesh(MeshConfig(2, 2, 2))):
        wide, narrow = error(WIDE, mesh), error(MODEL, mesh)
        assert max(wide.values()) < 0.1
        assert max(error(changed(WIDE, loss_chunks=2), mesh).values()) < 0.1
        assert sum(wide.values()) < 1.05 * sum(narrow.values())


def test_the_setting_is_stored_only_where_it_is_used():
    assert "gradient_reduction" not in mapping.to_dict(MODEL)
    stored = mapping.to_dict(WIDE)
    assert stored["gradient_reduction"] == "float32"
    assert mapping.from_mapping(TransformerConfig, stored) == WIDE
    assert [c.gradient_dtype for c in (MODEL, WIDE, SMALL)] == ["bfloat16", "float32", "float64"]
    assert changed(SMALL, gradient_reduction="float32").gradient_dtype == "float64"
    with pytest.raises(UserError, match="gradient_reduction is 'half'"):
        changed(MODEL, gradient_reduction="half")
