"""The train step against optax: three steps in float64, parameters and metrics to 1e-12.

The oracle shares the model with the library and nothing else. Its loss is the mean over the whole
batch, its gradient is `jax.grad` of that, and its optimizer is a clipped `optax.adamw` with the
learning rates and decays of three groups. Each mistake of the oracle is a negative control.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flm_jax import growth
from flm_jax.config import OptimizerConfig, StageConfig
from flm_jax.models import Transformer
from flm_jax.params import sharding
from flm_jax.train import optim
from flm_jax.train.train_step import TrainState, make_train_step
from tests.models import SMALL, changed, farthest, grow, packed_batch, random_params

STEPS, ROWS = 3, 8
SCHEDULE = (0.5, 1.0, 0.8)  # factor on the learning rate at each step
GAINS = ("norm", "final_norm")
VECTORS = ("embedding", "head")
# A clip norm below every gradient norm of these tests, and one above.
CLIPS = {"clipped": 0.05, "not clipped": 100.0}


def ragged_batch(model, seed):
    """Returns a packed batch; rows and microbatches have different numbers of targets."""
    batch = packed_batch(model, seed, batch=ROWS)
    length = batch["tokens"].shape[1]
    kept = jnp.arange(length)[None] < jnp.arange(length, length - ROWS, -1)[:, None]
    return {
        **batch,
        "segment_ids": jnp.where(kept, batch["segment_ids"], 0),
        "weights": jnp.where(kept, batch["weights"], 0),
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """The settings of one training."""

    accumulate: int = 1
    weight_decay: float = 0.1
    clip_norm: float = CLIPS["clipped"]

    @property
    def settings(self):
        # eps is as large as the gradient, because Adam would otherwise hide a wrong scale of it.
        return OptimizerConfig(eps=1e-3, weight_decay=self.weight_decay, clip_norm=self.clip_norm)

    @property
    def stage(self):
        return StageConfig(
            "a",
            SMALL,
            STEPS,
            ROWS,
            learning_rate=1e-2,
            matrix_learning_rate=3e-2,
            accumulate=self.accumulate,
        )


@functools.cache
def library_steps(case):
    """Returns (parameters, metrics) after each step of `make_train_step`."""
    factors = jnp.asarray(SCHEDULE)
    tx = optim.optimizer(case.stage, case.settings, lambda step: factors[step])
    params = random_params(SMALL, 5)
    state = TrainState(jnp.int32(0), params, tx.init(params))
    mesh = sharding.one_device()
    results = []
    with jax.set_mesh(mesh):
        step = make_train_step(case.stage, tx, mesh)
        for seed in range(STEPS):
            state, metrics = step(state, ragged_batch(SMALL, seed))
            results.append(jax.device_get((state.params, metrics)))
        assert int(state.step) == STEPS
    return results


def mean_loss(params, batch, masks=None, model=SMALL):
    """Returns a batch's loss in nats per target token."""
    logits_BTV = Transformer(model).apply(
        {"params": params}, batch["tokens"], batch["segment_ids"], batch["positions"], masks=masks
    )
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch["targets"])
    return jnp.average(nats_BT, weights=batch["weights"].astype(nats_BT.dtype))


def mean_of_microbatch_means(params, batch, parts=4):
    """A mistaken accumulation that divides by each microbatch's own number of tokens."""
    micro = [jax.tree.map(lambda x, i=i: jnp.split(x, parts)[i], batch) for i in range(parts)]
    return sum(mean_loss(params, part) for part in micro) / parts


LOSSES = {loss: jax.jit(jax.value_and_grad(loss)) for loss in (mean_loss, mean_of_microbatch_means)}


def group_of(path, leaf):
    del leaf
    name = path[-1].key
    return "gain" if name in GAINS else "vector" if name in VECTORS else "matrix"


def adamw(case, *, clip=True, decay=True, decayed_gains=False, swapped=False, mup=True, late=0):
    """Clipped AdamW in three groups. The flags are mistakes, for the negative controls."""
    width = SMALL.d_model / SMALL.mup_base_width if mup else 1.0
    wd = case.weight_decay if decay else 0.0
    vector, matrix = case.stage.learning_rate, case.stage.matrix_learning_rate
    if swapped:
        vector, matrix = matrix, vector
    factors = jnp.asarray(SCHEDULE)

    def of(peak, weight_decay):
        return optax.adamw(
            lambda count: peak * factors[count - late], 0.9, 0.95, 1e-3, weight_decay=weight_decay
        )

    groups = {
        "matrix": of(matrix / width, wd * width),
        "vector": of(vector, wd),
        "gain": of(vector, wd if decayed_gains else 0.0),
    }
    return optax.chain(
        optax.clip_by_global_norm(case.clip_norm) if clip else optax.identity(),
        optax.multi_transform(
            groups, functools.partial(jax.tree_util.tree_map_with_path, group_of)
        ),
    )


def oracle_steps(case, *, loss=mean_loss, frozen=False, **mistakes):
    """Returns (parameters, metrics) after each step of optax's AdamW; `frozen`: without updates."""
    params = random_params(SMALL, 5)
    with jax.numpy_dtype_promotion("standard"):
        tx = adamw(case, **mistakes)
        state, update = tx.init(params), jax.jit(tx.update)
        results = []
        for seed in range(STEPS):
            batch = ragged_batch(SMALL, seed)
            nats, grads = LOSSES[loss](params, batch)
            updates, state = update(grads, state, params)
            if not frozen:
                params = optax.apply_updates(params, updates)
            tokens = np.count_nonzero(batch["weights"])
            norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
            results.append((params, {"loss": nats, "grad_norm": norm, "tokens": tokens}))
    return results


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_three_steps_equal_clipped_adamw(accumulate, weight_decay, clip):
    case = Case(accumulate, weight_decay, CLIPS[clip])
    with jax.enable_x64(True):
        got, want = library_steps(case), oracle_steps(case)
        for (params, metrics), (true_params, true_metrics) in zip(got, want, strict=True):
            for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(true_params), strict=True):
                assert x.dtype == np.float64
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)
            assert metrics.keys() == true_metrics.keys()
            for name, value in true_metrics.items():
                np.testing.assert_allclose(metrics[name], value, rtol=1e-12, err_msg=name)
            assert (true_metrics["grad_norm"] > case.clip_norm) == (clip == "clipped")


@pytest.mark.parametrize(
    "mistake",
    [
        {"frozen": True},
        {"decay": False},
        {"decayed_gains": True},
        {"clip": False},
        {"swapped": True},
        {"mup": False},
        {"late": 1},
        {"loss": mean_of_microbatch_means},
    ],
    ids=lambda mistake: next(iter(mistake)),
)
def test_a_wrong_adamw_differs_after_every_step(mistake):
    """Negative controls: the comparison of the test above notices each of these mistakes."""
    case = Case(accumulate=4)
    with jax.enable_x64(True):
        got, wrong = library_steps(case), oracle_steps(case, **mistake)
        for (params, _), (wrong_params, _) in zip(got, wrong, strict=True):
            assert farthest(params, wrong_params) > 1e-6
        (_, metrics), (_, wrong_metrics) = got[-1], wrong[-1]
        assert abs(metrics["loss"] - wrong_metrics["loss"]) > 1e-9


def test_microbatches_have_different_numbers_of_targets():
    """Otherwise dividing by each microbatch's own number would not be a mistake."""
    counts = ragged_batch(SMALL, 0)["weights"].reshape(4, -1).sum(1)
    assert len(set(counts.tolist())) == 4


def test_a_masked_step_equals_a_step_of_the_masked_model():
    """The masks affect loss and gradient; without them both differ."""
    with jax.enable_x64(True):
        plan = growth.plan(SMALL, changed(SMALL, d_model=18, d_ff=32))
        case, model, value = Case(accumulate=4), plan.target, jnp.float64(0.3)
        stage = dataclasses.replace(case.stage, model=model)
        batch, mesh = ragged_batch(SMALL, 0), sharding.one_device()
        params = grow(random_params(SMALL, 5), plan, jax.random.key(1))
        tx = optax.sgd(1.0)  # the change of the parameters is the gradient
        before = jax.device_get(params)
        with jax.set_mesh(mesh):
            step = make_train_step(stage, tx, mesh, plan.masks)
            state, metrics = step(TrainState(jnp.int32(0), params, tx.init(params)), batch, value)
        moved = jax.tree.map(jnp.subtract, before, state.params)
        oracle = jax.jit(jax.value_and_grad(mean_loss), static_argnames="model")
        nats, grads = oracle(before, batch, plan.masks(value), model=model)
        assert farthest(moved, grads) < 1e-12
        np.testing.assert_allclose(metrics["loss"], nats, rtol=1e-12)
        plain, unmasked = oracle(before, batch, model=model)
        assert farthest(moved, unmasked) > 1e-3 and abs(plain - nats) > 1e-3
