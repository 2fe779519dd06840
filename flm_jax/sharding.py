"""Mesh, and the place of every array on it, from the axis table.

Axis -> mesh axis: `embed` is split over fsdp; `mlp`, `kv_heads` and `vocab` over tensor; the batch
over data and fsdp; the residual stream's tokens over tensor, between a layer's branches. Everything
else is replicated.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flm_jax import axes
from flm_jax.config import MeshConfig, TransformerConfig
from flm_jax.errors import UserError

RULES = {"embed": "fsdp", "mlp": "tensor", "kv_heads": "tensor", "vocab": "tensor"}
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
    shape, names = (data, config.fsdp, config.tensor), ("data", "fsdp", "tensor")
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3)


def one_device() -> Mesh:
    """The mesh of the first device alone."""
    names = ("data", "fsdp", "tensor")
    return jax.make_mesh(
        (1, 1, 1), names, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )


def param_spec(param: axes.Param) -> PartitionSpec:
    return PartitionSpec(*(RULES.get(axis) for axis in param.axes))


def check_divisible(config: TransformerConfig, mesh: Mesh) -> None:
    """Raises UserError, naming parameter, axis and both numbers, if an axis does not divide."""
    sizes = axes.axis_sizes(config)
    for path, param in axes.TABLE.items():
        for axis in param.axes:
            parts = mesh.shape[RULES[axis]] if axis in RULES else 1
            if sizes[axis] % parts:
                raise UserError(
                    f"parameter {path!r}: axis {axis!r} of size {sizes[axis]} cannot be split "
                    f"over {parts} devices of mesh axis {RULES[axis]!r}; change one of them"
                )


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf: by the table where it is shaped like a parameter.

    Parameters, their gradients and their moments are nested dicts as in `axes.PARAMS`, so the
    dictionary keys on the way to a leaf are its name in the table; other leaves are replicated.
    """

    def place(path: tuple[Any, ...], _: Any) -> NamedSharding:
        name = "/".join(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
        param = axes.TABLE.get(name)
        return NamedSharding(mesh, param_spec(param) if param else PartitionSpec())

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
