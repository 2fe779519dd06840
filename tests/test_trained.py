"""What a stage trains: added slots, given paths, old slots at a lower rate.

The oracle of added slots is plain numpy on the plan's source slots: an entry is old if it is the
first occurrence of its source on all of its axes. Optax is the oracle of training some paths.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flm_jax import growth
from flm_jax.config import GrowthConfig, OptimizerConfig, StageConfig
from flm_jax.errors import UserError
from flm_jax.growth import LockedCopiesWarning, measure
from flm_jax.params import sharding, trees
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import TrainState, make_train_step
from flm_jax.train.trained import Trained
from tests.models import SMALL, TABLE, changed, gradients, grow, packed_batch, random_params

KEY = jax.random.key(3)
MATRIX_RATE, VECTOR_RATE = 3e-2, 1e-2
PATHS = ("layers/mlp/*", "head", "*/query")
TRAINED = {"layers/mlp/norm", "layers/mlp/gate", "layers/mlp/up", "layers/mlp/down", "head",
           "layers/attention/query"}  # fmt: skip
ALL_SIZES = {"d_model": 18, "d_ff": 30, "num_layers": 3, "num_heads": 9, "num_kv_heads": 3,
             "vocab_size": 29}  # fmt: skip
GROWTHS = {
    "msg": ALL_SIZES,
    "zero_pad,identity,vocab=mean": ALL_SIZES,
    "identity": {"num_layers": 4},
    "layers=ranges(1-1,0-1)": {"num_layers": 3},
    "tile": {"d_model": 24, "d_ff": 40},
    "repeat": {"num_kv_heads": 4},
}


def steady(step):
    """A constant factor on the learning rate, in the widest dtype."""
    return jnp.ones_like(step, jnp.result_type(float))


def planned(recipe, **options):
    big = changed(SMALL, **GROWTHS[recipe])
    if recipe == "repeat":
        return growth.plan(SMALL, big, recipe, **options)
    big = changed(big, rms_norm_eps=growth.norm_eps(SMALL, big, recipe))
    return growth.plan(SMALL, big, recipe, **options)


def old_entries(plan, path):
    """bool, of the parameter's shape: whether all slots of an entry are old."""
    param = plan.table[path]
    old = np.ones(plan.big.shape(path), bool)
    for dim, axis in enumerate(param.axes):
        e = plan.by_axis.get(axis)
        if e is None or e.splits in param.axes:  # repeated key/value heads share out the queries
            continue
        seen: set[int] = set()
        for slot, source in enumerate(e.index.tolist()):
            if source == -1 or source in seen:
                old[(slice(None),) * dim + (slot,)] = False
            seen.add(source)
    return old


def stage_of(model, *, accumulate=1, paths=(), **settings):
    return StageConfig(
        "a", model, 100, 4, VECTOR_RATE, MATRIX_RATE, accumulate=accumulate,
        growth=GrowthConfig(**settings), train_paths=paths,
    )  # fmt: skip


ADAM = OptimizerConfig(eps=1e-3, weight_decay=0.1, clip_norm=0.05)


def train(state, stage, steps, *, plan=None, masked=False, settings=ADAM):
    """Trains a copy of a state; None: random parameters. Returns the state."""
    tx = optim.optimizer(stage, settings, steady, 5 if plan else None)
    if state is None:
        params = random_params(stage.model, 5)
        state = TrainState(jnp.int32(0), params, tx.init(params))
    mesh = sharding.one_device()
    with jax.set_mesh(mesh):
        added = growth.added_slots(plan) if plan else None
        step = make_train_step(stage, tx, mesh, plan.masks if masked else None, added=added)
        state = jax.tree.map(jnp.copy, state)
        for n in range(steps):
            mask = (jnp.float32((n + 1) / 30),) if masked else ()
            state, _ = step(state, packed_batch(stage.model, n, batch=4), *mask)
    return state


@functools.cache
def source():
    """A trained state, with negative zeros among the values."""
    with jax.enable_x64(True):
        state = train(None, stage_of(SMALL), 5)
        params = {
            path: x.at[(0,) * x.ndim].set(-0.0) if x.ndim > 1 else x
            for path, x in trees.flatten(state.params)
        }
        return dataclasses.replace(state, params=trees.unflatten(params))


@pytest.mark.parametrize(
    ("recipe", "accumulate"), [*((recipe, 1) for recipe in GROWTHS), ("msg", 2)]
)
@pytest.mark.slow
def test_old_entries_keep_their_bits_and_added_ones_train(recipe, accumulate):
    with jax.enable_x64(True):
        plan = planned(recipe, old_rate=0.0)
        grown = grow(source(), plan, KEY)
        masked = plan.masked
        stage = stage_of(plan.target, accumulate=accumulate, old_rate=0.0)
        after = train(grown, stage, 20, plan=plan, masked=masked)
        control = train(grown, stage_of(plan.target), 20, plan=plan, masked=masked)
    before, after, control = (dict(trees.flatten(s.params)) for s in (grown, after, control))
    negative_zeros = 0
    for path, x in before.items():
        old = old_entries(plan, path)
        x, y, z = (np.asarray(tree[path]) for tree in (before, after, control))
        assert x[old].tobytes() == y[old].tobytes(), path
        negative_zeros += int((np.signbit(x[old]) & (x[old] == 0)).sum())
        # Without the freeze they move. So do all added entries that have a gradient or decay.
        assert (x[old] != z[old]).mean() > 0.5, path
        if not old.all():
            assert (x[~old] != y[~old]).mean() > 0.5, path
    assert negative_zeros > 3


def _adamw(frozen, clip_norm, whole_norm=False):
    """Optax's AdamW in µP's groups over some paths; the others are frozen."""
    width = SMALL.d_model / SMALL.mup_base_width

    def of(rate, decay):
        return optax.adamw(rate, 0.9, 0.95, 1e-3, weight_decay=decay)

    def group(path):
        if path in frozen:
            return "frozen"
        return "gain" if "norm" in path else "vector" if path in ("head", "embedding") else "matrix"

    groups = {
        "matrix": of(MATRIX_RATE / width, 0.1 * width),
        "vector": of(VECTOR_RATE, 0.1),
        "gain": of(VECTOR_RATE, 0.0),
        "frozen": optax.set_to_zero(),
    }
    silent = trees.unflatten({path: path in frozen and not whole_norm for path in TABLE})
    return optax.chain(
        optax.masked(optax.set_to_zero(), silent),
        optax.clip_by_global_norm(clip_norm),
        optax.multi_transform(groups, trees.unflatten({path: group(path) for path in TABLE})),
    )


@pytest.mark.parametrize("clip_norm", [0.05, 100.0])
def test_training_some_paths_is_optax_with_the_others_set_to_zero(clip_norm):
    """Also the norm that is clipped: in the control, frozen entries count in it."""
    with jax.enable_x64(True):
        settings = dataclasses.replace(ADAM, clip_norm=clip_norm)
        got = train(None, stage_of(SMALL, paths=PATHS), 4, settings=settings).params
        apart = []
        for whole_norm in (False, True):
            tx = _adamw(set(TABLE) - TRAINED, clip_norm, whole_norm)
            params = random_params(SMALL, 5)
            state = tx.init(params)
            update = jax.jit(tx.update)
            for n in range(4):
                _, grads, _ = gradients(params, packed_batch(SMALL, n, batch=4), SMALL)
                with jax.numpy_dtype_promotion("standard"):
                    updates, state = update(grads, state, params)
                params = optax.apply_updates(params, updates)
            pairs = zip(trees.flatten(got), trees.flatten(params), strict=True)
            apart.append(max(float(jnp.abs(x - y).max()) for (_, x), (_, y) in pairs))
        assert apart[0] < 1e-12
        assert (apart[1] > 1e-5) == (clip_norm < 1)
        pairs = zip(trees.flatten(got), trees.flatten(random_params(SMALL, 5)), strict=True)
        moved = {path for (path, x), (_, y) in pairs if (np.asarray(x) != np.asarray(y)).any()}
        assert moved == TRAINED


def test_the_reported_norm_is_that_of_the_entries_that_train():
    with jax.enable_x64(True):
        stage, batch = stage_of(SMALL, paths=PATHS), packed_batch(SMALL, 0, batch=4)
        tx = optim.optimizer(stage, ADAM, schedules.steady)
        params = random_params(SMALL, 5)
        _, grads, _ = gradients(params, batch, SMALL)
        squares = {path: float(jnp.sum(g**2)) for path, g in trees.flatten(grads)}
        mesh = sharding.one_device()
        with jax.set_mesh(mesh):
            step = make_train_step(stage, tx, mesh)
            _, metrics = step(TrainState(jnp.int32(0), params, tx.init(params)), batch)
        want = sum(x for path, x in squares.items() if path in TRAINED) ** 0.5
        assert float(metrics["grad_norm"]) == pytest.approx(want, rel=1e-12)
        assert want < 0.9 * sum(squares.values()) ** 0.5


@pytest.mark.parametrize("recipe", ["msg", "identity", "repeat"])
def test_an_old_rate_scales_the_first_update_of_old_entries_alone(recipe):
    with jax.enable_x64(True):
        plan = planned(recipe)
        grown, added = grow(source(), plan, KEY), growth.added_slots(plan)
        _, grads, _ = gradients(grown.params, packed_batch(plan.target), plan.target)
        settings = dataclasses.replace(ADAM, clip_norm=1e9)
        updates = []
        for old_rate in (1.0, 0.3):
            stage = stage_of(plan.target, old_rate=old_rate)
            tx = optim.optimizer(stage, settings, schedules.steady, 5)
            update = jax.jit(lambda g, s, p, tx=tx: tx.update(g, s, p, added=added)[0])
            updates.append(dict(trees.flatten(update(grads, grown.opt_state, grown.params))))
        for path in TABLE:
            full, lower = (u[path] for u in updates)
            factor = np.where(old_entries(plan, path), 0.3, 1.0)
            np.testing.assert_allclose(lower, factor * full, rtol=1e-14, err_msg=path)


def test_moments_and_ages_go_on_while_an_entry_is_frozen():
    """So the optimizer's state is that of the same gradients without a freeze, bit for bit."""
    plan = planned("msg", old_rate=0.0)
    with jax.enable_x64(True):
        grown, added = grow(source(), plan, KEY), growth.added_slots(plan)
        settings = dataclasses.replace(ADAM, clip_norm=1e9)
        states = []
        for stage in (
            stage_of(plan.target),
            stage_of(plan.target, old_rate=0.0),
            stage_of(plan.target, paths=PATHS),
        ):
            tx = optim.optimizer(stage, settings, schedules.steady, 5)
            update = jax.jit(lambda g, s, p, tx=tx: tx.update(g, s, p, added=added)[1])
            state = grown.opt_state
            for seed in range(3):
                state = update(random_params(plan.target, seed), state, grown.params)
            states.append(state)
        free, *frozen = states
        for state in frozen:
            same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(),
                                free, state)  # fmt: skip
            assert jax.tree.all(same)
        moved = jax.tree.map(lambda x, y: bool((x != y).any()), free[1].mu, grown.opt_state[1].mu)
        assert jax.tree.all(moved)


# --- Copies -------------------------------------------------------------------------------------


def test_another_rate_for_old_slots_separates_copies_from_their_source():
    big = changed(SMALL, d_ff=40)
    with pytest.warns(LockedCopiesWarning):
        locked = growth.plan(SMALL, big, "tile", moments="dual")
    free = growth.plan(SMALL, big, "tile", moments="dual", old_rate=0.5)
    assert locked.locks() and not free.locks()
    with pytest.warns(LockedCopiesWarning):  # two copies of a slot are still equal
        twice = growth.plan(SMALL, changed(SMALL, d_ff=60), "tile", moments="dual", old_rate=0.5)
    assert twice.locks() == {"mlp": tuple(range(40, 60))}
    with jax.enable_x64(True):
        for plan, old_rate in ((locked, 1.0), (free, 0.5)):
            grown = grow(source(), plan, KEY)
            stage = stage_of(plan.target, old_rate=old_rate)
            steps = measure.first_steps(grown, packed_batch(plan.target), plan, stage, ADAM)
            assert (steps["locked_copies"] == 0) == (old_rate != 1)
            assert steps["dead_slots"] == 0


# --- Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GrowthConfig(old_rate=-0.1), r"old_rate is -0.1; it must be 0 or above"),
        (lambda: GrowthConfig(old_rate=1.5), r"old_rate is 1.5; it must be in \[0, 1\]"),
        (
            lambda: GrowthConfig(old_rate=float("nan")),
            r"old_rate is nan; it must be a finite float",
        ),
        (
            lambda: optim.optimizer(
                stage_of(SMALL, paths=("head", "layers/ffn")), ADAM, schedules.steady
            ),
            r"stage a: train_paths has 'layers/ffn', which matches no parameter; the model has "
            r".*layers/mlp/up",
        ),
        (
            lambda: growth.plan(SMALL, changed(SMALL, d_ff=30), "ligo", old_rate=0.0),
            r"growth.old_rate is 0.0, but axis 'mlp' grows by a dense map.*'net2net'",
        ),
        (
            lambda: train(None, stage_of(SMALL, old_rate=0.0), 1),
            r"stage a: growth.old_rate is 0.0, but without a growth all slots are old; set it to 1",
        ),
        (
            lambda: train(None, stage_of(SMALL, old_rate=0.0), 1, plan=planned("tile")),
            r"stage a: growth.old_rate is 0.0, and the added slots have sizes",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(make, message):
    with jax.enable_x64(True), pytest.raises(UserError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_a_stage_that_would_train_nothing_is_refused():
    plan = planned("identity")
    trained = functools.partial(stage_of, plan.target, paths=("head", "embedding"))
    with pytest.raises(UserError, match=r"adds no slot to embedding, head, so that nothing would"):
        Trained.of(trained(old_rate=0.0)).check(growth.added_slots(plan))
    Trained.of(trained(old_rate=0.1)).check(growth.added_slots(plan))
    Trained.of(stage_of(plan.target, old_rate=0.0)).check(growth.added_slots(plan))
