"""LiGO: learns a growth's maps on the loss of the grown model (arXiv 2303.00980).

Every axis has two dense matrices: one for parameters that read it and one for the others (its
writers and gains); for `layers`, the second mixes layers. The source's parameters are fixed, and
W' = R W P^T along every axis, so the loss of the grown model is a function of the matrices alone.
The result is a plan like any other. LiGO itself ties a reader's matrix to the transpose of a
writer's. Here the fit starts from a pair that is exact wherever copies are, and may leave it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
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
from flm_jax.growth.expansion import DenseMap, Learned, grown_dims
from flm_jax.params import counts, draws, sharding, trees
from flm_jax.runtime.display import Progress
from flm_jax.train.train_step import summed_loss

NOISE = 0.03
Matrices = dict[str, DenseMap]  # by axis; float32, replicated


def _perturbed(matrix: np.ndarray, key: jax.Array) -> jax.Array:
    """Adds noise of 3% of each row: equal rows have equal gradients and would stay equal."""
    size = np.linalg.norm(matrix, axis=1, keepdims=True) / matrix.shape[1] ** 0.5
    noise = draws.unit_normal(key, matrix.shape, matrix.dtype)
    perturbed: jax.Array = jnp.asarray(matrix) + NOISE * size * noise
    return perturbed


def _start(plan: Plan, key: jax.Array) -> Matrices:
    """The plan's dense maps, perturbed."""
    matrices: Matrices = {}
    for n, e in enumerate(plan.expansions):
        if e.learned:
            keys = jax.random.split(jax.random.fold_in(key, n))
            reads, writes = e.learned.arrays(e.source)
            matrices[e.axis] = DenseMap(_perturbed(reads, keys[0]), _perturbed(writes, keys[1]))
    return matrices


def _with_maps(plan: Plan, matrices: Matrices) -> Plan:
    """The plan with these dense maps."""
    expansions = list(plan.expansions)
    for n, e in enumerate(expansions):
        if e.learned:
            maps = DenseMap(*(np.asarray(m) for m in matrices[e.axis]))
            expansions[n] = dataclasses.replace(e, learned=Learned.of(maps))
    return dataclasses.replace(plan, expansions=tuple(expansions))


def fit_flops(plan: Plan, tokens: int, length: int) -> int:
    """FLOPs of one step of the fit: the grown model's train step, and the maps forward and back.

    Args:
      plan: made by recipe "ligo", alone or with other operators on other axes.
      tokens: in a batch.
      length: tokens in a sequence.
    """
    model = tokens * counts.flops_per_token_train(plan.config, length)
    maps = 0
    for param in plan.table.values():
        shape = list(param.shape(plan.small.sizes))
        for dim, e, _ in grown_dims(param, plan.by_axis):
            if e.learned:
                maps += 2 * e.target * math.prod(shape)
            shape[dim] = e.target
    return model + 3 * maps


def fit(
    plan: Plan,
    params: Any,
    batches: Iterator[dict[str, np.ndarray]],
    mesh: Mesh,
    settings: GrowthConfig,
    key: jax.Array,
) -> Plan:
    """Learns the dense maps of a plan with Adam, for `settings.fit_steps` steps.

    Args:
      plan: made by recipe "ligo", alone or with other operators on other axes.
      params: parameters of `plan.source`; they do not change.
      batches: training batches; one is consumed per step.
      mesh: the devices to compute on.
      settings: gives fit_steps and fit_learning_rate.
      key: for the growth, and for the noise that the fit starts with.

    Returns:
      The plan with the learned maps.
    """
    matrices = _start(plan, key)
    tx = optax.adam(settings.fit_learning_rate)

    def loss(matrices: Matrices, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        grown = {
            path: grow_value(x, path, plan, leaf_key(key, path), dense=matrices)
            for path, x in trees.flatten(params)
        }
        total, tokens = summed_loss(trees.unflatten(grown), batch, plan.config, plan.masks(1.0))
        return total / tokens

    # Replicated: every process needs the whole maps for its plan.
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
    return _with_maps(plan, matrices)
