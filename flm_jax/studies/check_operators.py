"""Checks growth recipes against their claims: exactness in three dtypes, gradients, first steps."""

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
from flm_jax.config import OptimizerConfig, RopeConfig, StageConfig, TransformerConfig
from flm_jax.growth import Plan, layer_maps, ligo, measure
from flm_jax.growth.operators import EXACT, OPERATORS, choose
from flm_jax.growth.receipt import gradient_error
from flm_jax.interop import opening
from flm_jax.params import axes, sharding, trees
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import Batch, TrainState, gradients, init_state, make_train_step

# Largest differences that an EXACT recipe may make.
EXACT_F64 = 1e-10  # logits in float64
EXACT_F32 = 1e-4  # logits in float32, divided by their scale
EXACT_GRADIENT = 1e-9  # gradients in float64, divided by the largest
# Adam's first update is one learning rate; with a wrong step count it is several.
FIRST_UPDATE = 1.2

RANDOM_MODEL = TransformerConfig(
    vocab_size=61, num_layers=2, d_model=24, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=40,
    mup_base_width=16, input_mult=1.3, output_mult=0.7, matrix_init_std=0.2, vector_init_std=0.5,
    rms_norm_eps=1e-3,
)  # fmt: skip

_GEMMA = {
    "norms": "both", "tied": True, "activation": "gelu_tanh", "layer_kinds": ("sliding", "full"),
}  # fmt: skip
# What the block of each family has, with values that are not the usual ones.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope": RopeConfig("llama3", 4.0, 16), "qkv_bias": True, "out_bias": True, "mlp_bias": True,
    },
    "mistral": {"layer_kinds": ("sliding",), "window": 7},
    "qwen2": {"qkv_bias": True, "tied": True, "rope": RopeConfig("yarn", 4.0, 16)},
    "qwen3": {"qk_norm": "head", "layer_kinds": ("full", "sliding"), "window": 9},
    "olmo2": {"norms": "after", "qk_norm": "all"},
    "smollm3": {
        "layer_kinds": ("full", "full_nope"), "tied": True, "rope": RopeConfig("dynamic", 2.0, 16),
    },
    "gemma2": _GEMMA | {
        "window": 5, "attention_mult": 0.3, "attention_softcap": 3.0, "logit_softcap": 4.0,
    },
    "gemma3_text": _GEMMA | {
        "window": 6, "qk_norm": "head", "rope": RopeConfig("linear", 3.0, local_theta=50.0),
    },
    "granite": {"residual_mult": 0.3, "attention_mult": 0.2, "tied": True},
    "teleflm": {},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Source:
    """A model in the middle of its training, to grow, and a batch.

    Attributes:
      stage: the stage that trains the model.
      optimizer: its optimizer's settings.
      state: its train state.
      batch: the next training batch.
    """

    stage: StageConfig
    optimizer: OptimizerConfig
    state: TrainState
    batch: Batch


def random_source(model: TransformerConfig = RANDOM_MODEL, seed: int = 0) -> Source:
    """Makes a source from random parameters by five training steps on random tokens.

    Norm gains are drawn from [0.5, 1.5] and biases from a normal distribution, so that a recipe
    cannot rely on gains of 1 or biases of 0.
    """
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
    params = dict(trees.flatten(state.params))
    for path, x in params.items():
        if axes.Role.GAIN in table[path].roles:
            params[path] = jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)
        elif table[path].bias:
            params[path] = jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)
    state = dataclasses.replace(state, params=trees.unflatten(params))
    step = make_train_step(stage, tx, sharding.one_device(), None)
    for _ in range(5):
        state, _ = step(state, batch)
    return Source(stage, settings, state, batch)


def run_source(workdir: str, sequences: int = 4) -> Source:
    """Makes a source from the last stage of a run.

    Args:
      workdir: the run's folder.
      sequences: number of sequences in the batch.
    """
    opened = opening.open_state(workdir)
    batches = data.open_corpus(opened.config.data).train(sequences)
    batches.set_state(opened.data)
    batch = jax.tree.map(jnp.asarray, next(batches))
    return Source(opened.config.stages[0], opened.config.optimizer, opened.state, batch)


def target_of(small: TransformerConfig, recipe: str) -> TransformerConfig:
    """Returns a target that the recipe can reach: larger on every axis that the recipe grows.

    A width grows by a factor of 2 where the operator makes whole copies, by 2.5 where it also pads,
    and by 1.5 otherwise.

    Args:
      small: the source model.
      recipe: as in `growth.plan`.
    """
    chosen = choose(recipe)

    def grown(axis: str, size: int) -> int:
        if axis not in chosen:
            return size
        name, half = chosen[axis].name, math.ceil(size / 2)
        if axis == "layers":
            if name == "ranges":
                return len(layer_maps.listed(chosen[axis].argument))
            return 2 * size if name in ("stack", "interpose") else 2 * size + 1
        if name in ("tile", "uneven", "repeat"):
            return 2 * size
        if name == "tile_pad":
            return 2 * size + half
        return size + half

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
    return growth.derived(small, big, recipe)


def check(
    name: str, recipe: str, source: Source, big: TransformerConfig | None = None, **options: Any
) -> dict[str, Any]:
    """Grows the source by a recipe, and compares the recipe's claim with measurements.

    Args:
      name: the row's name.
      recipe: as in `growth.plan`.
      source: the model to grow.
      big: the target; None: `target_of`.
      **options: further arguments of `growth.plan`.

    Returns:
      A row of the table, as JSON values; `ok` is False if a measurement contradicts the claim.
    """
    small = source.stage.model
    big = big or target_of(small, recipe)
    key = jax.random.key(1)
    stage = dataclasses.replace(source.stage, model=big)
    plan = _plan(recipe, source, stage, options, key)
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
    steps = measure.first_steps(grown, source.batch, plan, stage, source.optimizer)
    return _row(name, recipe, plan, by_dtype, steps)


def _plan(
    recipe: str, source: Source, stage: StageConfig, options: dict[str, Any], key: jax.Array
) -> Plan:
    """Plans the growth of the source to the stage's model; fits the plan if it is learned."""
    small, params = source.stage.model, source.state.params
    distances = np.asarray(measure.source(params, source.batch, small)["distances"])
    with warnings.catch_warnings():
        # The row counts locked copies.
        warnings.simplefilter("ignore", growth.LockedCopiesWarning)
        plan = growth.plan(
            small, stage.model, recipe, layer_distances=distances.tolist(), **options
        )
    if any(e.learned for e in plan.expansions):
        settings = dataclasses.replace(stage.growth, fit_steps=20)
        batches, mesh = _repeated(source.batch), sharding.one_device()
        plan = ligo.fit(plan, params, batches, mesh, settings, key)
    return plan


def _row(
    name: str,
    recipe: str,
    plan: Plan,
    by_dtype: dict[str, dict[str, float]],
    steps: dict[str, Any],
) -> dict[str, Any]:
    """Builds the row of `check`, and judges the measurements."""
    f64, f32, bf16 = (by_dtype[dtype] for dtype in ("float64", "float32", "bfloat16"))
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
        "max_abs_logit_diff_f64": f64["max_abs_logit_diff"],
        "max_abs_logit_diff_f32": f32["max_abs_logit_diff"],
        "max_abs_logit_diff_bf16": bf16["max_abs_logit_diff"],
        "logit_scale": f32["logit_scale"],
        "kl": f64["kl"],
        "loss_change": f64["loss_after"] - f64["loss_before"],
        "gradient_error": f64["gradient_error"],
        **steps,
    }
    noiseless = plan.exactness == EXACT and not plan.noise_db
    row["ok"] = bool(
        (exact or plan.exactness != EXACT)
        and (f64["gradient_error"] <= EXACT_GRADIENT or not noiseless)
        and steps["dead_slots"] == steps["locked_copies"] == 0
        and steps["first_update_over_lr"] <= FIRST_UPDATE
        and math.isfinite(row["loss_change"])
    )
    return row


def _repeated(batch: Batch) -> Iterator[dict[str, np.ndarray]]:
    """Yields the same batch without end."""
    while True:
        yield jax.tree.map(np.asarray, batch)


_grow = jax.jit(growth.grow, static_argnums=1)
_gradients = jax.jit(gradients, static_argnums=2)


def _exactness(plan: Plan, params: Any, grown: Any, batch: Batch, dtype: str) -> dict[str, float]:
    """Measures how far growth changes the function, in `dtype`; in float64 also the gradients."""
    assert isinstance(plan.source, TransformerConfig)
    small, big = (dataclasses.replace(c, dtype=dtype) for c in (plan.source, plan.config))
    plan = dataclasses.replace(plan, source=small, target=big)
    change = measure.function_change(measure.source(params, batch, small), grown, batch, plan)
    if dtype == "float64":
        _, old, _ = _gradients(params, batch, small)
        _, new, _ = _gradients(grown, batch, big, plan.masks(0.0))
        change["gradient_error"] = float(gradient_error(plan, old, new))
    return change


def recipe_of(name: str, layers: int) -> str:
    """An operator as a recipe; if it takes an argument, with one that fits the model.

    >>> recipe_of("tile", 4), recipe_of("ranges", 4)
    ('tile', 'ranges(0-3,2-3)')
    """
    last = layers - 1
    return f"ranges(0-{last},{layers // 2}-{last})" if name == "ranges" else name


def rows(layers: int) -> tuple[tuple[str, str, dict[str, Any]], ...]:
    """The table's rows (name, recipe, options): every operator on all its axes, some combinations.

    Args:
      layers: number of layers of the source.
    """
    return (
        *((name, recipe_of(name, layers), {}) for name in OPERATORS),
        ("net2net, hidden tiled", "net2net,embed=tile", {}),
        ("tile, dual moments, noise", "tile", {"moments": "dual", "noise_db": 10.0}),
        ("tile, carried rates", "tile", {"rates": "carry"}),
        ("zero_pad, identity", "zero_pad,identity", {}),
        ("tile_pad, uneven, identity", "tile_pad,uneven,identity", {}),
    )
