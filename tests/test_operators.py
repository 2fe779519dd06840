"""Every operator keeps its promise; without one of its rules it must fail."""

import contextlib
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import growth
from flm_jax.config import GrowthConfig, OptimizerConfig, StageConfig
from flm_jax.errors import UserError
from flm_jax.growth import ligo, measure, operators
from flm_jax.growth.expansion import NEW, Expansion, Run
from flm_jax.growth.operators import EXACT, OPERATORS
from flm_jax.growth.receipt import gradient_error
from flm_jax.params import counts, sharding, trees
from flm_jax.studies import check_operators
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import init_state, make_train_step, summed_loss
from tests.commands import ROOT
from tests.models import (
    MUP,
    SMALL,
    TABLE,
    changed,
    farthest,
    gradients,
    grow,
    logits_of,
    packed_batch,
    random_params,
    trained,
)

KEY = jax.random.key(7)

ATTENTION = {
    "multi-head": {"num_heads": 2, "num_kv_heads": 2},
    "grouped": {"num_heads": 4, "num_kv_heads": 2},
    "multi-query": {"num_heads": 2, "num_kv_heads": 1},
}
EXACT_RECIPES = (
    "msg",
    "zero_pad",
    "zero_pad,identity",
    "tile,identity",
    "tile_pad,identity",
    "tile,uneven,identity",
    "net2net,embed=tile",
    "repeat",
)


def pair_of(recipe, **changes):
    small = changed(SMALL, **changes)
    return small, check_operators.target_of(small, recipe)


source_of = functools.cache(check_operators.random_source)


def logits_grown(plan, params, batch):
    return logits_of(plan.target, params, batch, plan.masks(jnp.float32(0)))


def change_of(plan, params, batch, grown=None):
    """The largest change of a logit, relative to the logits' scale, on the old vocabulary."""
    before = logits_of(plan.source, params, batch)
    grown = grow(params, plan, KEY) if grown is None else grown
    after = logits_grown(plan, grown, batch)[..., : plan.source.vocab_size]
    scale = float(jnp.sqrt(jnp.mean(jnp.square(before))))
    return float(jnp.max(jnp.abs(after - before))) / scale


@pytest.mark.parametrize("mup", MUP)
@pytest.mark.parametrize(
    ("recipe", "attention"),
    [
        (recipe, attention)
        for recipe in EXACT_RECIPES
        for attention in ATTENTION
        # Every query head already has its own key/value head: there is nothing to repeat.
        if (recipe, attention) != ("repeat", "multi-head")
    ],
)
def test_exact_operators_keep_the_function(recipe, attention, mup):
    small, big = pair_of(recipe, **ATTENTION[attention], **MUP[mup])
    with jax.enable_x64(True):
        plan = growth.plan(small, big, recipe)
        assert plan.exactness == EXACT and plan.expansions
        for seed in range(2):  # other parameters and other norm gains
            params, batch = random_params(small, seed), packed_batch(small, seed)
            assert change_of(plan, params, batch) < 1e-10


@pytest.mark.parametrize("recipe", EXACT_RECIPES)
@pytest.mark.slow
def test_exact_operators_keep_the_function_in_float32(recipe):
    small, big = pair_of(recipe, dtype="float32")
    plan = growth.plan(small, big, recipe)
    assert change_of(plan, random_params(small, 3), packed_batch(small)) < 1e-4


def _unshared(e):
    """Copies whose readers keep their full weights."""
    runs = tuple(dataclasses.replace(run, weight=1.0) for run in e.runs)
    return dataclasses.replace(e, runs=runs, masked=True)


def _without(**values):
    return lambda e: dataclasses.replace(e, **values)


NEGATIVE_CONTROLS = {
    "gain not rescaled": ("zero_pad", "embed", _without(gain=1.0)),
    "stream not zero": ("zero_pad", "embed", _without(zero=())),
    "units not zero": ("zero_pad", "mlp", _without(zero=())),
    "groups not zero": ("zero_pad", "kv_heads", _without(zero=())),
    "queries not zero": ("zero_pad", "q_per_kv", _without(zero=())),
    "layers not zero": ("zero_pad", "layers", _without(zero=())),
    "copied layers not zero": ("identity", "layers", _without(zero=())),
    "gain of the rest": ("tile_pad", "embed", _without(gain=1.0)),
    "stream not shared": ("tile", "embed", _unshared),
    "units not shared": ("uneven", "mlp", _unshared),
    "groups not shared": ("uneven", "kv_heads", _unshared),
    "queries not shared": ("net2net,embed=tile", "q_per_kv", _unshared),
    "kv heads tiled": ("repeat", "kv_heads", _without(runs=(Run(0, 2, 0.5), Run(0, 2, 0.5)))),
    "vocabulary not hidden": ("msg", "vocab", _without(masked=False)),
}


@pytest.mark.parametrize("control", NEGATIVE_CONTROLS)
def test_an_operator_without_its_rule_is_noticed(control):
    recipe, axis, broken = NEGATIVE_CONTROLS[control]
    small, big = pair_of(recipe)
    with jax.enable_x64(True):
        plan = growth.plan(small, big, recipe)
        params, batch = random_params(small, 1), packed_batch(small)
        mutated = tuple(broken(e) if e.axis == axis else e for e in plan.expansions)
        broken_plan = dataclasses.replace(plan, expansions=mutated)
        grown = grow(params, broken_plan, KEY)
        masks = plan.masks(jnp.float32(0))
        if axis == "vocab":
            del masks["vocab"]
        before = jax.nn.log_softmax(logits_of(small, params, batch))
        after = jax.nn.log_softmax(logits_of(big, grown, batch, masks))[..., : small.vocab_size]
        assert float(jnp.max(jnp.abs(after - before))) > 1e-3
        right = jax.nn.log_softmax(logits_grown(plan, grow(params, plan, KEY), batch))
        np.testing.assert_allclose(right[..., : small.vocab_size], before, atol=1e-10)


def test_padding_needs_its_eps():
    small, big = pair_of("zero_pad")
    assert big.rms_norm_eps == pytest.approx(small.rms_norm_eps * 12 / 18)
    # If the target has the source's eps, the plan derives the right one.
    derived = growth.plan(small, changed(big, rms_norm_eps=small.rms_norm_eps), "zero_pad")
    assert derived == growth.plan(small, big, "zero_pad")
    assert derived.config.rms_norm_eps == big.rms_norm_eps
    with pytest.raises(UserError, match=rf"0\.01 to 123\.0.*exact with {big.rms_norm_eps!r}"):
        growth.plan(small, changed(big, rms_norm_eps=123.0), "zero_pad")
    with jax.enable_x64(True):
        plan = dataclasses.replace(
            growth.plan(small, big, "zero_pad"),
            target=changed(big, rms_norm_eps=small.rms_norm_eps),
        )
        assert change_of(plan, random_params(small, 1), packed_batch(small)) > 1e-4


def error_like_values(plan, source, target):
    """`gradient_error` with gradients mapped like values, on the source's own slots."""
    worst = largest = 0.0
    mapped = dict(trees.flatten(grow(source, plan, KEY)))
    for path, got in trees.flatten(target):
        old = [
            np.flatnonzero(~plan.by_axis[axis].added) if axis in plan.by_axis else np.arange(size)
            for axis, size in zip(TABLE[path].axes, got.shape, strict=True)
        ]
        worst = max(worst, float(jnp.abs(mapped[path] - got)[np.ix_(*old)].max()))
        largest = max(largest, float(jnp.abs(got).max()))
    return worst / largest


@pytest.mark.parametrize(
    "recipe", ["zero_pad", "tile", "tile_pad", "tile,uneven", "net2net,embed=tile", "repeat"]
)
def test_gradients_follow_the_dual_map(recipe):
    small, big = pair_of(recipe)
    with jax.enable_x64(True):
        plan = growth.plan(small, big, recipe)
        params, batch = random_params(small, 4), packed_batch(small)
        _, source, _ = gradients(params, batch, small)
        _, target, _ = gradients(grow(params, plan, KEY), batch, big)
        assert gradient_error(plan, source, target) < 1e-12
        if recipe == "repeat":  # only the sum over the copies of keys and values is known
            for name in ("key", "value"):
                g, got = (t["layers"]["attention"][name] for t in (source, target))
                parts = got.reshape(*g.shape[:3], 2, g.shape[3])
                np.testing.assert_allclose(parts.sum(3), g, atol=1e-12)
                like_values = grow(source, plan, KEY)["layers"]["attention"][name]
                wrong = like_values.reshape(parts.shape).sum(3)
                assert jnp.abs(wrong - g).max() > 1e-4
        assert error_like_values(plan, source, target) > 1e-2


# --- Symmetry ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "locked"),
    [
        ({"moments": "dual"}, 12 + 20 + 2 + 2),
        ({"moments": "asym"}, 0),
        ({"moments": "dual", "noise_db": 10.0}, 0),
    ],
)
@pytest.mark.slow
def test_copies_that_nothing_separates_are_warned_of_and_counted(how, locked):
    small, big = pair_of("tile", dtype="float32")
    source = source_of(small)
    warns = pytest.warns(growth.LockedCopiesWarning, match="embed .tile., mlp .tile.")
    with warns if locked else contextlib.nullcontext():
        plan = growth.plan(small, big, "tile", **how)
    stage = dataclasses.replace(source.stage, model=big)
    grown = grow(source.state, plan, KEY)
    found = measure.first_steps(grown, source.batch, plan, stage, source.optimizer)
    assert found["locked_copies"] == locked and found["dead_slots"] == 0


def test_separating_noise_has_its_power_and_leaves_the_sum():
    small = changed(SMALL, d_model=48, d_ff=64)
    big = changed(small, d_model=144, d_ff=128)
    with jax.enable_x64(True):
        params = random_params(small, 2)
        plan = growth.plan(small, big, "tile", noise_db=20.0)
        plain, noisy = (
            dict(trees.flatten(grow(params, dataclasses.replace(plan, noise_db=db), KEY)))
            for db in (0.0, 20.0)
        )
        noise = {path: noisy[path] - plain[path] for path in plain}
        up = noise["layers/mlp/up"]
        np.testing.assert_allclose(up.reshape(2, 3, 48, 128).sum(1), 0, atol=1e-12)
        ratio = float(jnp.std(up) / jnp.sqrt(jnp.mean(plain["layers/mlp/up"] ** 2)))
        assert ratio == pytest.approx(0.1, rel=0.05)
        # Only readers of copies get noise, and only at copies.
        assert not noise["embedding"].any() and not noise["final_norm"].any()
        assert noise["head"].any() and not noise["layers/attention/out"].any()
        assert change_of(plan, params, packed_batch(small)) < 1e-10


# --- Depth, vocabulary, composition ------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "layers", "layer_map"),
    [
        ("stack", 5, (0, 1, 2, 0, 1)),
        ("interpose", 6, (0, 0, 1, 1, 2, 2)),
        ("middle", 4, (0, 1, 1, 2)),
        ("middle", 7, (0, 1, 2, 2, 0, 1, 2)),
        ("fresh", 4, (0, 1, 2, NEW)),
        ("identity", 4, (0, 0, 1, 2)),
    ],
)
def test_layer_maps(recipe, layers, layer_map):
    small = changed(SMALL, num_layers=3)
    plan = growth.plan(small, changed(small, num_layers=layers), recipe)
    assert plan.layer_map == layer_map
    params = random_params(changed(small, dtype="float32"), 1)
    plan = growth.plan(
        changed(small, dtype="float32"), changed(small, num_layers=layers, dtype="float32"), recipe
    )
    grown = dict(trees.flatten(grow(params, plan, KEY)))
    for path, old in trees.flatten(params):
        if path.startswith("layers/") and not (
            recipe == "identity" and TABLE[path].residual_writer
        ):
            for layer, of in enumerate(plan.layer_map):
                if of != NEW:
                    np.testing.assert_array_equal(grown[path][layer], old[of])


@pytest.mark.parametrize("recipe", ["zero_pad", "msg", "fresh"])
def test_depth_from_no_layer(recipe):
    small = changed(SMALL, num_layers=0)
    big = changed(small, num_layers=3)
    with jax.enable_x64(True):
        plan = growth.plan(small, big, recipe)
        change = change_of(plan, random_params(small, 1), packed_batch(small))
        assert (change < 1e-10) == (plan.exactness == EXACT)
    with pytest.raises(UserError, match="use operator 'fresh' or 'zero_pad' or 'msg'"):
        growth.plan(small, big, "stack")


def test_new_tokens_raise_the_loss_by_less_than_their_share():
    small = changed(SMALL, vocab_size=23)
    big = changed(small, vocab_size=40)
    with jax.enable_x64(True):
        plan = growth.plan(small, big, "mean")
        params, batch = random_params(small, 1), packed_batch(small)
        grown = grow(params, plan, KEY)
        before, after = logits_of(small, params, batch), logits_of(big, grown, batch)
        np.testing.assert_allclose(after[..., :23], before, atol=1e-12)
        rise = jax.nn.logsumexp(after, axis=-1) - jax.nn.logsumexp(before, axis=-1)
        assert float(rise.min()) > 0 and float(rise.max()) <= np.log(40 / 23)
        new, old = grown["embedding"][23:], params["embedding"]
        assert 0.3 < float(jnp.std(new - old.mean(0)[None]) / jnp.std(old)) < 3
        assert not (new[0] == new[1]).any()


def test_a_longer_context_needs_no_growth():
    """No parameter has the axis, so logits at the old positions do not change."""
    with jax.enable_x64(True):
        params, batch = random_params(SMALL, 1), packed_batch(SMALL, length=24)
        short = {name: x[:, :9] for name, x in batch.items()}
        long = logits_of(SMALL, params, batch)
        np.testing.assert_allclose(long[:, :9], logits_of(SMALL, params, short), atol=1e-12)


def both_ways(recipe, first, second):
    """Grows SMALL in one step, and in two steps in either order."""
    middle, other = changed(SMALL, **first), changed(SMALL, **second)
    big = changed(middle, **second)

    def through(*models):
        state = trained(SMALL, None, [packed_batch(SMALL)])
        for small, large in itertools.pairwise(models):
            state = grow(state, growth.plan(small, large, recipe, moments="dual"), KEY)
        return state

    return through(SMALL, big), through(SMALL, middle, big), through(SMALL, other, big)


@pytest.mark.filterwarnings("ignore::flm_jax.growth.LockedCopiesWarning")
@pytest.mark.parametrize("recipe", ["tile", "net2net,embed=tile"])
@pytest.mark.slow
def test_hidden_then_ffn_is_ffn_then_hidden(recipe):
    with jax.enable_x64(True):
        once, hidden_first, ffn_first = both_ways(recipe, {"d_model": 36}, {"d_ff": 40})
        for state in (hidden_first, ffn_first):
            for tree in ("params", "mu", "nu"):
                a, b = (s.params if tree == "params" else getattr(s.opt_state[1], tree)
                        for s in (once, state))  # fmt: skip
                assert farthest(a, b) < 1e-14, tree


def test_padding_in_either_order_keeps_function_and_old_entries():
    """Fresh entries are drawn at another width, so only old entries can be equal."""
    with jax.enable_x64(True):
        params, batch = random_params(SMALL, 1), packed_batch(SMALL)
        before = logits_of(SMALL, params, batch)
        ends = []
        for first in ({"d_model": 18}, {"d_ff": 30}):
            middle = changed(SMALL, **first)
            middle = changed(middle, rms_norm_eps=growth.norm_eps(SMALL, middle, "zero_pad"))
            big = changed(middle, d_model=18, d_ff=30)
            big = changed(big, rms_norm_eps=growth.norm_eps(middle, big, "zero_pad"))
            grown = grow(params, growth.plan(SMALL, middle, "zero_pad"), KEY)
            grown = grow(grown, growth.plan(middle, big, "zero_pad"), KEY)
            np.testing.assert_allclose(logits_of(big, grown, batch), before, atol=1e-12)
            ends.append(grown["layers"]["mlp"]["up"][:, :12, :20])
        np.testing.assert_allclose(*ends, atol=1e-15)


@pytest.mark.filterwarnings("ignore::flm_jax.growth.LockedCopiesWarning")
@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        ("tile", ({"d_model": 24, "d_ff": 60}, {"d_model": 72, "d_ff": 120})),
        ("stack", ({"num_layers": 4}, {"num_layers": 8})),
        ("interpose", ({"num_layers": 4}, {"num_layers": 12})),
        ("repeat", ({"num_kv_heads": 2}, {"num_kv_heads": 4})),
    ],
)
@pytest.mark.slow
def test_one_step_equals_two_where_the_operator_says_so(recipe, steps):
    assert OPERATORS[recipe].two_steps
    small = changed(SMALL, num_kv_heads=1) if recipe == "repeat" else SMALL
    with jax.enable_x64(True):
        middle, big = (changed(small, **s) for s in steps)
        start = trained(small, None, [packed_batch(small)])
        how = {"moments": "dual", "rates": "carry"}
        twice = grow(start, growth.plan(small, middle, recipe, **how), KEY)
        twice = grow(twice, growth.plan(middle, big, recipe, **how), KEY)
        once = grow(start, growth.plan(small, big, recipe, **how), KEY)
        for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-14)


# --- Plans as data, refusals -------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_every_plan_survives_json(name):
    recipe = check_operators.recipe_of(name, SMALL.num_layers)
    small, big = pair_of(recipe)
    plan = growth.plan(small, big, recipe)
    again = growth.Plan.from_json(plan.to_json())
    assert again == plan and again.digest() == plan.digest() and hash(again) == hash(plan)
    other = dataclasses.replace(plan, moments="reset", noise_db=1.0)
    assert other.digest() != plan.digest()


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        ("tile", {"d_model": 15}, "'embed' from 12 to 15.*multiple of 12.*'tile_pad'"),
        ("uneven", {"d_ff": 25}, "'mlp' from 20 to 25.*multiple of 20.*'net2net'"),
        ("tile", {"num_layers": 3}, "'layers' from 2 to 3: recipe 'tile' does not.*'identity'"),
        ("msg", {"d_model": 10}, "'embed' from 12 to 10: a target is never smaller"),
        ("msg", {"num_layers": 1}, "'layers' from 2 to 1"),
        ("msg", {"head_dim": 8}, "head_dim 6 to 8: RoPE.*add heads"),
        ("msg", {"rope_theta": 5e5}, "rope_theta"),
        ("msg", {"rms_norm_eps": 1e-5}, "rms_norm_eps 0.01 to 1e-05.*exact with 0.01"),
        ("tile", {"vocab_size": 30}, "'vocab' from 23 to 30.*use operator 'msg' or 'mean'"),
        ("repeat", {"num_heads": 8, "num_kv_heads": 4}, "4 and 8 query heads.*'msg'"),
        ("msg", {"num_kv_heads": 4}, "'q_per_kv' from 2 to 1.*grow by kv_heads=repeat"),
        ("ligo", {"d_model": 1 << 20}, "at most 4,194,304.*'zero_pad'"),
        ("magic", {}, "no operator 'magic'; choose one of msg"),
        ("embed=stack", {}, "operator 'stack' grows layers, not 'embed'; operators for it: msg"),
        ("head_dim=tile", {}, "operators for it: none"),
    ],
)
def test_what_a_recipe_cannot_do_is_refused(recipe, change, message):
    with pytest.raises(UserError, match=message):
        growth.plan(SMALL, changed(SMALL, **change), recipe)


def test_other_mistakes_are_refused():
    big = changed(SMALL, d_model=24)
    with pytest.raises(UserError, match="3 entries for 2 layers"):
        growth.plan(SMALL, big, layer_distances=[1, 2, 3])
    with pytest.raises(UserError, match=r"growth.moments is 'half'; choose one of dual, asym"):
        growth.plan(SMALL, big, moments="half")
    with pytest.raises(UserError, match=r"growth.noise_db is -3.0"):
        growth.plan(SMALL, big, noise_db=-3.0)
    plan = growth.plan(SMALL, big)
    with pytest.raises(UserError, match=r"'embedding' is .23, 24., the plan's source has .23, 12."):
        grow(random_params(changed(big, dtype="float32"), 5), plan, KEY)
    with pytest.raises(UserError, match="3 of its 4 slots"):
        Expansion("mlp", 4, (Run(0, 3), Run(NEW, 2)))
    with pytest.raises(UserError, match="sum to 1"):
        Expansion("mlp", 4, (Run(0, 4, 0.5), Run(0, 4, 0.6)))
    with pytest.raises(UserError, match=r"both be zero.*'zero_pad'"):
        Expansion("embed", 4, (Run(0, 4), Run(NEW, 2)), zero=("in", "out"))


# --- The table ---------------------------------------------------------------------------------


def test_the_docs_table_is_the_codes():
    text = (ROOT / "docs/growth.md").read_text()
    assert operators.markdown() in text, "run: flm growth check --list"


@pytest.mark.slow
def test_a_claim_that_does_not_hold_is_contradicted(monkeypatch):
    source = source_of(changed(SMALL, dtype="float32"))
    assert check_operators.check("stack", "stack", source)["ok"]
    lying = dataclasses.replace(OPERATORS["stack"], build=lambda r: dataclasses.replace(
        OPERATORS["interpose"].build(r), exactness=EXACT))  # fmt: skip
    monkeypatch.setitem(OPERATORS, "stack", lying)
    row = check_operators.check("stack", "stack", source)
    assert row["claimed"] == EXACT and row["measured"] == "APPROX" and not row["ok"]


@pytest.mark.slow
def test_ligo_learns_a_plan():
    small, big = pair_of("ligo", dtype="float32")
    source = source_of(small)
    start = growth.plan(small, big, "ligo")
    assert start.moments == "reset" and start.exactness == "APPROX"
    settings = GrowthConfig(fit_steps=30, fit_learning_rate=1e-2)
    batches = itertools.repeat(jax.tree.map(np.asarray, source.batch))
    with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
        plan = ligo.fit(start, source.state.params, batches, sharding.one_device(), settings, KEY)
    loss = {}
    for name, made in (("start", start), ("learned", plan)):
        grown = grow(source.state.params, made, KEY)
        before = measure.source(source.state.params, source.batch, small)
        loss[name] = measure.function_change(before, grown, source.batch, made)["loss_after"]
    assert loss["learned"] < loss["start"] - 0.1, loss
    assert growth.Plan.from_json(plan.to_json()) == plan != start


def chain_batches(config, seed, length=24, rows=16):
    """Endless batches from a random Markov chain of order 2 over the vocabulary."""
    table = np.random.default_rng(0).dirichlet(
        np.full(config.vocab_size, 0.15), (config.vocab_size,) * 2
    )
    rng = np.random.default_rng(seed)
    while True:
        text = np.zeros((rows, length + 1), np.int32)
        text[:, :2] = rng.integers(0, config.vocab_size, (rows, 2))
        for t in range(2, length + 1):
            below = table[text[:, t - 2], text[:, t - 1]].cumsum(-1) < rng.random((rows, 1))
            text[:, t] = below.sum(-1).clip(max=config.vocab_size - 1)
        yield {
            "tokens": text[:, :-1],
            "targets": text[:, 1:],
            "segment_ids": np.ones((rows, length), np.int32),
            "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
            "weights": np.ones((rows, length), np.float32),
        }


@pytest.mark.slow
def test_ligos_fit_lowers_the_loss_but_not_as_much_as_training_for_its_flops():
    """What docs/growth.md states: the fit learns, costs as much as training, and gains less."""
    small = changed(
        SMALL, dtype="float32", d_model=16, d_ff=32, mup_base_width=16, matrix_init_std=0.2,
        vector_init_std=0.2, rms_norm_eps=1e-5, input_mult=1.0, output_mult=1.0,
    )  # fmt: skip
    big = changed(small, d_model=32, d_ff=64, num_heads=8, num_kv_heads=4, num_layers=4)
    mesh = sharding.one_device()

    def train(model, state, batches):
        stage = StageConfig("a", model, 1000, 16, 0.01, 0.01)
        tx = optim.optimizer(stage, OptimizerConfig(), schedules.steady)
        if state is None:
            state = init_state(model, tx, jax.random.key(0))
        with jax.set_mesh(mesh):
            step = make_train_step(stage, tx, mesh)
            state = jax.tree.map(jnp.copy, state)
            for batch in batches:
                state, _ = step(state, batch)
        return state

    summed = jax.jit(summed_loss, static_argnums=2)

    def loss(plan, params):
        totals = [summed(params, batch, plan.target) for batch in batches]
        return float(sum(t for t, _ in totals) / sum(n for _, n in totals))

    source = train(small, None, itertools.islice(chain_batches(small, 1), 300))
    batches = list(itertools.islice(chain_batches(small, 2), 60))
    settings = GrowthConfig(fit_steps=len(batches), fit_learning_rate=1e-2)
    with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
        start = growth.plan(small, big, "ligo")
        learned = ligo.fit(start, source.params, iter(batches), mesh, settings, KEY)
    unfitted = loss(start, grow(source.params, start, KEY))
    fitted = loss(learned, grow(source.params, learned, KEY))
    assert fitted < unfitted - 0.01, (fitted, unfitted)
    # Its price: a little more than as many training steps of the grown model.
    tokens = batches[0]["targets"].size
    step = tokens * counts.flops_per_token_train(big, 24)
    price = len(batches) * ligo.fit_flops(learned, tokens, 24)
    assert len(batches) * step < price < 1.1 * len(batches) * step
    plan = growth.plan(small, big, "zero_pad")
    trained = train(plan.target, grow(source, plan, KEY), batches)  # fewer FLOPs than the fit
    assert loss(plan, trained.params) < fitted - 0.05
