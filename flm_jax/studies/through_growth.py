"""µP through a growth: how large each role's updates are, before, during and after the ramp.

A proxy trains, grows in width by several recipes with rates "ramp", and trains on. Its updates, of
old entries and of added ones, are held against those of a model that had the target's width from
the start, at the same step.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax import growth
from flm_jax.config import GrowthConfig, StageConfig, TransformerConfig
from flm_jax.growth import Plan
from flm_jax.growth.expansion import any_slot
from flm_jax.params import axes, trees
from flm_jax.studies.config import MupStudyConfig
from flm_jax.studies.study import Study, widened

RECIPES = ("msg", "zero_pad", "tile")
KINDS = ("matrix", "vector", "readout")
LAST = 0.25  # share of the steps after the ramp that the final ratio is a mean over

Sizes = dict[str, list[float]]  # "matrix old" -> [step]


def _sizes(updates: Any, model: TransformerConfig, plan: Plan | None) -> dict[str, jax.Array]:
    """Root mean square of the updates of each kind, in old entries and in added ones."""
    total: dict[str, Any] = {}
    for path, u in trees.flatten(updates):
        param = axes.table(model)[path]
        by_axis = plan.by_axis if plan else {}
        added = any_slot(param, by_axis, lambda e, role: e.added)
        where = jnp.zeros(u.shape, bool) if added is None else jnp.broadcast_to(added, u.shape)
        for name, chosen in (("old", ~where), ("added", where)):
            key = f"{param.kind} {name}"
            squares, count = total.get(key, (0.0, 0.0))
            weight = chosen.astype(u.dtype)
            total[key] = (squares + jnp.sum(u * u * weight), count + jnp.sum(weight))
    return {key: jnp.sqrt(s / jnp.maximum(n, 1)) for key, (s, n) in total.items()}


def run(study: Study, config: MupStudyConfig, note: Callable[[str], None]) -> dict[str, Any]:
    """Returns, for every recipe, sizes of updates by role at every step from the growth on, the
    reference's, and `ratios`: their quotient after the ramp."""
    ramp, steps = config.growth_steps, 2 * config.growth_steps
    proxy, before = study.experiment.stages[0], study.experiment.stages[0].steps
    # The schedule's length is the stage's: the same for all, whenever they grow.
    proxy = dataclasses.replace(proxy, steps=before + steps)
    wide = widened(proxy.model, config.growth_factor)
    measured = jax.jit(_sizes, static_argnums=(1, 2))

    def trained(stage: StageConfig, state: Any, batches: Any, count: int, **how: Any) -> Any:
        step, sizes = study.step(stage, **how), []
        masked = how.get("plan") is not None and how["plan"].masked
        for n in range(count):
            mask = np.float32((n + 1) / ramp) if masked and n + 1 < ramp else None
            state, _, updates = step(state, next(batches), np.float32(1), mask)
            sizes.append(measured(updates, stage.model, how.get("plan")))
        return state, jax.device_get(sizes)

    note(f"reference: width {wide.d_model} from the start")
    stage = dataclasses.replace(proxy, model=wide)
    batches = study.batches(stage, 0)
    _, sizes = trained(stage, study.start(stage, 0), batches, stage.steps)
    reference = {kind: [float(s[f"{kind} old"]) for s in sizes[-steps:]] for kind in KINDS}

    note(f"source: width {proxy.model.d_model}")
    batches = study.batches(proxy, 0)
    source, _ = trained(proxy, study.start(proxy, 0), batches, before)
    place = batches.get_state()
    arms: dict[str, Any] = {}
    for recipe in RECIPES:
        note(f"{recipe}: width {proxy.model.d_model} -> {wide.d_model}")
        eps = growth.norm_eps(proxy.model, wide, recipe)
        model = dataclasses.replace(wide, rms_norm_eps=eps)
        settings = GrowthConfig(recipe=recipe, rates="ramp", ramp_steps=ramp)
        stage = dataclasses.replace(proxy, model=model, growth=settings)
        plan = growth.plan(proxy.model, model, recipe, rates="ramp")
        grow = jax.jit(functools.partial(growth.grow, plan=plan))
        batches.set_state(place)
        grown = grow(source, key=jax.random.key(0))
        _, sizes = trained(stage, grown, batches, steps, plan=plan, grown_at=before)
        by_role: Sizes = {key: [float(s[key]) for s in sizes] for key in sizes[0]}
        last = round(LAST * ramp)
        ratios = {
            f"{kind} {which}": statistics.fmean(by_role[f"{kind} {which}"][-last:])
            / statistics.fmean(reference[kind][-last:])
            for kind in KINDS
            for which in ("old", "added")
        }
        arms[recipe] = {"sizes": by_role, "ratios": ratios}
    return {"ramp_steps": ramp, "reference": reference, "arms": arms}
