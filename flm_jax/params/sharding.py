"""The sharding of every array on a mesh, from the axis table.

By default (`RulesConfig`) `embed` is split over mesh axis fsdp, and `mlp`, `kv_heads` and `vocab`
over tensor. The batch is always split over data and fsdp, and between a layer's branches the
residual stream's tokens over tensor. Everything else is replicated.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flm_jax.config import MeshConfig, RulesConfig, TransformerConfig
from flm_jax.errors import UserError
from flm_jax.params import axes
from flm_jax.params.mesh import mesh_of

RULES = RulesConfig()
BATCH_AXES = ("data", "fsdp")
BATCH = PartitionSpec(BATCH_AXES)


def make_mesh(config: MeshConfig, name: str = "config.mesh") -> Mesh:
    """Makes the mesh over all devices of all processes; see `mesh_of`."""
    return mesh_of(config, jax.devices(), name)


def one_device() -> Mesh:
    """The mesh of the first device only."""
    return mesh_of(MeshConfig(1), jax.devices()[:1])


class Layout(NamedTuple):
    """A mesh, and the rules by which a state is split over it."""

    mesh: Mesh
    rules: RulesConfig = RULES


def make_layout(config: MeshConfig, name: str = "config.mesh") -> Layout:
    """The mesh over all devices, with the config's rules; arguments and errors as `make_mesh`."""
    return Layout(make_mesh(config, name), config.rules)


def param_spec(param: axes.Param, rules: RulesConfig = RULES) -> PartitionSpec:
    """The mesh axis that each axis of a parameter is split over.

    >>> tuple(param_spec(axes.Param.of("layers:stack embed:in mlp:out")))
    (None, 'fsdp', 'tensor')
    """
    return PartitionSpec(*(getattr(rules, axis, "") or None for axis in param.axes))


def check_divisible(config: TransformerConfig, mesh: Mesh, rules: RulesConfig = RULES) -> None:
    """Checks that every parameter can be split by the rules, and the loss into its chunks.

    Raises:
      UserError: the loss's chunks do not divide over the devices; or an axis does not divide by the
        devices of its mesh axis, or two axes of one parameter share a mesh axis: names the
        parameter, the axes and the sizes.
    """
    _check_chunks(config, mesh.shape["tensor"])
    sizes = axes.axis_sizes(config)
    for path, param in axes.table(config).items():
        taken: dict[str, str] = {}  # mesh axis -> the parameter's axis that is split over it
        for axis, over in zip(param.axes, param_spec(param, rules), strict=True):
            if over is None:
                continue
            if over in taken:
                raise UserError(
                    f"parameter {path!r}: axes {taken[over]!r} and {axis!r} are both split over "
                    f"mesh axis {over!r}; change one in mesh.rules"
                )
            taken[over] = axis
            if sizes[axis] % mesh.shape[over]:
                raise UserError(
                    f"parameter {path!r}: axis {axis!r} of size {sizes[axis]} cannot be split "
                    f"over {mesh.shape[over]} devices of mesh axis {over!r}; change one of them, "
                    "or the rule (mesh.rules)"
                )


def shardings(tree: Any, table: axes.Table, mesh: Mesh, rules: RulesConfig = RULES) -> Any:
    """Gives every leaf of a tree a NamedSharding: from the table if it belongs to a parameter.

    Parameters, their gradients and their moments are nested dicts, so the dictionary keys on the
    way to a leaf are its path in the table. Other leaves are replicated.

    Args:
      tree: arrays or `ShapeDtypeStruct`s.
      table: the model's axis table.
      mesh: the devices.
      rules: the mesh axis of each parameter axis.

    Returns:
      A tree of the same structure.
    """

    def place(path: tuple[Any, ...], _: Any) -> NamedSharding:
        name = "/".join(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        param = table.get(name)
        return NamedSharding(mesh, param_spec(param, rules) if param else PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def constrain(x: jax.Array, *mesh_axes: str | tuple[str, ...] | None) -> jax.Array:
    """Constrains the sharding of an activation on the current mesh (`jax.set_mesh`).

    Does nothing without a mesh. A dimension that does not divide (a single token, an odd number of
    heads) is not split.

    Args:
      x: the activation.
      *mesh_axes: for each dimension the mesh axis, or axes, to split it over; None: not split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = []
    for size, names in zip(x.shape, mesh_axes, strict=True):
        axes_of_dim = (names,) if isinstance(names, str) else names or ()
        parts = math.prod(mesh.shape[axis] for axis in axes_of_dim)
        spec.append(names if size % parts == 0 else None)
    constrained: jax.Array = jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
    return constrained


def vocabulary_parts(config: TransformerConfig) -> int:
    """Devices of the current mesh that a chunk of the loss is split over.

    Raises:
      UserError: the vocabulary does not divide into `loss_chunks` chunks on each of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.shape["tensor"]
    _check_chunks(config, parts)
    return parts


def _check_chunks(config: TransformerConfig, parts: int) -> None:
    if config.loss_chunks and config.vocab_size % (parts * config.loss_chunks):
        raise UserError(
            f"loss_chunks is {config.loss_chunks} and vocab_size {config.vocab_size}, which does "
            f"not divide by {config.loss_chunks} chunks x {parts} devices of mesh axis 'tensor'; "
            "change one of them, or set loss_chunks to 0"
        )


def head_axes(kv_heads: int, q_per_kv: int) -> tuple[str | None, str | None]:
    """The mesh axes of key/value heads and of the query heads of each: one of them is "tensor".

    Key/value heads are split if they divide by the devices; else the queries of each are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.shape["tensor"]
    if kv_heads % parts == 0:
        return "tensor", None
    return None, "tensor" if q_per_kv % parts == 0 else None


def batch_sharding(rows: int, mesh: Mesh) -> NamedSharding:
    """Rows are split over data and fsdp, or replicated if they do not divide."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return NamedSharding(mesh, BATCH if rows % parts == 0 else PartitionSpec())


def share_of_batch(rows: int, mesh: Mesh) -> tuple[int, int]:
    """The part of a batch that this process's devices need.

    It is the smallest of equal parts that holds all their rows: half of the batch if two processes
    follow each other along data and fsdp, the whole batch if they lie along tensor.

    Args:
      rows: sequences in the global batch.
      mesh: the devices of all processes.

    Returns:
      (index, count): part `index` of `count` equal parts.
    """
    slices = batch_sharding(rows, mesh).addressable_devices_indices_map((rows,)).values()
    spans = [index[0].indices(rows) for index in slices if index is not None]
    first, last = min(s[0] for s in spans), max(s[1] for s in spans) - 1
    parts = (n for n in range(rows, 0, -1) if rows % n == 0)
    count = next(n for n in parts if first // (rows // n) == last // (rows // n))
    return first // (rows // count), count


def place_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, index: int = 0, count: int = 1
) -> dict[str, jax.Array]:
    """Puts a batch on the mesh.

    Args:
      batch: this process's part of the global batch: arrays [rows / count, ...].
      mesh: the devices of all processes.
      index: which part of the global batch it is, from `share_of_batch`.
      count: number of parts.

    Returns:
      The global batch: arrays [rows, ...].
    """

    def place(part: np.ndarray) -> jax.Array:
        rows, before = len(part) * count, len(part) * index

        def rows_at(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(rows)
            return part[start - before : stop - before]

        placement = batch_sharding(rows, mesh)
        return jax.make_array_from_callback((rows, *part.shape[1:]), placement, rows_at)

    return {name: place(part) for name, part in batch.items()}
