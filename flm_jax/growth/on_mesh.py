"""A growth on the mesh: a whole train state from one layout to another, as one program."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from flm_jax import sharding
from flm_jax.growth.apply import grow
from flm_jax.growth.plan import Plan
from flm_jax.state import TrainState


def growth_program(
    plan: Plan, before: Any, mesh: Mesh
) -> Callable[[TrainState, jax.Array], TrainState]:
    """`(state, key) -> grown state on mesh`, jitted; leaves that keep their size are donated.

    `before` gives the state's shapes. Its mesh may have another shape than `mesh`, over the same
    devices in the same order.
    """

    def onto(state: TrainState, key: jax.Array) -> TrainState:
        return grow(state, plan, key)

    shapes = jax.eval_shape(lambda state: onto(state, jax.random.key(0)), before)
    placed = sharding.shardings(shapes, mesh)
    return jax.jit(onto, out_shardings=placed, donate_argnums=0)


def grow_on_mesh(
    state: TrainState, plan: Plan, key: jax.Array, source: Mesh, target: Mesh
) -> TrainState:
    """Grows a train state from its mesh `source` onto the mesh `target`; the state is consumed.

    Nothing passes through a host. Where the meshes order the same devices differently (a TPU's
    order follows its shape), shards change places first: one program has one order.
    """
    same_order = Mesh(
        target.devices.reshape(source.devices.shape), source.axis_names, source.axis_types
    )
    if same_order != source:
        with jax.set_mesh(same_order):
            state = jax.device_put(state, sharding.shardings(state, same_order), donate=True)
    with jax.set_mesh(target), warnings.catch_warnings():
        # Most leaves change their size; those are freed below.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        grown = growth_program(plan, state, target)(state, key)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return grown
