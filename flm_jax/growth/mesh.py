"""Grows a train state on a mesh, from one layout to another.

Parameters and moments grow one after the other, each in one program, and what has grown frees its
source. With s and b bytes of parameters before and after, at most 4s + 12b bytes of a float32 state
with two moments exist at one time (one program for all of it would hold 12s + 12b).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from flm_jax.growth import moments
from flm_jax.growth._plan import Plan
from flm_jax.growth.apply import grow
from flm_jax.params import sharding, trees
from flm_jax.params.sharding import Layout
from flm_jax.train.train_step import TrainState


def _is_tree(node: Any, plan: Plan) -> bool:
    """Whether a node of a train state is shaped like the parameters."""
    return isinstance(node, Mapping) and {p for p, _ in trees.flatten(node)} == set(plan.table)


def parts(state: TrainState, plan: Plan) -> list[TrainState]:
    """Cuts a train state into the parts that grow one after the other.

    Args:
      state: the state, or its shapes.
      plan: its growth.

    Returns:
      Train states, each with one tree that is shaped like the parameters (the parameters, or
      moments), and None for everything else; the last part has what is not shaped like them.
    """
    nodes, structure = jax.tree.flatten(state, is_leaf=lambda node: _is_tree(node, plan))
    of_node = [n if _is_tree(node, plan) else len(nodes) for n, node in enumerate(nodes)]

    def only(part: int) -> list[Any]:
        return [node if here == part else None for node, here in zip(nodes, of_node, strict=True)]

    return [jax.tree.unflatten(structure, only(part)) for part in sorted(set(of_node))]


def _joined(parts: list[TrainState], plan: Plan) -> TrainState:
    """The inverse of `parts`."""
    joined: TrainState = jax.tree.map(
        lambda *nodes: next((node for node in nodes if node is not None), None),
        *parts,
        is_leaf=lambda node: node is None or _is_tree(node, plan),
    )
    return joined


def growth_program(
    plan: Plan, before: Any, layout: Layout
) -> Callable[[TrainState, jax.Array], TrainState]:
    """Makes the jitted `(state, key) -> grown state` of a part of a train state; it is donated.

    Args:
      plan: the growth.
      before: one of `parts`, or its shapes. Its mesh may have another shape than the layout's, but
        must have the same devices in the same order.
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
    grown = []
    for part in parts(state, plan):
        with jax.set_mesh(target.mesh), warnings.catch_warnings():
            # Most leaves change their size, so they cannot be donated. They are deleted below.
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            grown.append(jax.block_until_ready(growth_program(plan, part, target)(part, key)))
        for leaf in jax.tree.leaves(part):
            leaf.delete()
    return _joined(grown, plan)
