"""A growth on the mesh: a whole train state from one layout to another, as one program."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from flm_jax.growth._plan import Plan
from flm_jax.growth.apply import grow
from flm_jax.params import sharding
from flm_jax.params.sharding import Layout
from flm_jax.train.train_step import TrainState


def growth_program(
    plan: Plan, before: Any, layout: Layout
) -> Callable[[TrainState, jax.Array], TrainState]:
    """`(state, key) -> grown state on the layout`, jitted; leaves that keep their size are donated.

    `before` gives the state's shapes. Its mesh may have another shape than the layout's, over the
    same devices in the same order.
    """

    def onto(state: TrainState, key: jax.Array) -> TrainState:
        return grow(state, plan, key)

    shapes = jax.eval_shape(lambda state: onto(state, jax.random.key(0)), before)
    placed = sharding.shardings(shapes, plan.table, *layout)
    return jax.jit(onto, out_shardings=placed, donate_argnums=0)


def grow_on_mesh(
    state: TrainState, plan: Plan, key: jax.Array, source: Layout, target: Layout
) -> TrainState:
    """Grows a train state from layout `source` onto layout `target`; the state is consumed.

    Nothing passes through a host. Where the meshes order the same devices differently (a TPU's
    order follows its shape), shards change places first: one program has one order.
    """
    mesh, rules = source
    same_order = Mesh(
        target.mesh.devices.reshape(mesh.devices.shape), mesh.axis_names, mesh.axis_types
    )
    if same_order != mesh:
        with jax.set_mesh(same_order):
            placed = sharding.shardings(state, plan.table, same_order, rules)
            state = jax.device_put(state, placed, donate=True)
    with jax.set_mesh(target.mesh), warnings.catch_warnings():
        # Most leaves change their size; those are freed below.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        grown = growth_program(plan, state, target)(state, key)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return grown
