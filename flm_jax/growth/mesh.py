"""Grows a train state on a mesh, from one layout to another, in one program."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from flm_jax.growth import moments
from flm_jax.growth._plan import Plan
from flm_jax.growth.apply import grow
from flm_jax.params import sharding
from flm_jax.params.sharding import Layout
from flm_jax.train.train_step import TrainState


def growth_program(
    plan: Plan, before: Any, layout: Layout
) -> Callable[[TrainState, jax.Array], TrainState]:
    """Makes the jitted `(state, key) -> grown state`. The state is donated.

    Args:
      plan: the growth.
      before: the state, or its shapes. Its mesh may have another shape than the layout's, but must
        have the same devices in the same order.
      layout: the layout of the result.
    """

    def grown(state: TrainState, key: jax.Array) -> TrainState:
        return grow(state, plan, key)

    shapes = jax.eval_shape(lambda state: grown(state, jax.random.key(0)), before)
    placed = sharding.shardings(shapes, plan.table, *layout)
    return jax.jit(grown, out_shardings=placed, donate_argnums=0)


def in_order_of(target: Mesh, mesh: Mesh) -> Mesh:
    """A mesh of the shape of `mesh`, with the devices in the order of `target`."""
    devices = target.devices.reshape(mesh.devices.shape)
    return Mesh(devices, mesh.axis_names, mesh.axis_types)


def grow_on_mesh(
    state: TrainState, plan: Plan, key: jax.Array, source: Layout, target: Layout
) -> TrainState:
    """Grows a train state from one layout to another; nothing passes through a host.

    One program has one order of devices. If the meshes order the same devices differently (on TPUs
    the order follows the mesh's shape), shards are first moved to the target's order.

    Args:
      state: the state; it is deleted.
      plan: the growth.
      key: for fresh entries and noise, as in `grow`.
      source: the layout of the state.
      target: the layout of the result.

    Returns:
      The grown state.
    """
    moments.check(state, plan)
    mesh, rules = source
    same_order = in_order_of(target.mesh, mesh)
    if same_order != mesh:
        with jax.set_mesh(same_order):
            placed = sharding.shardings(state, plan.table, same_order, rules)
            state = jax.device_put(state, placed, donate=True)
    with jax.set_mesh(target.mesh), warnings.catch_warnings():
        # Most leaves change their size, so they cannot be donated. They are deleted below.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        grown = growth_program(plan, state, target)(state, key)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return grown
