"""Mesh, and the place of every array on it, from the axis table.

Axis -> mesh axis, by default (`RulesConfig`): `embed` is split over fsdp; `mlp`, `kv_heads` and
`vocab` over tensor. Always: the batch over data and fsdp; the residual stream's tokens over tensor,
between a layer's branches. Everything else is replicated.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flm_jax.config import MESH_AXES, MeshConfig, RulesConfig, TransformerConfig
from flm_jax.errors import UserError
from flm_jax.params import axes

RULES = RulesConfig()
BATCH_AXES = ("data", "fsdp")
BATCH = PartitionSpec(BATCH_AXES)


def make_mesh(config: MeshConfig, name: str = "config.mesh") -> Mesh:
    """The mesh (data, fsdp, tensor) over all devices of all processes; `name` is for errors.

    Raises UserError if the axes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    rest = config.fsdp * config.tensor
    data = config.data or devices // rest
    if data * rest != devices:
        raise UserError(
            f"{name} is data {data} x fsdp {config.fsdp} x tensor {config.tensor} = "
            f"{data * rest} devices, but there are {devices}; change it, or set data to 0"
        )
    shape = (data, config.fsdp, config.tensor)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


class Layout(NamedTuple):
    """Where a state lies."""

    mesh: Mesh
    rules: RulesConfig = RULES


def make_layout(config: MeshConfig, name: str = "config.mesh") -> Layout:
    """The mesh over all devices, and the config's rules. Raises UserError as `make_mesh`."""
    return Layout(make_mesh(config, name), config.rules)


def one_device() -> Mesh:
    """The mesh of the first device alone."""
    return jax.make_mesh(
        (1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )


def param_spec(param: axes.Param, rules: RulesConfig = RULES) -> PartitionSpec:
    return PartitionSpec(*(getattr(rules, axis, "") or None for axis in param.axes))


def check_divisible(config: TransformerConfig, mesh: Mesh, rules: RulesConfig = RULES) -> None:
    """Raises UserError if a parameter cannot be split as the rules say.

    Names parameter, axis and both numbers where an axis does not divide, and both axes where two
    share a mesh axis.
    """
    sizes = axes.axis_sizes(config)
    for path, param in axes.table(config).items():
        taken: dict[str, str] = {}
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
    """A NamedSharding for every leaf: by the table where it is shaped like a parameter.

    Parameters, their gradients and their moments are nested dicts, so the dictionary keys on the
    way to a leaf are its path in the table. Other leaves are replicated.

    Args:
      tree: arrays or `ShapeDtypeStruct`s.
      table: of the model.
      mesh: where the tree lies.
      rules: parameter axis -> mesh axis.

    Returns: a tree of the same structure.
    """

    def place(path: tuple[Any, ...], _: Any) -> NamedSharding:
        name = "/".join(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        param = table.get(name)
        return NamedSharding(mesh, param_spec(param, rules) if param else PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def constrain(x: jax.Array, *mesh_axes: str | tuple[str, ...] | None) -> jax.Array:
    """Places an activation on the mesh that is set (`jax.set_mesh`), one entry per dimension.

    Without a mesh, or where a dimension does not divide (a single token, an odd head), it leaves
    the choice to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = []
    for size, names in zip(x.shape, mesh_axes, strict=True):
        parts = math.prod(
            mesh.shape[n] for n in ((names,) if isinstance(names, str) else names or ())
        )
        spec.append(names if size % parts == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def head_axes(kv_heads: int, q_per_kv: int) -> tuple[str | None, str | None]:
    """Where key/value heads, and the queries of each, are split: over tensor, one or the other.

    Groups stay whole where they divide; else the queries of every group are split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.shape["tensor"]
    if kv_heads % parts == 0:
        return "tensor", None
    return None, "tensor" if q_per_kv % parts == 0 else None


def _of_batch(rows: int, mesh: Mesh) -> NamedSharding:
    """A batch's place: rows over data and fsdp, or whole in every device if they do not divide."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return NamedSharding(mesh, BATCH if rows % parts == 0 else PartitionSpec())


def share_of_batch(rows: int, mesh: Mesh) -> tuple[int, int]:
    """(index, count): of `count` equal parts of a batch this process's devices need only one.

    The smallest part that holds the rows of them all: half of a batch where two processes follow
    each other along data and fsdp, the whole where they lie along tensor.
    """
    places = _of_batch(rows, mesh).addressable_devices_indices_map((rows,)).values()
    spans = [index[0].indices(rows) for index in places if index is not None]
    first, last = min(s[0] for s in spans), max(s[1] for s in spans) - 1
    parts = (n for n in range(rows, 0, -1) if rows % n == 0)
    count = next(n for n in parts if first // (rows // n) == last // (rows // n))
    return first // (rows // count), count


def place_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, index: int = 0, count: int = 1
) -> dict[str, jax.Array]:
    """Puts a global batch, of which this process has part `index` of `count`, on the mesh."""

    def place(part: np.ndarray) -> jax.Array:
        rows, before = len(part) * count, len(part) * index

        def local(at: tuple[slice, ...] | None) -> np.ndarray:
            assert at is not None
            start, stop, _ = at[0].indices(rows)
            return part[start - before : stop - before]

        return jax.make_array_from_callback((rows, *part.shape[1:]), _of_batch(rows, mesh), local)

    return {name: place(part) for name, part in batch.items()}
