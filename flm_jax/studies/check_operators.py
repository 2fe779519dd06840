"""Holds growth recipes to their claims: exactness in three dtypes, gradients, the first steps."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax import data, growth
from flm_jax.config import OptimizerConfig, StageConfig, TransformerConfig
from flm_jax.growth import Plan, ligo, measure
from flm_jax.growth.operators import EXACT, OPERATORS, choose
from flm_jax.growth.receipt import gradient_error
from flm_jax.interop import opening
from flm_jax.params import axes, sharding, trees
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import Batch, TrainState, gradients, init_state, make_train_step

# What an EXACT recipe may differ by: logits in float64, and in float32 over their scale;
# gradients in float64 over the largest.
EXACT_F64, EXACT_F32, EXACT_GRADIENT = 1e-10, 1e-4, 1e-9
# Adam's first step is 1 learning rate; with a wrong step count it is several.
FIRST_UPDATE = 1.2

RANDOM_MODEL = TransformerConfig(
    vocab_size=61, num_layers=2, d_model=24, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=40,
    mup_base_width=16, input_mult=1.3, output_mult=0.7, matrix_init_std=0.2, vector_init_std=0.5,
    rms_norm_eps=1e-3,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to grow, mid-training, and a batch."""

    stage: StageConfig
    optimizer: OptimizerConfig
    state: TrainState
    batch: Batch


def random_source(model: TransformerConfig = RANDOM_MODEL, seed: int = 0) -> Source:
    """Random parameters, norm gains in [0.5, 1.5], after five steps on random tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.vocab_size, (4, 33))
    positions = np.broadcast_to(np.arange(32), (4, 32))
    batch = {
        "tokens": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "segment_ids": jnp.ones((4, 32), jnp.int32),
        "positions": jnp.asarray(positions, jnp.int32),
        "weights": jnp.ones((4, 32), jnp.float32),
    }
    stage = StageConfig(
        "source", model, steps=1, batch_size=4, learning_rate=1e-3, matrix_learning_rate=1e-3
    )
    settings = OptimizerConfig()
    tx = optim.optimizer(stage, settings, schedules.steady)
    state = init_state(model, tx, jax.random.key(seed))
    table = axes.table(model)
    params = {
        path: x if axes.Role.GAIN not in table[path].roles
        else jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)
        for path, x in trees.flatten(state.params)
    }  # fmt: skip
    state = dataclasses.replace(state, params=trees.unflatten(params))
    step = make_train_step(stage, tx, sharding.one_device(), None)
    for _ in range(5):
        state, _ = step(state, batch)
    return Source(stage, settings, state, batch)


def run_source(workdir: str, sequences: int = 4) -> Source:
    """The last stage of a run, and its next training sequences."""
    opened = opening.open_state(workdir)
    batches = data.open_corpus(opened.config.data).train(sequences)
    batches.set_state(opened.data)
    batch = jax.tree.map(jnp.asarray, next(batches))
    return Source(opened.config.stages[0], opened.config.optimizer, opened.state, batch)


def target_of(small: TransformerConfig, recipe: str) -> TransformerConfig:
    """A target that the recipe's operators can reach: every axis that they grow is larger.

    Widths twice as large where an operator makes whole copies, else half as large again.
    """
    chosen = choose(recipe)

    def grown(axis: str, size: int) -> int:
        if axis not in chosen:
            return size
        if axis == "layers":
            return 2 * size + 1 if chosen[axis].name not in ("stack", "interpose") else 2 * size
        half, name = math.ceil(size / 2), chosen[axis].name
        return {"tile": 2 * size, "uneven": 2 * size, "repeat": 2 * size,
                "tile_pad": 2 * size + half}.get(name, size + half)  # fmt: skip

    repeats = "kv_heads" in chosen and chosen["kv_heads"].name == "repeat"
    kv = grown("kv_heads", small.kv_heads)
    queries = small.num_heads // kv if repeats else grown("q_per_kv", small.queries_per_kv)
    big = dataclasses.replace(
        small,
        vocab_size=grown("vocab", small.vocab_size),
        num_layers=grown("layers", small.num_layers),
        d_model=grown("embed", small.d_model),
        d_ff=grown("mlp", small.d_ff),
        num_kv_heads=kv,
        num_heads=kv * queries,
    )
    return dataclasses.replace(big, rms_norm_eps=growth.norm_eps(small, big, recipe))


def check(
    name: str, recipe: str, source: Source, big: TransformerConfig | None = None, **how: Any
) -> dict[str, Any]:
    """Grows the source by a recipe and compares what was claimed with what is measured.

    Args:
      name: of the row.
      recipe: as `growth.plan` takes it.
      source: what to grow.
      big: the target; None: `target_of`.
      how: further arguments of `growth.plan`.

    Returns: a row of the table, JSON-able; `ok` is False if anything contradicts the claim.
    """
    small = source.stage.model
    big = big or target_of(small, recipe)
    distances = np.asarray(measure.source(source.state.params, source.batch, small)["distances"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", growth.LockedCopiesWarning)  # counted below
        plan = growth.plan(small, big, recipe, layer_distances=distances.tolist(), **how)
    stage = dataclasses.replace(source.stage, model=big)
    key = jax.random.key(1)
    if any(e.learned for e in plan.expansions):
        settings = dataclasses.replace(stage.growth, fit_steps=20)
        batches, mesh = _again(source.batch), sharding.one_device()
        plan = ligo.fit(plan, source.state.params, batches, mesh, settings, key)
    grown = _grow(source.state, plan, key)
    by_dtype = {
        dtype: _exactness(plan, source.state.params, grown.params, source.batch, dtype)
        for dtype in ("float32", "bfloat16")
    }
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), source.state.params)
        by_dtype["float64"] = _exactness(
            plan, params, _grow(params, plan, key), source.batch, "float64"
        )
    f64, f32 = by_dtype["float64"], by_dtype["float32"]
    steps = measure.first_steps(grown, source.batch, plan, stage, source.optimizer)
    exact = (
        f64["max_abs_logit_diff"] <= EXACT_F64
        and abs(f64["loss_after"] - f64["loss_before"]) <= EXACT_F64
        and f32["max_abs_logit_diff"] <= EXACT_F32 * f32["logit_scale"]
    )
    row = {
        "name": name,
        "recipe": recipe,
        "axes": [e.axis for e in plan.expansions],
        "claimed": plan.exactness,
        "measured": EXACT if exact else "APPROX",
        **{f"max_abs_logit_diff_{short}": by_dtype[dtype]["max_abs_logit_diff"]
           for dtype, short in (("float64", "f64"), ("float32", "f32"), ("bfloat16", "bf16"))},
        "logit_scale": f32["logit_scale"],
        "kl": f64["kl"],
        "loss_change": f64["loss_after"] - f64["loss_before"],
        "gradient_error": f64["gradient_error"],
        **steps,
    }  # fmt: skip
    noiseless = plan.exactness == EXACT and not plan.noise_db
    row["ok"] = bool(
        (exact or plan.exactness != EXACT)
        and (f64["gradient_error"] <= EXACT_GRADIENT or not noiseless)
        and steps["dead_slots"] == steps["locked_copies"] == 0
        and steps["first_update_over_lr"] <= FIRST_UPDATE
        and math.isfinite(row["loss_change"])
    )
    return row


def _again(batch: Batch) -> Iterator[dict[str, np.ndarray]]:
    while True:
        yield jax.tree.map(np.asarray, batch)


_grow = jax.jit(growth.grow, static_argnums=1)
_gradients = jax.jit(gradients, static_argnums=2)


def _exactness(plan: Plan, params: Any, grown: Any, batch: Batch, dtype: str) -> dict[str, float]:
    """Receipt fields of the function, computed in `dtype`; in float64 with the gradients'."""
    assert isinstance(plan.source, TransformerConfig)
    small, big = (dataclasses.replace(c, dtype=dtype) for c in (plan.source, plan.config))
    plan = dataclasses.replace(plan, source=small, target=big)
    found = measure.function_change(measure.source(params, batch, small), grown, batch, plan)
    if dtype == "float64":
        _, old, _ = _gradients(params, batch, small)
        _, new, _ = _gradients(grown, batch, big, plan.masks(0.0))
        found["gradient_error"] = float(gradient_error(plan, old, new))
    return found


# Rows of the table: every operator on all its axes at once, and what needs an option.
ALL: tuple[tuple[str, str, dict[str, Any]], ...] = (
    *((name, name, {}) for name in OPERATORS),
    ("net2net, hidden tiled", "net2net,embed=tile", {}),
    ("tile, dual moments, noise", "tile", {"moments": "dual", "noise_db": 10.0}),
    ("tile, carried rates", "tile", {"rates": "carry"}),
    ("zero_pad, identity", "zero_pad,identity", {}),
    ("tile_pad, uneven, identity", "tile_pad,uneven,identity", {}),
)
