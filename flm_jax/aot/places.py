"""Devices of a topology by their places alone, for forecasts: no compiler's package is needed.

The places are those of the compilers' own descriptions (`described.devices_of`; a test compares
the meshes). Their numbers are not: the compilers count hosts first.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from flm_jax.aot.chips import CHIPS
from flm_jax.aot.links import Fabric
from flm_jax.config import MeshConfig
from flm_jax.errors import UserError
from flm_jax.params.mesh import mesh_of
from flm_jax.params.topology import KINDS, parse


@dataclasses.dataclass(frozen=True)
class Place:
    """A device, with the attributes that builders of meshes read."""

    id: int
    platform: str
    device_kind: str
    process_index: int
    slice_index: int
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


def places(topology: str) -> list[Place]:
    """The devices of a topology.

    Args:
      topology: chips and sizes, such as v5p:8x8x8, v6e:16x16@2 or h100:16x8 (nodes x GPUs).

    Raises:
      UserError: the topology is unknown, or its sizes do not suit the chip.
    """
    named = parse(topology)
    chip, words = CHIPS[named.kind], KINDS[named.kind][0]
    wanted = chip.torus or 2
    if len(named.sizes) != wanted or 0 in named.sizes or (chip.node > 1 and named.slices > 1):
        raise UserError(
            f"topology={topology}: {named.kind} has {wanted} sizes above 0"
            + (", nodes x GPUs" if chip.node > 1 else ""),
            argument="topology",
        )
    if chip.node > 1:
        per_node = named.sizes[1]
        return [
            Place(i, "gpu", words, i // per_node, i // per_node)
            for i in range(math.prod(named.sizes))
        ]
    # The first coordinate changes fastest. Two sizes have a third coordinate, 0.
    grid = itertools.product(*(range(size) for size in reversed(named.sizes)), range(chip.cores))
    one = [((*reversed(at[:-1]), *[0] * (3 - len(at[:-1]))), at[-1]) for at in grid]
    return [
        Place(number * len(one) + i, "tpu", words, 0, number, coords, core)
        for number in range(named.slices)
        for i, (coords, core) in enumerate(one)
    ]


def fabric(topology: str, mesh: MeshConfig) -> Fabric:
    """The fabric of a mesh on a topology.

    Args:
      topology: as for `places`.
      mesh: the mesh, as a run builds it (`params.mesh.mesh_of`).

    Raises:
      UserError: as `places` and `mesh_of`.
    """
    found = mesh_of(mesh, places(topology), "mesh").devices
    return Fabric.of(CHIPS[parse(topology).kind], list(found.flat))
