"""What other families change in the block: it grows, caches, folds and shards like the plain one.

The function itself is compared with transformers' in tests/test_families.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import growth
from flm_jax.config import ExperimentConfig, GrowthConfig, MeshConfig, RopeConfig, StageConfig
from flm_jax.errors import UserError
from flm_jax.growth.receipt import gradient_error
from flm_jax.params import axes, counts, trees
from flm_jax.runs.stage import with_derived
from flm_jax.studies.check_operators import FAMILIES, target_of
from tests.models import (
    SMALL,
    changed,
    farthest,
    gradients,
    grow,
    logits_of,
    losses_on,
    packed_batch,
    random_params,
    trained,
)
from tests.test_generate import cached_logits, full_logits, ragged

KEY = jax.random.key(3)
# Two families have nearly every feature; the others are slow tests.
QUICK = ("gemma2", "olmo2")
EACH = [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]

# Together they use every EXACT operator on every axis that it grows.
RECIPES = ("msg", "tile,identity", "zero_pad", "tile_pad,layers=msg", "uneven,embed=tile",
           "kv_heads=repeat")  # fmt: skip
# A norm over all heads sees new heads, and makes the gradients of unequal copies equal.
OTHER_HEADS = {
    "zero_pad": "zero_pad,kv_heads=tile,q_per_kv=msg",
    "tile_pad,layers=msg": "tile_pad,kv_heads=msg,q_per_kv=tile,layers=msg",
    "uneven,embed=tile": "uneven,embed=tile,kv_heads=tile,q_per_kv=tile",
}
EACH_RECIPE = [*RECIPES[:2], *(pytest.param(r, marks=pytest.mark.slow) for r in RECIPES[2:])]


def model_of(family: str, **values):
    return changed(SMALL, **FAMILIES[family], **values)


def grown_by(family: str, recipe: str):
    """The model, its parameters, the plan and the grown parameters."""
    small = model_of(family)
    recipe = OTHER_HEADS.get(recipe, recipe) if small.qk_norm == "all" else recipe
    plan = growth.plan(small, target_of(small, recipe), recipe)
    params = random_params(small, 1)
    return small, params, plan, grow(params, plan, KEY)


@pytest.mark.filterwarnings("ignore::flm_jax.growth.LockedCopiesWarning")
@pytest.mark.parametrize("recipe", EACH_RECIPE)
@pytest.mark.parametrize("family", EACH)
def test_exact_operators_keep_function_and_map_gradients(family, recipe):
    """Logits to 1e-10, gradients by the dual to 1e-9, and as controls every parameter matters."""
    with jax.enable_x64(True):
        small, params, plan, grown = grown_by(family, recipe)
        assert plan.exactness == "EXACT"
        batch, masks = packed_batch(small), plan.masks(0.0)
        want = logits_of(small, params, batch)

        def moved(grown) -> float:
            got = logits_of(plan.target, grown, batch, masks)[..., : small.vocab_size]
            return float(jnp.abs(got - want).max())

        assert moved(grown) < 1e-10
        old, new = (
            gradients(params, batch, small)[1],
            gradients(grown, batch, plan.target, masks)[1],
        )
        assert float(gradient_error(plan, old, new)) < 1e-9
        leaves = dict(trees.flatten(grown))
        for path in leaves:
            if path != "layers/attention/key_bias":  # softmax ignores most of it
                broken = trees.unflatten(leaves | {path: leaves[path] * 1.3})
                assert moved(broken) > 1e-4, path


@pytest.mark.filterwarnings("ignore::flm_jax.growth.LockedCopiesWarning")
@pytest.mark.parametrize("family", EACH)
@pytest.mark.slow
def test_a_tiled_model_follows_the_small_ones_adamw(family):
    """20 steps of AdamW with decay to 1e-10, with carried rates; without them it departs."""
    with jax.enable_x64(True):
        small = model_of(family)
        big = target_of(small, "tile")
        batches = [packed_batch(small, seed) for seed in range(24)]
        start = trained(small, None, batches[:4])
        plan = growth.plan(small, big, "tile", moments="dual", rates="carry")
        want = grow(trained(small, start, batches[4:]).params, plan, KEY)
        followed = trained(big, grow(start, plan, KEY), batches[4:])
        assert farthest(followed.params, want) < 1e-10
        unscaled = dataclasses.replace(plan, rates="target")
        assert farthest(trained(big, grow(start, unscaled, KEY), batches[4:]).params, want) > 1e-4


@pytest.mark.parametrize("family", EACH)
def test_cached_logits_equal_the_full_forward_pass(family):
    with jax.enable_x64(True):
        # "dynamic" follows the longest sequence so far, so that cached keys were rotated otherwise.
        rope = FAMILIES[family].get("rope", RopeConfig())
        rope = RopeConfig() if rope.kind == "dynamic" else rope
        config = dataclasses.replace(model_of(family), rope=rope)
        params, rows = random_params(config, 1), ragged(config)
        want = [full_logits(params, jnp.asarray([r], jnp.int32), config)[0] for r in rows]
        got = cached_logits(params, config, rows, first=6)
        assert max(np.abs(a - b).max() for a, b in zip(got, want, strict=True)) < 1e-12
        if config.window:  # negative control
            narrower = changed(config, window=config.window - 2)
            other = cached_logits(params, narrower, rows, first=6)
            assert max(np.abs(a - b).max() for a, b in zip(other, want, strict=True)) > 1e-4


@pytest.mark.parametrize("family", EACH)
def test_the_folded_model_is_the_masked_one(family):
    with jax.enable_x64(True):
        small = model_of(family)
        plan = growth.plan(small, changed(small, d_model=18, d_ff=30, num_layers=3), "msg")
        params, batch = random_params(plan.target, 2), packed_batch(small)
        masked = logits_of(plan.target, params, batch, plan.masks(jnp.float32(0.4)))
        folded, plain = growth.fold(params, plan, 0.4)
        scale = float(jnp.sqrt(jnp.mean(jnp.square(masked))))
        assert float(jnp.abs(logits_of(plain, folded, batch) - masked).max()) < 1e-6 * scale
        assert float(jnp.abs(logits_of(plan.target, folded, batch) - masked).max()) > 1e-4 * scale


def test_masked_heads_under_a_norm_over_all_heads_are_not_folded():
    small = model_of("olmo2", dtype="float32")
    plan = growth.plan(small, changed(small, num_heads=6, num_kv_heads=3), "msg")
    with pytest.raises(UserError, match=r"'kv_heads' is masked at 0.5, which changes the mean"):
        growth.fold(random_params(plan.target, 0), plan, 0.5)


@pytest.mark.parametrize("recipe", ["zero_pad", "tile_pad", "uneven"])
def test_operators_that_a_norm_over_all_heads_forbids_are_refused(recipe):
    small = model_of("olmo2")
    heads = 8 if recipe == "uneven" else 10
    with pytest.raises(UserError, match=r"norm over all heads.*use operator '(msg|tile)'"):
        growth.plan(small, changed(small, num_heads=heads, num_kv_heads=heads // 2), recipe)


def test_layers_keep_their_kind_through_a_growth_and_a_chain():
    """Each layer of the target is of the kind of the layer that it is copied from."""
    small = changed(SMALL, num_layers=3, layer_kinds=("sliding", "full", "full_nope"), window=4)
    big = changed(small, num_layers=5)
    plan = growth.plan(small, big, "identity", layer_distances=[0.9, 0.5, 0.1])
    kinds = ("sliding", "sliding", "full", "full", "full_nope")
    assert plan.target.kinds == kinds and plan.layer_map == (0, 0, 1, 1, 2)
    assert growth.Plan.from_json(plan.to_json()) == plan
    stages = [
        StageConfig(name, model, 9, 1, 1e-3, 1e-3, growth=GrowthConfig("identity", ramp_steps=1))
        for name, model in (("a", small), ("b", big), ("c", changed(big, num_layers=6)))
    ]
    derived = with_derived(ExperimentConfig(tuple(stages)))
    assert derived.stages[1].model == plan.target
    assert derived.stages[2].model.kinds == ("sliding", *kinds)
    assert with_derived(derived) == derived
    with pytest.raises(UserError, match=r"layer_kinds .*leave the target's at"):
        growth.plan(small, changed(big, layer_kinds=("full", "sliding")), "identity")


def test_the_eps_of_queries_and_keys_stays_where_zeros_change_that_of_the_stream():
    small = model_of("qwen3")
    target = growth.plan(small, changed(small, d_model=18), "zero_pad").target
    assert target.rms_norm_eps == pytest.approx(small.rms_norm_eps * 12 / 18)
    assert target.qk_norm_eps == small.rms_norm_eps
    with pytest.raises(UserError, match="qk_norm_eps"):
        growth.plan(small, changed(target, qk_norm_eps=1e-4), "zero_pad")


@pytest.mark.parametrize(("field", "value"), [("tied", True), ("window", 3), ("qk_norm", "head"),
                                              ("rope", RopeConfig("linear", 2.0))])  # fmt: skip
def test_a_growth_that_changes_the_block_is_refused(field, value):
    with pytest.raises(UserError, match=f"growth from {field} "):
        growth.plan(SMALL, changed(SMALL, d_ff=40, **{field: value}), "msg")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "olmo2", "llama"])
def test_all_meshes_train_alike(family):
    model = dataclasses.replace(
        model_of(family), vocab_size=32, d_model=16, head_dim=8, d_ff=24, dtype="float32"
    )
    whole, _ = losses_on(MeshConfig(data=8), model)
    split, _ = losses_on(MeshConfig(data=2, fsdp=2, tensor=2), model)
    np.testing.assert_allclose(split, whole, rtol=2e-5)


def test_a_tied_head_is_counted_once_as_parameters_and_fully_as_flops():
    tied = changed(SMALL, tied=True)
    head = SMALL.vocab_size * SMALL.d_model
    assert counts.params(tied) == counts.params(SMALL) - head
    assert counts.flops_per_token_forward(tied, 8) == counts.flops_per_token_forward(SMALL, 8)
    biased = changed(SMALL, qkv_bias=True, out_bias=True, mlp_bias=True)
    assert counts.flops_per_token_forward(biased, 8) == counts.flops_per_token_forward(SMALL, 8)


@pytest.mark.parametrize(("values", "line"), [
    ({"layer_kinds": ("sliding",)}, r"sliding layers and window is 0"),
    ({"layer_kinds": ("local",)}, r"layer_kinds has 'local'; choose from full, sliding"),
    ({"rope": RopeConfig(fraction=0.5)}, r"rotates 3 of head_dim 6 coordinates"),
    ({"attention_softcap": -1.0}, r"attention_softcap is -1.0; it must be 0 or above"),
    ({"norms": "pre"}, r"norms is 'pre'; choose one of before, after, both"),
])  # fmt: skip
def test_mistakes_name_field_and_value(values, line):
    with pytest.raises(UserError, match=line):
        changed(SMALL, **values)
    with pytest.raises(UserError, match="original_length is 0, and kind 'yarn' needs it"):
        RopeConfig("yarn", 2.0)


def test_biases_and_gains_of_new_features_start_without_effect():
    """A new model has biases 0 and gains 1, without decay."""
    model = model_of("llama", qk_norm="all", norms="both")
    spec = growth.plan(model, changed(model, d_ff=40), "msg").big
    for path, param in axes.table(model).items():
        if param.bias or axes.Role.GAIN in param.roles:
            scale = spec.scale(path)
            assert (scale.std, scale.start, scale.decay) == (0, 0 if param.bias else 1, 0), path
