"""Growths that follow each other, start from no layers, or meet an optimizer of another kind."""

import dataclasses
import itertools
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flm_jax import growth
from flm_jax.config import GrowthConfig
from flm_jax.errors import UserError
from flm_jax.growth import moments as moments_module
from flm_jax.growth.receipt import locked_copies
from flm_jax.interop.opening import open_state
from flm_jax.params import mup, trees
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.store.chunked import CheckpointReader
from flm_jax.train import optim
from flm_jax.train.train_step import TrainState
from tests.commands import run
from tests.models import (
    SMALL,
    TABLE,
    changed,
    farthest,
    gradients,
    grow,
    packed_batch,
    random_params,
    trained,
)
from tests.runs import lineage
from tests.states import assert_same_bits, random_state

KEY = jax.random.key(7)
BATCHES = [packed_batch(SMALL, seed) for seed in range(30)]


def quiet_plan(small, big, recipe, **how):
    """A plan; its warnings are not the subject of the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return growth.plan(small, big, recipe, **how)


@pytest.fixture(scope="module")
def start():
    """SMALL after 4 steps."""
    with jax.enable_x64(True):
        return trained(SMALL, None, BATCHES[:4])


def grown_by(state, model, changes, recipe, steps=3, **how):
    """The state after one more growth and some steps, and its model."""
    plan = quiet_plan(model, changed(model, **changes), recipe, **how)
    config = GrowthConfig(recipe, how["moments"], how["rates"], ramp_steps=2)
    at = int(state.step)
    state = trained(plan.target, grow(state, plan, KEY), BATCHES[4 : 4 + steps], config, at)
    return state, plan.target


def assert_follows(state, model, changes, recipe="tile", steps=20, negative=None):
    """A tiled growth of `state` takes the steps of `state`, mapped, to 1e-10.

    `negative` changes the grown state in a way that must break this.
    """
    plan = quiet_plan(model, changed(model, **changes), recipe, moments="dual", rates="carry")
    batches = BATCHES[10 : 10 + steps]
    want = grow(trained(model, state, batches).params, plan, KEY)
    start = grow(state, plan, KEY)
    got = trained(plan.target, start, batches)
    assert farthest(got.params, want) < 1e-10
    adam = start.opt_state[1]
    wrong = adam._replace(**(negative or _without_multipliers)(adam))
    state = dataclasses.replace(start, opt_state=(start.opt_state[0], wrong, *start.opt_state[2:]))
    assert farthest(trained(plan.target, state, batches).params, want) > 1e-5


def _without_multipliers(adam):
    return {"step_scale": jnp.ones_like(adam.step_scale)}


@pytest.mark.parametrize("rates", ["carry", "ramp"])
@pytest.mark.parametrize("recipe", ["zero_pad", pytest.param("msg", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_tiled_growth_of_a_padded_one_follows_it(start, recipe, rates):
    with jax.enable_x64(True):
        wider = {"d_model": 18, "d_ff": 32}
        state, model = grown_by(start, SMALL, wider, recipe, moments="dual", rates=rates)
        assert float(state.opt_state[1].kept) == (rates == "carry")
        assert_follows(state, model, {"d_model": 36, "num_heads": 8, "num_kv_heads": 4})


@pytest.mark.slow
def test_three_growths_follow_the_last_but_one(start):
    """msg, then zero_pad, then tile: 20 steps of AdamW."""
    with jax.enable_x64(True):
        how = {"moments": "asym", "rates": "carry"}
        state, model = grown_by(start, SMALL, {"d_model": 15, "num_layers": 3}, "msg", **how)
        state, model = grown_by(state, model, {"d_model": 18, "d_ff": 24}, "zero_pad", **how)
        adam = state.opt_state[1]
        assert len(adam.step_scale) == 3 and set(adam.created["embed"].tolist()) == {0, 1, 2}

        def one_row(adam):  # negative control: all entries as if the first growth had made them
            return {"created": jax.tree.map(jnp.zeros_like, adam.created)}

        assert_follows(state, model, {"d_model": 36, "d_ff": 48}, negative=one_row)


def test_multipliers_of_a_growth_of_a_growth_are_those_of_the_product(start):
    with jax.enable_x64(True):
        middle, big = changed(SMALL, d_model=24, d_ff=40), changed(SMALL, d_model=48, d_ff=80)
        how = {"moments": "dual", "rates": "carry"}
        once = grow(start, quiet_plan(SMALL, big, "tile", **how), KEY).opt_state[1]
        first = grow(start, quiet_plan(SMALL, middle, "tile", **how), KEY)
        twice = grow(first, quiet_plan(middle, big, "tile", **how), KEY).opt_state[1]
        for name in ("share", "step_scale", "eps_scale", "born", "created", "mu", "nu"):
            ours, theirs = (jax.tree.leaves(getattr(a, name)) for a in (once, twice))
            for x, y in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-12)


def test_a_stage_without_growth_leaves_faded_multipliers_alone(start):
    with jax.enable_x64(True):
        wider = {"d_model": 18}
        state, model = grown_by(start, SMALL, wider, "zero_pad", moments="dual", rates="ramp")
        plain = mup.spec(model)
        tx = optim.scale_by_slot_adam(plain, 0.9, 0.95, 1e-8)
        ones = jax.tree.map(jnp.ones_like, state.params)
        adam = state.opt_state[1]
        assert float(jnp.abs(adam.step_scale - 1).max()) > 0.1
        got, after = tx.update(ones, adam)
        scales = {"step_scale": adam.step_scale, "eps_scale": adam.eps_scale}
        want, _ = tx.update(ones, adam._replace(**jax.tree.map(jnp.ones_like, scales)))
        assert farthest(got, want) == 0 and float(after.kept) == 0


@pytest.mark.parametrize("moments", ["asym", "dual"])
def test_repeated_heads_leave_queries_and_outputs_alone(start, moments):
    """They are only laid out differently: history, age and step size stay."""
    with jax.enable_x64(True):
        big = changed(SMALL, num_kv_heads=4)
        plan = quiet_plan(SMALL, big, "repeat", moments=moments, rates="carry")
        grown = grow(start, plan, KEY)
        paths = ("layers/attention/query", "layers/attention/out")
        want, got = trained(SMALL, start, BATCHES[4:5]), trained(big, grown, BATCHES[4:5])

        def leaves(state):
            adam = state.opt_state[1]
            return [dict(trees.flatten(tree)) for tree in (state.params, adam.mu, adam.nu)]

        for ours, theirs in zip(leaves(got), leaves(want), strict=True):
            for path in paths:
                flat = theirs[path].reshape(ours[path].shape)
                np.testing.assert_allclose(ours[path], flat, atol=1e-13, err_msg=path)
        born = grown.opt_state[1].born
        assert born["query_heads"].tolist() == [0] * 4
        assert born["kv_heads"].tolist() == ([0, 4, 0, 4] if moments == "asym" else [0] * 4)


@pytest.mark.parametrize("rates", ["carry", "ramp"])
def test_entries_without_a_source_train_at_the_targets_rate(start, rates):
    """Also those of copied slots: new columns of `down` behind units that are shared."""
    with jax.enable_x64(True):
        big = changed(SMALL, d_model=18, d_ff=40)
        plan = quiet_plan(SMALL, big, "zero_pad,mlp=tile", moments="dual", rates=rates)
        state = grow(start, plan, KEY).opt_state[1]
        tx = optim.scale_by_slot_adam(mup.spec(plan.target), 0.9, 0.95, 1e-12)
        mu, nu = (jax.tree.map(jnp.zeros_like, tree) for tree in (state.mu, state.nu))
        born = jax.tree.map(lambda x: jnp.full_like(x, 4), state.born)
        zero = state._replace(mu=mu, nu=nu, born=born)
        ones = jax.tree.map(jnp.ones_like, state.mu)
        direction, _ = tx.update(ones, zero)  # all entries are of age 1: the multiplier itself
        down = direction["layers"]["mlp"]["down"]
        np.testing.assert_allclose(down[:, :, 12:], 1, rtol=1e-9)
        np.testing.assert_allclose(down[:, :, :12], 0.5 * 18 / 12, rtol=1e-9)


# Each pair of two of the three occurs.
FROM_NONE = [
    (recipe, moments, ("target", "carry", "ramp")[(i + j) % 3])
    for i, recipe in enumerate(("fresh", "zero_pad", "msg"))
    for j, moments in enumerate(("dual", "asym", "reset"))
]


@pytest.mark.parametrize(("recipe", "moments", "rates"), FROM_NONE)
@pytest.mark.slow
def test_a_train_state_grows_from_no_layers(recipe, moments, rates):
    with jax.enable_x64(True):
        none = changed(SMALL, num_layers=0)
        state = trained(none, None, BATCHES[:3])
        big = changed(none, num_layers=2, d_model=18)
        plan = quiet_plan(none, big, f"msg,layers={recipe}", moments=moments, rates=rates)
        grown = growth.grow(state, plan, KEY)
        adam = grown.opt_state[1]
        assert adam.born["layers"].tolist() == [3, 3]
        after = trained(plan.target, grown, BATCHES[3:5])
        for path, x in trees.flatten(after.params):
            assert jnp.isfinite(x).all() and x.shape == plan.big.shape(path)


def test_a_train_state_grows_from_one_layer():
    with jax.enable_x64(True):
        one = changed(SMALL, num_layers=1)
        state = trained(one, None, BATCHES[:3])
        plan = quiet_plan(
            one, changed(one, num_layers=3), "identity", moments="dual", rates="carry"
        )
        adam = growth.grow(state, plan, KEY).opt_state[1]
        assert adam.born["layers"].tolist() == [0, 3, 3]


LOCK_CASES = [
    # recipe, target, moments, rates, noise, steps before, locked copies by axis
    ("tile", {"d_ff": 40}, "asym", "target", 0.0, 4, {}),
    ("tile", {"d_ff": 40}, "asym", "target", 0.0, 0, {"mlp": 20}),
    ("tile", {"d_ff": 40}, "dual", "target", 0.0, 4, {"mlp": 20}),
    ("tile", {"d_ff": 40}, "reset", "carry", 0.0, 4, {"mlp": 20}),
    ("tile", {"d_ff": 40}, "dual", "target", 10.0, 4, {}),
    ("tile", {"d_ff": 60}, "asym", "target", 0.0, 4, {"mlp": 20}),  # two copies restart alike
    ("tile", {"d_ff": 40, "d_model": 24}, "dual", "carry", 0.0, 4, {"mlp": 20, "embed": 12}),
    # New entries of one axis separate the copies of another.
    ("tile,embed=zero_pad", {"d_ff": 40, "d_model": 18}, "dual", "carry", 0.0, 4, {}),
    ("tile,mlp=msg", {"d_ff": 30, "d_model": 24}, "dual", "target", 0.0, 4, {}),
    ("tile,layers=fresh", {"d_ff": 40, "num_layers": 3}, "dual", "target", 0.0, 4, {}),
    # Layers that are copied do not.
    ("tile,identity", {"d_ff": 40, "num_layers": 3}, "dual", "target", 0.0, 4, {"mlp": 20}),
    ("uneven", {"d_ff": 40}, "dual", "target", 0.0, 4, {}),
    ("uneven", {"d_ff": 40}, "dual", "carry", 0.0, 4, {"mlp": 20}),
    ("uneven", {"d_ff": 40}, "reset", "carry", 0.0, 4, {"mlp": 20}),
    ("uneven", {"d_ff": 40}, "asym", "carry", 0.0, 4, {}),
    ("uneven", {"d_ff": 40}, "dual", "ramp", 0.0, 4, {}),
    ("uneven", {"d_ff": 40}, "dual", "carry", 10.0, 4, {}),
    ("net2net", {"d_ff": 27}, "dual", "target", 0.0, 4, {"mlp": 7}),
    ("aki", {"d_ff": 40}, "dual", "target", 0.0, 4, {}),
    ("aki", {"d_ff": 40, "num_layers": 1}, "reset", "target", 0.0, 4, {"mlp": 20}),
    ("repeat", {"num_kv_heads": 4}, "dual", "target", 0.0, 4, {}),
    ("tile", {"num_heads": 8, "num_kv_heads": 4}, "dual", "carry", 0.0, 4, {"kv_heads": 2}),
    ("tile", {"num_heads": 8}, "dual", "carry", 0.0, 4, {"q_per_kv": 2}),
    ("tile", {"num_heads": 8}, "dual", "carry", 10.0, 4, {}),
    ("tile,vocab=mean", {"d_ff": 40, "vocab_size": 29}, "dual", "target", 0.0, 4, {"mlp": 20}),
    ("tile_pad", {"d_ff": 47}, "dual", "target", 0.0, 4, {"mlp": 20}),
]


LOCKS = pytest.mark.parametrize(
    ("recipe", "target", "moments", "rates", "noise", "before", "locked"), LOCK_CASES
)


def lock_case(recipe, target, moments, rates, noise, before):
    """A state of SMALL after some steps on random gradients, and a plan for it."""
    small = changed(SMALL, num_layers=target.get("num_layers", 2) if "aki" in recipe else 2)
    params = random_params(small, 5)
    tx = optim.scale_by_slot_adam(mup.spec(small), 0.9, 0.95, 1e-3)
    adam = tx.init(params)
    step = jax.jit(tx.update)
    for seed in range(before):
        _, adam = step(random_params(small, seed), adam)
    rest = trained(small, None, [])
    opt_state = (rest.opt_state[0], adam, *rest.opt_state[2:])
    plan = growth.plan(
        small, changed(small, **target), recipe, moments=moments, rates=rates, noise_db=noise
    )
    return TrainState(jnp.int32(before), params, opt_state), plan


@LOCKS
def test_locks_are_predicted_and_warned_of(recipe, target, moments, rates, noise, before, locked):
    with jax.enable_x64(True), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state, plan = lock_case(recipe, target, moments, rates, noise, before)
        moments_module.check(state.opt_state, plan)
        warned = [w for w in caught if issubclass(w.category, growth.LockedCopiesWarning)]
        assert {axis: len(slots) for axis, slots in plan.locks(state).items()} == locked
        assert bool(warned) == bool(locked)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::flm_jax.growth.LockedCopiesWarning")
@LOCKS
def test_predicted_locks_are_true(recipe, target, moments, rates, noise, before, locked):
    """After 8 steps of AdamW exactly the predicted copies are in proportion."""
    with jax.enable_x64(True):
        state, plan = lock_case(recipe, target, moments, rates, noise, before)
        config = GrowthConfig(recipe, moments, rates, noise_db=noise, ramp_steps=20)
        grown = grow(state, plan, KEY)
        state = trained(plan.target, grown, BATCHES[10:18], config, int(grown.step))
        _, grads, _ = gradients(state.params, BATCHES[20], plan.target)
        assert int(locked_copies(plan, state.params, grads)) == sum(locked.values())


def test_noise_without_copies_is_useless_and_said_so():
    with pytest.warns(growth.UselessNoiseWarning, match="mlp .zero_pad.*set noise_db to 0"):
        growth.plan(SMALL, changed(SMALL, d_ff=25), "zero_pad", noise_db=10)


def test_rates_of_a_dense_map_are_undefined_and_refused():
    with pytest.raises(UserError, match=r"axis 'mlp' grows by a dense map.*use rates 'target'"):
        growth.plan(SMALL, changed(SMALL, d_ff=25), "ligo", rates="carry")


def test_a_growth_inside_a_ramp_is_warned_of(start):
    with jax.enable_x64(True):
        plan = quiet_plan(SMALL, changed(SMALL, d_ff=25), "zero_pad", rates="ramp")
        config = GrowthConfig("zero_pad", rates="ramp", ramp_steps=4)
        state = trained(plan.target, grow(start, plan, KEY), BATCHES[:2], config, 4)
        again = quiet_plan(plan.target, changed(SMALL, d_ff=30), "zero_pad", rates="carry")
        with pytest.warns(growth.UnfinishedRampWarning, match="axis 'mlp'.*exponent 0.5"):
            growth.grow(state, again, KEY)


OPTIMIZERS = {
    "adamw": (optax.adamw(1e-2), {"mu": 1, "nu": 2}),
    "sgd": (optax.sgd(1e-2, momentum=0.9), {"trace": 1}),
    "rmsprop": (optax.rmsprop(1e-2), {"nu": 2}),
    "adagrad": (optax.adagrad(1e-2), {"sum_of_squares": 2}),
    "amsgrad": (optax.amsgrad(1e-2), {"mu": 1, "nu": 2, "nu_max": 2}),
    "adabelief": (optax.adabelief(1e-2), {"mu": 1, "nu": 2}),
    "lion": (optax.lion(1e-2), {"mu": 1}),
    "chained": (optax.chain(optax.clip(1.0), optax.adam(1e-2)), {"mu": 1, "nu": 2}),
    "accumulated": (optax.MultiSteps(optax.adam(1e-2), 3), {"mu": 1, "nu": 2, "acc_grads": 1}),
    "injected": (optax.inject_hyperparams(optax.adam)(1e-2), {"mu": 1, "nu": 2}),
}


def fields_of(state, names):
    """The fields of an optax state, wherever they are nested."""
    found = {}

    def visit(node):
        for name in getattr(node, "_fields", ()):
            if name in names:
                found[name] = dict(trees.flatten(getattr(node, name)))
            else:
                visit(getattr(node, name))
        if type(node) is tuple:
            for part in node:
                visit(part)

    visit(state)
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optax_states_grow_by_the_powers_of_the_dual_map(name):
    """Oracle: tiled units share their gradient, so that a moment of power p is times 0.5 ** p."""
    tx, powers = OPTIMIZERS[name]
    with jax.enable_x64(True):
        params = random_params(SMALL, 1)
        random = random_params(SMALL, 2)
        filled = jax.tree.map(
            lambda x: jnp.asarray(np.random.default_rng(3).normal(size=x.shape), x.dtype)
            if x.ndim else x, tx.init(random),
        )  # fmt: skip
        plan = quiet_plan(SMALL, changed(SMALL, d_ff=40), "tile", moments="dual")
        grown = growth.grow(TrainState(jnp.int32(0), params, filled), plan, KEY)
        like = tx.init(grown.params)
        assert jax.tree.map(jnp.shape, grown.opt_state) == jax.tree.map(jnp.shape, like)
        old, new = fields_of(filled, powers), fields_of(grown.opt_state, powers)
        assert set(old) == set(powers)
        for field, power in powers.items():
            for path in TABLE:
                x = np.asarray(old[field][path])
                if path in ("layers/mlp/up", "layers/mlp/gate"):
                    x = np.concatenate([x, x], -1) * 0.5**power
                elif path == "layers/mlp/down":
                    x = np.concatenate([x, x], 1)
                np.testing.assert_allclose(new[field][path], x, atol=1e-15, err_msg=path)


FOREIGN = {
    "adafactor": (optax.adafactor(1e-2, min_dim_size_to_factor=4), "v_row.*register it"),
    "adan": (optax.adan(1e-2), "register it"),
    "flattened": (optax.flatten(optax.sgd(1e-2, 0.9)), "not nested dicts like the parameters"),
    "novograd": (optax.novograd(1e-2), "register it"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_states_of_unknown_kinds_are_refused_by_name(name):
    tx, match = FOREIGN[name]
    params = random_params(changed(SMALL, dtype="float32"), 1)
    plan = quiet_plan(SMALL, changed(SMALL, d_ff=40), "tile")
    with pytest.raises(UserError, match=match):
        growth.grow(TrainState(jnp.int32(0), params, tx.init(params)), plan, KEY)


def test_frozen_parameters_and_carried_rates_are_refused():
    params = random_params(changed(SMALL, dtype="float32"), 1)
    mask = trees.unflatten({path: "mlp" not in path for path in TABLE})
    frozen = optax.masked(optax.adam(1e-2), mask)
    plan = quiet_plan(SMALL, changed(SMALL, d_ff=40), "tile")
    with pytest.raises(UserError, match="parameter 'layers/mlp/down', which is frozen"):
        growth.grow(TrainState(jnp.int32(0), params, frozen.init(params)), plan, KEY)
    carry = dataclasses.replace(plan, rates="carry")
    state = TrainState(jnp.int32(0), params, optax.sgd(1e-2, 0.9).init(params))
    with pytest.raises(UserError, match="TraceState does not have"):
        growth.grow(state, carry, KEY)


def test_a_state_of_ones_own_can_be_registered(monkeypatch):
    from typing import Any, NamedTuple

    from flm_jax.growth import moments

    class Own(NamedTuple):
        velocity: Any

    monkeypatch.setattr(moments, "_POWERS", dict(moments._POWERS))
    params = random_params(changed(SMALL, dtype="float32"), 1)
    plan = quiet_plan(SMALL, changed(SMALL, d_ff=40), "tile", moments="dual")
    state = TrainState(jnp.int32(0), params, (Own(params),))
    with pytest.raises(UserError, match="register it"):
        growth.grow(state, plan, KEY)
    with pytest.raises(UserError, match=r"Own.speed=1; give fields of the state .velocity."):
        growth.register_moments(Own, speed=1)
    growth.register_moments(Own, velocity=1)
    up = growth.grow(state, plan, KEY).opt_state[0].velocity["layers"]["mlp"]["up"]
    old = params["layers"]["mlp"]["up"]
    np.testing.assert_allclose(up, np.concatenate([old, old], -1) / 2)


def test_a_state_without_layers_survives_a_checkpoint(tmp_path):
    """Orbax cannot save arrays without entries; they come back with their shapes."""
    model = changed(SMALL, num_layers=0, dtype="float32")
    state = random_state(model, 1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, {"data": 1})
    checkpoints.wait()
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    got, progress = checkpoints.restore(3, like)
    checkpoints.close()
    assert_same_bits(got, state)
    assert progress == {"data": 1}
    reader = CheckpointReader(tmp_path / "3")
    assert reader.progress == {"data": 1}
    up = reader.read("params/layers/mlp/up", [slice(0, 0), slice(2, 5), np.array([1, 3])])
    assert up.shape == (0, 3, 2) and up.dtype == np.float32


@pytest.mark.slow
def test_a_chain_grows_from_no_layers_through_ramp_and_carry(tmp_path):
    """From zero to one to three layers in the runner: receipts, multipliers, report, resumption."""
    call = ("train", "--config=tests/zero_chain.py", f"--workdir={tmp_path}")
    status, _, err = run(*call)
    assert status == 0, err
    stages = lineage(tmp_path)
    assert [stage["name"] for stage in stages] == ["none", "one", "two", "three"]
    for before, stage in itertools.pairwise(stages):
        receipt = stage["receipt"]
        assert receipt["exactness"] == "EXACT"
        assert receipt["max_abs_logit_diff"] <= 1e-4 * receipt["logit_scale"]
        assert receipt["dead_slots"] == receipt["locked_copies"] == 0
        assert abs(stage["eval"]["bpb_start"] - before["eval"]["bpb_end"]) < 1e-4
    assert stages[1]["receipt"]["layer_map"] == [-1]
    rows = {}
    for name in ("none", "one", "two", "three"):
        adam = open_state(str(tmp_path), name).state.opt_state[1]
        rows[name] = (len(adam.step_scale), float(adam.kept))
    # After the ramp, nothing of its multipliers is in force; carried ones stay, one row per growth.
    assert rows == {"none": (1, 1.0), "one": (2, 0.0), "two": (3, 1.0), "three": (4, 1.0)}
    report = (tmp_path / "report" / "report.md").read_text()
    assert "# none -> one -> two -> three" in report
    for step in (tmp_path / "stages" / "3-three" / "checkpoints").iterdir():
        if int(step.name) > 28:
            shutil.rmtree(step)
    entries = json.loads((tmp_path / "lineage.json").read_text())
    entries["stages"].pop()
    (tmp_path / "lineage.json").write_text(json.dumps(entries))
    status, _, err = run(*call)
    assert status == 0, err
    assert lineage(tmp_path)[-1]["params_digest"] == stages[-1]["params_digest"]


def test_repeated_heads_that_serve_copied_queries_are_locked():
    """Copies of queries, then of the head that serves them, with no step between."""
    with jax.enable_x64(True):
        one = changed(SMALL, num_kv_heads=1, num_heads=2)
        state = trained(one, None, BATCHES[:3])
        tiled = quiet_plan(one, changed(one, num_heads=4), "tile", moments="dual")
        repeated = quiet_plan(tiled.target, changed(tiled.target, num_kv_heads=2), "repeat")
        assert repeated.locks() == {}
        dual = dataclasses.replace(repeated, moments="dual")
        grown = grow(state, tiled, KEY)
        assert dual.locks(grown) == {"kv_heads": (1,)}
        # Negative control: restarted queries have another history than the old ones.
        asym = dataclasses.replace(tiled, moments="asym")
        assert dual.locks(grow(state, asym, KEY)) == {}
