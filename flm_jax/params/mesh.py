"""The one builder of meshes, for the devices of a run and for devices that are only described."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from flm_jax.config import MESH_AXES, MeshConfig
from flm_jax.errors import UserError
from flm_jax.params.topology import by_process, granules, topology_of


def mesh_of(config: MeshConfig, devices: Sequence[Any], name: str = "config.mesh") -> Mesh:
    """Makes the mesh (data, fsdp, tensor).

    On a TPU's torus, mesh axes follow physical axes; a physical axis is split where needed. With
    several slices or nodes (`MeshConfig.dcn_data`, `dcn_fsdp`), a mesh inside each is repeated
    over them, so that the other axes never leave one.

    Args:
      config: the number of devices along each mesh axis.
      devices: real or described devices, in the order of `jax.devices()`.
      name: the name of `config` in error messages.

    Raises:
      UserError: the axes do not multiply to the number of devices, do not fit their slices, or
        cannot be laid over the torus; names the axes, the devices, and meshes that would work.
    """
    count, rest = len(devices), config.fsdp * config.tensor
    data = config.data or count // rest
    where = f"{name} is {_written(dataclasses.replace(config, data=data))}"
    if data == 0:
        raise UserError(
            f"{name} is fsdp {config.fsdp} x tensor {config.tensor}, which needs {rest} devices or "
            f"more, but there are {count}; make them smaller{_suggestion(config, devices)}"
        )
    if data * rest != count:
        raise UserError(
            f"{where} = {data * rest} devices, but there are {count}; change it, or set data to 0"
            f"{_suggestion(config, devices)}"
        )
    found = len(granules(devices))
    apart = devices[0].platform == "tpu" or config.slices > 1  # GPUs are in the nodes' order
    if (apart and config.slices != found) or data % config.dcn_data:
        raise UserError(
            f"{where}, over {config.slices} slices or nodes, but the {count} devices are in "
            f"{found}; change dcn_data or dcn_fsdp{_suggestion(config, devices)}"
        )
    try:
        grid = _grid(dataclasses.replace(config, data=data), devices)
    except (NotImplementedError, TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"{where}, which cannot be laid over {topology_of(devices)}"
            f"{_suggestion(config, devices)} ({type(error).__name__} of jax's mesh_utils)"
        ) from error
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _grid(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """The devices in the mesh's shape; raises what `mesh_utils` raises."""
    shape = (config.data, config.fsdp, config.tensor)
    if config.slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across = (config.dcn_data, config.dcn_fsdp, 1)
    inside = tuple(size // parts for size, parts in zip(shape, across, strict=True))
    return mesh_utils.create_hybrid_device_mesh(
        inside,
        across,
        devices,
        process_is_granule=by_process(devices),
        allow_split_physical_axes=True,
    )


def _suggestion(config: MeshConfig, devices: Sequence[Any], most: int = 3) -> str:
    """Names a few meshes that these devices do form, nearest to what was asked for."""
    works = [_written(mesh) for mesh in itertools.islice(_working(config, devices), most)]
    return f"; these work: {'; '.join(works)}" if works else ""


def _working(config: MeshConfig, devices: Sequence[Any]) -> Iterator[MeshConfig]:
    """Yields the meshes of these devices, those with a similar tensor and fsdp first."""
    slices = len(granules(devices)) if devices[0].platform == "tpu" else 1
    inside = len(devices) // slices

    def far(mesh: MeshConfig) -> float:
        pairs = ((mesh.tensor, config.tensor), (mesh.fsdp, config.fsdp))
        return sum(abs(math.log(have / want)) for have, want in pairs)

    meshes = (
        MeshConfig(inside // (fsdp * tensor) * slices, fsdp, tensor, dcn_data=slices)
        for fsdp, tensor in itertools.product(_divisors(inside), repeat=2)
        if inside % (fsdp * tensor) == 0
    )
    for mesh in itertools.islice(sorted(meshes, key=far), 24):
        try:
            _grid(mesh, devices)
        except (NotImplementedError, TypeError, ValueError, AssertionError):
            continue
        yield mesh


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _written(mesh: MeshConfig) -> str:
    """A mesh in words, as "data 1 x fsdp 32 x tensor 16"."""
    text = f"data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}"
    dcn = [f"dcn_{axis} {n}" for axis, n in (("data", mesh.dcn_data), ("fsdp", mesh.dcn_fsdp))
           if n > 1]  # fmt: skip
    return f"{text} ({', '.join(dcn)})" if dcn else text
