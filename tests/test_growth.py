"""Growth keeps function, gradients and optimizer state; each test has a negative control."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_jax import growth
from flm_jax.config import TransformerConfig
from flm_jax.errors import UserError
from flm_jax.growth import layer_maps
from flm_jax.growth._plan import Plan
from flm_jax.growth.expansion import NEW, Expansion, Run, any_slot, append_new, from_index
from flm_jax.growth.receipt import dead_slots, gradient_error, locked_copies
from flm_jax.params import axes, trees
from tests.models import (
    SMALL,
    TABLE,
    changed,
    gradients,
    grow,
    logits_of,
    packed_batch,
    random_params,
)

KEY = jax.random.key(7)


@st.composite
def size_pairs(draw):
    """A config, and a larger one in which every width, the depth and the multipliers differ."""

    def both(low, high, more):
        size = draw(st.integers(low, high))
        return size, size + draw(st.integers(0, more))

    (d, D), (f, F), (layers, Layers) = both(3, 10, 9), both(2, 12, 9), both(1, 3, 4)
    (k, K), (g, G) = both(1, 2, 2), both(1, 2, 2)
    small = changed(
        SMALL, d_model=d, d_ff=f, num_layers=layers, num_heads=k * g, num_kv_heads=k,
        rms_norm_eps=draw(st.sampled_from([1e-2, 1e-5])),
        mup_base_width=draw(st.sampled_from([0, min(4, d)])),
    )  # fmt: skip
    big = changed(
        small, d_model=D, d_ff=F, num_layers=Layers, num_heads=K * G, num_kv_heads=K,
        input_mult=draw(st.sampled_from([1.3, 2.0])), output_mult=draw(st.sampled_from([0.7, 1.1])),
        mup_base_width=draw(st.sampled_from([0, min(4, d)])),
    )  # fmt: skip
    return small, big


def grown_logits(plan: Plan, params, batch, mask=0.0, drop=()):
    masks = {k: v for k, v in plan.masks(jnp.float32(mask)).items() if k not in drop}
    return logits_of(plan.target, params, batch, masks)


def scale_of(logits):
    return float(jnp.sqrt(jnp.mean(jnp.square(logits))))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(size_pairs(), st.integers(0, 100))
def test_msg_keeps_the_function_exactly(pair, seed):
    small, big = pair
    with jax.enable_x64(True):
        params = random_params(small, seed)
        distances = np.random.default_rng(seed).random(small.num_layers).tolist()
        plan = growth.plan(small, big, "msg", layer_distances=distances)
        grown = grow(params, plan, KEY)
        batch = packed_batch(small, seed)
        before, after = logits_of(small, params, batch), grown_logits(plan, grown, batch)
        assert float(jnp.max(jnp.abs(after - before))) < 1e-10
        assert {p: v.shape for p, v in trees.flatten(grown)} == {
            p: param.shape(axes.axis_sizes(big)) for p, param in TABLE.items()
        }
        # At mask 1 it is exactly the plain model.
        plain = logits_of(big, grown, batch)
        full = grown_logits(plan, grown, batch, mask=1.0)
        np.testing.assert_allclose(full, plain, atol=1e-10)


BIG = changed(
    SMALL, d_model=18, d_ff=32, num_layers=5, num_heads=9, num_kv_heads=3, output_mult=1.9
)


def test_msg_keeps_the_function_in_float32():
    small, big = (changed(c, dtype="float32") for c in (SMALL, BIG))
    params = random_params(small, 1)
    plan = growth.plan(small, big)
    batch = packed_batch(small)
    before = logits_of(small, params, batch)
    after = grown_logits(plan, grow(params, plan, KEY), batch)
    assert float(jnp.max(jnp.abs(after - before))) < 1e-4 * scale_of(before)


def _unscaled_head(plan, grown):
    scale = plan.value_scale("head")
    return {**grown, "head": grown["head"] / scale}


def _appended_at_the_end(plan, grown):
    """Lists query heads flat, new ones after all old ones, then cuts them into groups again."""
    old, new = plan.source, plan.target
    attention = dict(grown["layers"]["attention"])
    for name, dim in (("query", 2), ("out", 1)):
        x = jnp.moveaxis(attention[name], (dim, dim + 1), (0, 1))
        flat = x.reshape(-1, *x.shape[2:])
        is_old = np.zeros((new.kv_heads, new.queries_per_kv), bool)
        is_old[: old.kv_heads, : old.queries_per_kv] = True
        order = np.argsort(~is_old.reshape(-1), kind="stable")
        attention[name] = jnp.moveaxis(flat[order].reshape(x.shape), (0, 1), (dim, dim + 1))
    return {**grown, "layers": {**grown["layers"], "attention": attention}}


@pytest.mark.parametrize(
    ("mutate", "drop"),
    [
        (_unscaled_head, ()),
        (_appended_at_the_end, ()),
        (lambda plan, grown: grown, ("embed",)),
        (lambda plan, grown: grown, ("mlp",)),
        (lambda plan, grown: grown, ("kv_heads",)),
        (lambda plan, grown: grown, ("q_per_kv",)),
        (lambda plan, grown: grown, ("layers",)),
    ],
    ids=["dropped rescale", "heads at the end", "unmasked norm", "unmasked mlp", "unmasked groups",
         "unmasked queries", "unmasked layers"],
)  # fmt: skip
def test_a_broken_growth_is_noticed(mutate, drop):
    with jax.enable_x64(True):
        params = random_params(SMALL, 1)
        plan = growth.plan(SMALL, BIG)
        grown = grow(params, plan, KEY)
        batch = packed_batch(SMALL)
        before = logits_of(SMALL, params, batch)
        assert float(jnp.max(jnp.abs(grown_logits(plan, grown, batch) - before))) < 1e-10
        after = grown_logits(plan, mutate(plan, grown), batch, drop=drop)
        assert float(jnp.max(jnp.abs(after - before))) > 1e-3 * scale_of(before)


def test_gradients_grow_by_the_dual_map():
    """At mask 0 the grown model's gradient is the mapped gradient of the source, 0 if added."""
    with jax.enable_x64(True):
        params = random_params(SMALL, 3)
        plan = growth.plan(SMALL, BIG)
        batch = packed_batch(SMALL)
        _, source, _ = gradients(params, batch, SMALL)
        grown = grow(params, plan, KEY)
        _, target, _ = gradients(grown, batch, BIG, plan.masks(jnp.float32(0)))
        assert gradient_error(plan, source, target) < 1e-12
        for path, grad in trees.flatten(target):
            added = any_slot(TABLE[path], plan.by_axis, lambda e, role: e.added)
            assert not jnp.where(added, grad, 0).any()
        # Negative control: if mapped like values, the head is scaled the wrong way.
        unscaled = dataclasses.replace(plan, source=changed(SMALL, output_mult=1.9 * 18 / 12))
        assert gradient_error(unscaled, source, target) > 1e-2


def _copies(axis, size, weights):
    """Repeats all slots once for each weight."""
    return Expansion(axis, size, tuple(Run(0, size, w) for w in weights))


def test_no_added_slot_is_dead_or_locked_once_the_ramp_starts():
    with jax.enable_x64(True):
        params = random_params(SMALL, 5)
        plan = growth.plan(SMALL, BIG)
        grown = grow(params, plan, KEY)
        batch = packed_batch(SMALL)
        _, grads, _ = gradients(grown, batch, BIG, plan.masks(jnp.float32(0.01)))
        assert dead_slots(plan, grads) == 0
        assert locked_copies(plan, grown, grads) == 0
        # Negative controls: at mask 0 every added slot is dead; double zeros kill new mlp slots
        # at any mask.
        _, at_zero, _ = gradients(grown, batch, BIG, plan.masks(jnp.float32(0)))
        assert dead_slots(plan, at_zero) == sum(int(e.added.sum()) for e in plan.expansions)
        mlp = {k: v.at[..., 20:].set(0) if k in ("gate", "up") else v
               for k, v in grown["layers"]["mlp"].items()}  # fmt: skip
        zeroed = {**grown, "layers": {**grown["layers"], "mlp": mlp}}
        _, grads, _ = gradients(zeroed, batch, BIG, plan.masks(jnp.float32(0.01)))
        assert dead_slots(plan, grads) == 12


def test_even_copies_are_locked():
    with jax.enable_x64(True):
        big = changed(SMALL, d_ff=40)
        plan = Plan("msg", SMALL, big, (_copies("mlp", 20, (0.5, 0.5)),))
        grown = grow(random_params(SMALL, 6), plan, KEY)
        _, grads, _ = gradients(grown, packed_batch(SMALL), big)
        assert locked_copies(plan, grown, grads) == 20


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.integers(0, 20))
def test_layers_are_copied_beside_the_smallest_distance(distances, more):
    layer_map = layer_maps.beside_smallest(distances, len(distances) + more)
    assert len(layer_map) == len(distances) + more
    assert layer_map == sorted(layer_map)
    copies = np.bincount(layer_map, minlength=len(distances)) - 1
    assert copies.min() >= 0 and copies.max() - copies.min() <= 1
    extra = copies > copies.min()
    if extra.any() and not extra.all():
        d = np.array(distances)
        assert d[extra].max() <= d[~extra].min()


def test_copied_layers_are_copies_and_the_rest_is_untouched():
    params = random_params(changed(SMALL, dtype="float32"), 8)
    big = changed(SMALL, dtype="float32", num_layers=3)
    plan = growth.plan(changed(SMALL, dtype="float32"), big, layer_distances=[0.5, 0.2])
    assert plan.layer_map == (0, 1, 1)
    assert plan.by_axis["layers"].added.tolist() == [False, False, True]
    grown = grow(params, plan, KEY)
    for (path, new), (_, old) in zip(trees.flatten(grown), trees.flatten(params), strict=True):
        want = old[jnp.array([0, 1, 1])] if path.startswith("layers/") else old
        np.testing.assert_array_equal(new, want)


def test_plan_survives_json_and_has_a_digest():
    plan = growth.plan(SMALL, BIG, layer_distances=[0.3, 0.1])
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.digest() == plan.digest()
    other = growth.plan(SMALL, BIG, layer_distances=[0.1, 0.3])
    assert other.digest() != plan.digest()
    with pytest.raises(UserError, match="version 99"):
        Plan.from_json(plan.to_json().replace('"version": 2', '"version": 99'))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(-1, 4), max_size=12))
def test_from_index_keeps_the_index(extra):
    index = [*range(5), *extra]
    e = from_index("layers", 5, index, masked=True)
    assert e.index.tolist() == index
    assert int(e.added.sum()) == len(extra)
    assert e.new.tolist() == [i == NEW for i in index]


def test_growth_depends_on_its_key_alone():
    params = random_params(changed(SMALL, dtype="float32"), 9)
    plan = growth.plan(changed(SMALL, dtype="float32"), changed(BIG, dtype="float32"))
    a, b, c = (grow(params, plan, jax.random.key(k)) for k in (1, 1, 2))
    flat = [dict(trees.flatten(t)) for t in (a, b, c)]
    assert all((flat[0][p] == flat[1][p]).all() for p in flat[0])
    assert not (flat[0]["embedding"] == flat[2]["embedding"]).all()
    # Fresh entries differ between parameters of the same shape, and between layers.
    assert not (flat[0]["layers/mlp/gate"] == flat[0]["layers/mlp/up"])[..., 20:].any()
    assert not (flat[0]["layers/mlp/gate"][0] == flat[0]["layers/mlp/gate"][1])[:, 20:].any()


def test_new_entries_have_the_target_widths_scale():
    small = TransformerConfig(
        vocab_size=64, num_layers=2, d_model=64, num_heads=4, head_dim=16, d_ff=128,
        mup_base_width=64, matrix_init_std=0.1, vector_init_std=0.05, depth_scaled_init=True,
    )  # fmt: skip
    big = dataclasses.replace(small, num_layers=8, d_model=256, d_ff=512, num_heads=16)
    plan = growth.plan(small, big)
    grown = dict(trees.flatten(grow(random_params(small, 5), plan, KEY)))
    assert abs(float(grown["layers/mlp/up"][:, 64:].std()) / 0.05 - 1) < 0.02
    assert abs(float(grown["layers/mlp/down"][:, 128:].std()) / (0.05 / 4) - 1) < 0.02
    assert abs(float(grown["embedding"][:, 64:].std()) / 0.05 - 1) < 0.05
    assert (grown["final_norm"][64:] == 1).all()


def test_append_new_without_growth_is_the_identity():
    assert append_new("mlp", 4, 4, masked=True).identity
