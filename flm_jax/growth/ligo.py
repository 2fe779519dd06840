"""LiGO: learns a growth's maps on the loss of the grown model (arXiv 2303.00980).

Every axis has two dense matrices, one for parameters that read it and one for the others (its
writers and gains), `layers` one that mixes layers. The source's parameters are fixed; W' = R W P^T
along every axis, so the loss of the grown model is a function of the matrices alone. The result is
a plan like any other. LiGO ties more (a reader's matrix is the transpose of a writer's); here the
fit starts from a pair that is exact where copies are, and may leave it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flm_jax.config import GrowthConfig
from flm_jax.growth import Plan
from flm_jax.growth.apply import grow_value, leaf_key
from flm_jax.growth.expansion import Learned
from flm_jax.params import draws, sharding, trees
from flm_jax.params.axes import Role
from flm_jax.runtime.display import Progress
from flm_jax.train.train_step import summed_loss

NOISE = 0.03
Matrices = dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class _Fitting:
    """Stands for `Learned` while its matrices are being learned."""

    matrices: dict[str, jax.Array]

    def matrix(self, role: Role, source: int) -> jax.Array:
        del source
        return self.matrices["reads" if role is Role.IN else "writes"]


def _with(plan: Plan, matrices: Matrices) -> Plan:
    return dataclasses.replace(
        plan,
        expansions=tuple(
            dataclasses.replace(e, learned=_Fitting(matrices[e.axis])) if e.learned else e  # type: ignore[arg-type]
            for e in plan.expansions
        ),
    )


def _perturbed(matrix: np.ndarray, key: jax.Array) -> jax.Array:
    """Noise of 3% of each row: equal rows would have equal gradients, and stay equal."""
    size = np.linalg.norm(matrix, axis=1, keepdims=True) / matrix.shape[1] ** 0.5
    return jnp.asarray(matrix) + NOISE * size * draws.unit_normal(key, matrix.shape, matrix.dtype)


def fit(
    plan: Plan,
    params: Any,
    batches: Iterator[dict[str, np.ndarray]],
    mesh: Mesh,
    settings: GrowthConfig,
    key: jax.Array,
) -> Plan:
    """Learns the dense maps of a plan by Adam for `settings.fit_steps` steps.

    Args:
      plan: by recipe "ligo", alone or with other operators on other axes.
      params: of `plan.source`; not changed.
      batches: training batches; consumed.
      mesh: where to compute.
      settings: fit_steps, fit_learning_rate.
      key: of the growth, and of the noise that the fit starts with.

    Returns: the plan with the learned maps.
    """
    matrices: Matrices = {}
    for n, e in enumerate(plan.expansions):
        if e.learned:
            keys = jax.random.split(jax.random.fold_in(key, n))
            matrices[e.axis] = {
                "reads": _perturbed(e.learned.matrix(Role.IN, e.source), keys[0]),
                "writes": _perturbed(e.learned.matrix(Role.OUT, e.source), keys[1]),
            }
    tx = optax.adam(settings.fit_learning_rate)

    def loss(matrices: Matrices, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        fitting = _with(plan, matrices)
        grown = {
            path: grow_value(x, path, fitting, leaf_key(key, path))
            for path, x in trees.flatten(params)
        }
        total, tokens = summed_loss(trees.unflatten(grown), batch, plan.config, plan.masks(1.0))
        return total / tokens

    # In every process whole: the plan holds them.
    everywhere = NamedSharding(mesh, PartitionSpec())

    @functools.partial(jax.jit, out_shardings=everywhere)
    def step(matrices: Matrices, state: Any, params: Any, batch: dict[str, jax.Array]) -> Any:
        value, grads = jax.value_and_grad(loss)(matrices, params, batch)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(matrices, updates), state, value

    state = tx.init(matrices)
    with Progress("fitting LiGO's maps", 0, settings.fit_steps) as progress:
        for n in range(settings.fit_steps):
            batch = sharding.place_batch(next(batches), mesh)
            matrices, state, value = step(matrices, state, params, batch)
            progress.update(n + 1, float(value), (n + 1) * batch["targets"].size, None)
    return dataclasses.replace(
        plan,
        expansions=tuple(
            dataclasses.replace(e, learned=Learned.of(**jax.tree.map(np.asarray, matrices[e.axis])))
            if e.learned
            else e
            for e in plan.expansions
        ),
    )
