"""A growth on a mesh gives what it gives on one device: random plans, mesh shapes and sizes."""

import random
import warnings

import jax
import numpy as np
import pytest

from flm_jax import growth
from flm_jax.config import MeshConfig
from flm_jax.errors import UserError
from flm_jax.growth import operators
from flm_jax.params import sharding
from flm_jax.params.sharding import Layout
from flm_jax.store.checkpoint import by_name
from tests.models import SMALL, TABLE, changed, grow
from tests.states import random_state

MESHES = [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (2, 1, 4), (1, 4, 2), (1, 2, 4), (1, 8, 1)]
# Of noise, and of new rows of the vocabulary: each uses a mean over a whole leaf, whose order of
# additions depends on the mesh. Relative to the leaf's largest entry, in float32.
LARGEST_ERROR = 1e-6


def random_growth(rng):
    """A plan, and meshes before and after whose sizes divide the models'."""
    while True:
        queries = rng.choice((1, 2))
        kv = rng.choice((2, 4))
        small = changed(
            SMALL, dtype="float32", num_layers=rng.choice((1, 2, 3)), d_model=rng.choice((6, 8)),
            d_ff=rng.choice((6, 8, 10)), num_kv_heads=kv, num_heads=kv * queries, mup_base_width=4,
            vocab_size=rng.choice((16, 20)),
        )  # fmt: skip
        sizes = {"embed": (6, 8, 11, 12, 16, 17, 18, 24), "mlp": (8, 11, 16, 20, 24, 30),
                 "kv_heads": (2, 4, 5, 8), "q_per_kv": (1, 2, 3, 4), "layers": (1, 2, 3, 4),
                 "vocab": (16, 20, 24, 32)}  # fmt: skip
        recipe, target = [], {}
        for axis, choices in sizes.items():
            recipe.append(f"{axis}={rng.choice(operators.able(axis))}")
            target[axis] = rng.choice(choices)
        heads = target["kv_heads"] * target["q_per_kv"]
        big = changed(
            small, num_layers=target["layers"], d_model=target["embed"], d_ff=target["mlp"],
            num_kv_heads=target["kv_heads"], num_heads=heads, vocab_size=target["vocab"],
        )  # fmt: skip
        meshes = [MeshConfig(*rng.choice(MESHES)) for _ in range(2)]
        try:
            plan = growth.plan(
                small, big, ",".join(recipe), moments=rng.choice(("dual", "asym", "reset")),
                rates=rng.choice(("target", "carry")), noise_db=rng.choice((0.0, 10.0)),
            )  # fmt: skip
            for model, mesh in zip((small, plan.target), meshes, strict=True):
                sharding.check_divisible(model, sharding.make_mesh(mesh))
        except UserError:
            continue
        return plan, meshes


def compared(seed):
    """Grows a random state on two meshes and on one device; returns the plan and the errors."""
    rng = random.Random(seed)
    plan, meshes = random_growth(rng)
    before, after = (Layout(sharding.make_mesh(mesh)) for mesh in meshes)
    state = random_state(plan.source, seed)
    key = jax.random.key(seed)
    want = by_name(grow(state, plan, key))
    with jax.set_mesh(before.mesh):
        placed = jax.device_put(state, sharding.shardings(state, TABLE, *before))
    got = by_name(growth.grow_on_mesh(placed, plan, key, before, after))
    assert got.keys() == want.keys()
    errors = {}
    for name, x in want.items():
        ours, theirs = np.asarray(got[name]), np.asarray(x)
        if ours.tobytes() != theirs.tobytes():
            errors[name] = np.abs(ours - theirs).max() / np.abs(theirs).max()
    return plan, errors


def check(seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan, errors = compared(seed)
    for name, error in errors.items():
        path = name.removeprefix("params/")
        rounded = plan.noise_db or any(e.fill == "mean" for e in plan.expansions)
        assert path in TABLE and rounded, (plan.recipe, name, error)
        assert error < LARGEST_ERROR, (plan.recipe, name, error)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.slow
def test_a_growth_on_a_mesh_is_that_on_one_device(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 28))
def test_many_growths_on_meshes_are_those_on_one_device(seed):
    check(seed)


def test_noise_where_the_old_mesh_does_not_divide_the_new_size():
    """The smallest case that was wrong: 6 to 17 by `tile_pad`, from (2, 2, 2) to (4, 1, 2)."""
    small = changed(SMALL, d_model=6, num_kv_heads=4, mup_base_width=6, vocab_size=16, d_ff=8,
                    dtype="float32")  # fmt: skip
    plan = growth.plan(small, changed(small, d_model=17), "tile_pad", noise_db=10)
    layouts = [Layout(sharding.make_mesh(MeshConfig(*m))) for m in ((2, 2, 2), (4, 1, 2))]
    state, key = random_state(small, 1), jax.random.key(3)
    want = by_name(grow(state, plan, key))
    placed = jax.device_put(state, sharding.shardings(state, TABLE, *layouts[0]))
    got = by_name(growth.grow_on_mesh(placed, plan, key, *layouts))
    for name, x in want.items():
        x = np.asarray(x)
        np.testing.assert_allclose(got[name], x, atol=LARGEST_ERROR * np.abs(x).max())
