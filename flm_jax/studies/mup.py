"""Does µP hold? Coordinates at several sizes, a transfer sweep, and updates through a growth.

The width varies (µP against the standard parametrisation), or the depth (CompleteP against µP).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax import growth
from flm_jax.config import GrowthConfig, StageConfig, TransformerConfig
from flm_jax.data.stream import BatchStream
from flm_jax.errors import UserError
from flm_jax.growth import Plan
from flm_jax.growth.expansion import any_slot
from flm_jax.models import Transformer
from flm_jax.params import axes, trees
from flm_jax.studies.config import MupStudyConfig
from flm_jax.studies.study import Study, deepened, widened
from flm_jax.train.train_step import TrainState, make_train_step

_SIZE_FIELDS = {"width": "d_model", "depth": "num_layers"}


def _resized(model: TransformerConfig, axis: str, factor: int, parametrisation: str) -> Any:
    """The model with its width or its depth multiplied."""
    resize = widened if axis == "width" else deepened
    return resize(model, factor, parametrisation)


# The coordinate check (Tensor Programs V, arXiv 2203.03466, appendix D.1): a model is trained for a
# few steps at several widths. Measured on one batch, for every layer's attention, MLP and stream
# and for the logits: the root mean square, and that of the change since initialisation. Under µP
# the change does not depend on the width: its slope against the width, on logarithmic axes, is
# near 0. The same over depths, for CompleteP: then for the layers at the relative depths of the
# proxy's layers. Branches are measured before their multiplier.


def _activations(
    params: Any, batch: dict[str, jax.Array], config: TransformerConfig, every: int
) -> Any:
    """Activations of every `every`-th layer, and the logits."""
    logits, captured = Transformer(config).apply(
        {"params": params}, batch["tokens"], batch["segment_ids"], batch["positions"],
        capture_intermediates=True, mutable=["intermediates"],
    )  # fmt: skip
    layers = captured["intermediates"]["layers"]
    per_layer = {
        "attention": layers["attention"]["__call__"][0][0],
        "mlp": layers["mlp"]["__call__"][0],
        "stream": layers["__call__"][0][0],
    }
    found = {
        f"{name} {n}": x
        for name, xs in per_layer.items()
        for n, x in enumerate(xs[every - 1 :: every])
    }
    return {**found, "logits": logits}


def coordinates(
    study: Study, config: MupStudyConfig, parametrisation: str, factor: int, seed: int
) -> tuple[dict[str, np.ndarray], ...]:
    """Root mean squares of activations, and of their change, after 0, 1, 2, .. steps.

    Both by activation ("attention 0", "logits"), as arrays [step].
    """
    proxy = study.experiment.stages[0]
    model = _resized(proxy.model, config.axis, factor, parametrisation)
    model = dataclasses.replace(model, remat="none")
    every = model.num_layers // proxy.model.num_layers
    stage = dataclasses.replace(proxy, model=model)
    batches = study.batches(stage, seed)
    watched = jax.tree.map(jnp.asarray, next(batches))
    activations = jax.jit(_activations, static_argnums=(2, 3))
    tx, step = study.compiled(stage)
    state = study.start(stage, seed, tx)
    first = activations(state.params, watched, model, every)
    absolute: dict[str, list[float]] = {name: [] for name in first}
    change: dict[str, list[float]] = {name: [] for name in first}
    for n in range(config.coordinate_steps + 1):
        if n:
            state, _ = step(state, next(batches))
        for name, x in activations(state.params, watched, model, every).items():
            absolute[name].append(float(jnp.sqrt(jnp.mean(jnp.square(x)))))
            change[name].append(float(jnp.sqrt(jnp.mean(jnp.square(x - first[name])))))
    return tuple({k: np.array(v) for k, v in group.items()} for group in (absolute, change))


def check_coordinates(
    study: Study, config: MupStudyConfig, note: Callable[[str], None]
) -> dict[str, Any]:
    """Measures how activations, and their changes, depend on the width or the depth.

    Args:
      study: its first stage is the proxy.
      config: the axis that varies, its factors, steps and seeds.
      note: shows one line of progress.

    Returns:
      For both of `config.parametrisations`: `widths` or `depths`; `sizes` and `changes`, root mean
      squares by activation, [width][step], mean over seeds; `slopes` of the changes after the last
      step; `slope_errors`, their standard errors over seeds (None for one seed); and `max_slope`,
      the slope furthest from 0.
    """
    found: dict[str, Any] = {}
    base = getattr(study.experiment.stages[0].model, _SIZE_FIELDS[config.axis])
    at = [base * factor for factor in config.coordinate_factors]
    for parametrisation in config.parametrisations:
        # [size][seed]: root mean squares by activation, and their changes
        runs: list[list[Any]] = []
        for size, factor in zip(at, config.coordinate_factors, strict=True):
            note(f"{parametrisation}: {config.axis} {size}")
            seeds = range(config.coordinate_seeds)
            runs.append([coordinates(study, config, parametrisation, factor, s) for s in seeds])
        absolute, change = (
            [{k: np.mean([run[n][k] for run in row], axis=0) for k in row[0][n]} for row in runs]
            for n in (0, 1)
        )

        def slope(by_size: list[dict[str, np.ndarray]], name: str) -> float:
            last = np.log2([found[name][-1] for found in by_size])
            return float(np.polyfit(np.log2(at), last, 1)[0])

        slopes = {name: slope(change, name) for name in change[0]}
        by_seed = [[changes for _, changes in seed] for seed in zip(*runs, strict=True)]
        found[parametrisation] = {
            "max_slope": max(slopes.values(), key=abs),
            "slopes": slopes,
            "slope_errors": {k: standard_error([slope(c, k) for c in by_seed]) for k in slopes},
            f"{config.axis}s": at,
            "sizes": {k: [a[k].tolist() for a in absolute] for k in absolute[0]},
            "changes": {k: [c[k].tolist() for c in change] for k in change[0]},
        }
    return found


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean; None for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


# The transfer sweep: where is the best value of a hyper-parameter at each width or depth?


@dataclasses.dataclass(frozen=True)
class Point:
    """One trial: a hyper-parameter at a factor times the proxy's value, at a width or depth."""

    parametrisation: str
    hyper_parameter: str
    factor: int
    value: float
    seed: int


def sweep_points(config: MupStudyConfig) -> Iterator[Point]:
    """All trials. The parametrisation to compare with is swept in the learning rate alone."""
    tested, other = config.parametrisations
    grids = {
        "learning_rate": config.learning_rates,
        "init_std": config.init_stds,
        "input_mult": config.input_mults,
        "output_mult": config.output_mults,
    }
    for name, values in grids.items():
        for parametrisation in (tested, other) if name == "learning_rate" else (tested,):
            for factor in config.factors:
                for seed in range(config.seeds):
                    for value in values:
                        yield Point(parametrisation, name, factor, value, seed)


def _stage_of(proxy: StageConfig, point: Point, axis: str) -> tuple[StageConfig, float]:
    """The stage to train, and what its learning rates are multiplied by."""
    model = _resized(proxy.model, axis, point.factor, point.parametrisation)
    name, value = point.hyper_parameter, point.value
    if name == "init_std":
        model = dataclasses.replace(
            model,
            matrix_init_std=model.matrix_init_std * value,
            vector_init_std=model.vector_init_std * value,
        )
    elif name != "learning_rate":
        model = dataclasses.replace(model, **{name: getattr(model, name) * value})
    rate = value if name == "learning_rate" else 1.0
    return dataclasses.replace(proxy, model=model), rate


def sweep(
    study: Study, config: MupStudyConfig, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Runs the trials of the sweep that are not finished yet.

    Args:
      study: its first stage is the proxy.
      config: the axis that varies, its factors, values and seeds.
      note: shows one line of progress.

    Returns:
      A row for every trial: the fields of its `Point`, width or depth, train_loss and bpb.
    """
    proxy, all_points = study.experiment.stages[0], list(sweep_points(config))
    rows = []
    for number, point in enumerate(all_points, 1):
        stage, rate = _stage_of(proxy, point, config.axis)
        size = getattr(stage.model, _SIZE_FIELDS[config.axis])
        row = study.trial(stage, point.seed, rate)
        rows.append({**dataclasses.asdict(point), config.axis: size,
                     "train_loss": row["train_loss"], "bpb": row["bpb"]})  # fmt: skip
        shown = "diverged" if row["bpb"] is None else f"{row['bpb']:.4f} bits per byte"
        note(
            f"{number}/{len(all_points)}  {point.parametrisation}  {config.axis} {size}  "
            f"{point.hyper_parameter} x{point.value:g}  {shown}"
        )
    return rows


def summarise_sweep(rows: list[dict[str, Any]], axis: str = "width") -> dict[str, Any]:
    """Finds the best value at each width or depth, and how far it moves.

    Args:
      rows: from `sweep`.
      axis: the axis that varies, "width" or "depth".

    Returns:
      For each parametrisation and hyper-parameter: `grid`; by width (or depth) `best`, `bpb` (mean
      over seeds, one number for each value, None where a trial diverged) and `bpb_errors` (its
      standard errors, None for one seed); and `shift`, how many grid steps the best value moves.

    Raises:
      UserError: no trial of a width (or depth) finished.
    """
    found: dict[str, Any] = {}
    for parametrisation, name in dict.fromkeys(
        (row["parametrisation"], row["hyper_parameter"]) for row in rows
    ):
        mine = [r for r in rows if (r["parametrisation"], r["hyper_parameter"]) == (
            parametrisation, name)]  # fmt: skip
        grid = sorted({r["value"] for r in mine})
        best, losses = {}, {}
        errors: dict[int, list[float | None]] = {}
        for size in sorted({r[axis] for r in mine}):
            curve, errors[size] = [], []
            for value in grid:
                bpbs = [r["bpb"] for r in mine if (r[axis], r["value"]) == (size, value)]
                whole = bpbs and all(b is not None for b in bpbs)
                curve.append(statistics.fmean(bpbs) if whole else math.inf)
                errors[size].append(standard_error(bpbs) if whole else None)
            if not any(map(math.isfinite, curve)):
                raise UserError(
                    f"sweep of {name} at {axis} {size} ({parametrisation}): no trial finished "
                    "with a finite loss; lower the grid or the learning rate"
                )
            best[size] = grid[curve.index(min(curve))]
            losses[size] = [c if math.isfinite(c) else None for c in curve]
        indices = [grid.index(value) for value in best.values()]
        found.setdefault(parametrisation, {})[name] = {
            "grid": grid,
            "best": best,
            "bpb": losses,
            "bpb_errors": errors,
            "shift": max(indices) - min(indices),
        }
    return found


# Through a growth: a proxy trains, grows in width by several recipes with rates "ramp", and trains
# on. Its updates, of old entries and of added ones, are compared with those of a model that had the
# target's width from the start, at the same step.

RECIPES = ("msg", "zero_pad", "tile")
KINDS = ("matrix", "vector", "readout")
LAST = 0.25  # share of the steps after the ramp that the final ratio is a mean over

Sizes = dict[str, list[float]]  # "matrix old" -> [step]


def _sizes(updates: Any, model: TransformerConfig, plan: Plan | None) -> dict[str, jax.Array]:
    """Root mean square of the updates of each kind, in old entries and in added ones."""
    total: dict[str, Any] = {}
    table, by_axis = axes.table(model), plan.by_axis if plan else {}
    for path, u in trees.flatten(updates):
        param = table[path]
        added = any_slot(param, by_axis, lambda e, role: e.added)
        where = jnp.zeros(u.shape, bool) if added is None else jnp.broadcast_to(added, u.shape)
        for name, chosen in (("old", ~where), ("added", where)):
            key = f"{param.kind} {name}"
            squares, count = total.get(key, (0.0, 0.0))
            weight = chosen.astype(u.dtype)
            total[key] = (squares + jnp.sum(u * u * weight), count + jnp.sum(weight))
    return {key: jnp.sqrt(s / jnp.maximum(n, 1)) for key, (s, n) in total.items()}


def _train(
    study: Study,
    stage: StageConfig,
    tx: optax.GradientTransformation,
    state: TrainState,
    batches: BatchStream,
    steps: int,
    plan: Plan | None = None,
) -> tuple[TrainState, Sizes]:
    """Trains for some steps; returns the state, and the sizes of the updates at every step.

    Masks of the plan rise over the ramp of the stage's growth.
    """
    masks_at = plan.masks if plan and plan.masked else None

    def measure(updates: Any) -> dict[str, Any]:
        return {"sizes": _sizes(updates, stage.model, plan)}

    step = make_train_step(stage, tx, study.mesh, masks_at, measure=measure)
    found = []
    for n in range(1, steps + 1):
        mask = n / stage.growth.ramp_steps
        if masks_at is None or mask >= 1:
            state, metrics = step(state, next(batches))
        else:
            state, metrics = step(state, next(batches), np.float32(mask))
        found.append(metrics["sizes"])
    sizes = jax.device_get(found)
    return state, {key: [float(s[key]) for s in sizes] for key in sizes[0]}


def through_growth(
    study: Study, config: MupStudyConfig, note: Callable[[str], None]
) -> dict[str, Any]:
    """Compares the sizes of updates after a growth with those of a model that never grew.

    Args:
      study: its first stage is the proxy.
      config: by how much the width grows, and over how many steps.
      note: shows one line of progress.

    Returns:
      ramp_steps; `reference`, the never-grown model's sizes by kind; and `arms`: for every recipe
      the sizes by role at every step after the growth, and `ratios`, their means over the
      reference's after the ramp.
    """
    ramp, steps = config.growth_steps, 2 * config.growth_steps
    proxy, before = study.experiment.stages[0], study.experiment.stages[0].steps
    # The schedule's length is the stage's: the same for all, whenever they grow.
    proxy = dataclasses.replace(proxy, steps=before + steps)
    wide = widened(proxy.model, config.growth_factor)

    note(f"reference: width {wide.d_model} from the start")
    stage = dataclasses.replace(proxy, model=wide)
    tx = study.optimizer(stage)
    _, sizes = _train(
        study, stage, tx, study.start(stage, 0, tx), study.batches(stage, 0), stage.steps
    )
    reference = {kind: sizes[f"{kind} old"][-steps:] for kind in KINDS}

    note(f"source: width {proxy.model.d_model}")
    batches, tx = study.batches(proxy, 0), study.optimizer(proxy)
    source, _ = _train(study, proxy, tx, study.start(proxy, 0, tx), batches, before)
    position = batches.get_state()
    arms: dict[str, Any] = {}
    for recipe in RECIPES:
        note(f"{recipe}: width {proxy.model.d_model} -> {wide.d_model}")
        model = growth.derived(proxy.model, wide, recipe)
        settings = GrowthConfig(recipe=recipe, rates="ramp", ramp_steps=ramp)
        stage = dataclasses.replace(proxy, model=model, growth=settings)
        plan = growth.plan(proxy.model, model, recipe, rates="ramp")
        batches.set_state(position)
        grown = jax.jit(functools.partial(growth.grow, plan=plan))(source, key=jax.random.key(0))
        tx = study.optimizer(stage, grown_at=before)
        _, sizes = _train(study, stage, tx, grown, batches, steps, plan)
        last = round(LAST * ramp)
        ratios = {
            role: statistics.fmean(sizes[role][-last:]) / statistics.fmean(reference[kind][-last:])
            for kind in KINDS
            for role in (f"{kind} old", f"{kind} added")
        }
        arms[recipe] = {"sizes": sizes, "ratios": ratios}
    return {"ramp_steps": ramp, "reference": reference, "arms": arms}
