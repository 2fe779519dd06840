"""The time of collectives over the links that a group of devices shares.

A TPU slice is a torus of two or three axes. Each device has two links on each axis, so a ring along
one axis sends over two links (on v5p 2 x 100 GB/s) and not over all six. Which axes of the torus a
mesh axis lies on decides how fast its collectives are. Slices, and nodes of GPUs, are connected by
a network that is slower. All rates are published peaks; `forecast.py` multiplies them by the share
that is reached.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flm_jax.aot.chips import Chip
from flm_jax.aot.hlo import Move

# TPU7x: a chip's two devices are joined six times as fast as by a link of the torus
# (docs.cloud.google.com/tpu/docs/tpu7x).
_BETWEEN_CORES = 6


@dataclasses.dataclass(frozen=True)
class Fabric:
    """Where the devices of a mesh are.

    Attributes:
      chip: the devices.
      node: [devices] the node or slice of each, in the mesh's order.
      place: [devices, axes] its coordinates on the torus; no axes for GPUs.
      size: the torus's size along each axis.
    """

    chip: Chip
    node: np.ndarray
    place: np.ndarray
    size: tuple[int, ...]

    @classmethod
    def of(cls, chip: Chip, devices: Sequence[Any]) -> Fabric:
        """That of a mesh's devices, in the mesh's order (`mesh.devices.flat`)."""
        if chip.node > 1:
            node = np.array([device.id // chip.node for device in devices])
            return cls(chip, node, np.zeros((len(devices), 0), int), ())
        node = np.array([getattr(device, "slice_index", 0) or 0 for device in devices])
        place = np.array([tuple(device.coords)[: chip.torus] for device in devices])
        return cls(chip, node, place, tuple(int(n) for n in place.max(0) + 1))


def seconds_of(move: Move, fabric: Fabric) -> float:
    """The least time of all runs of a collective, in seconds; 0 if their number is unknown.

    Between nodes, a ring passes the same bytes through every node. Each of the group's devices in
    a node sends an equal part of them through its own network card, and all of them inside the
    node or slice.

    Args:
      move: the collective.
      fabric: where the devices are.
    """
    group = np.array(move.group)
    if len(group) < 2 or not move.count or not move.bytes:
        return 0.0
    total = move.count * move.bytes
    if move.pairs and fabric.chip.node == 1:
        inside = [pair for pair in move.pairs if len(set(fabric.node[list(pair)].tolist())) == 1]
        seconds = total * _load(inside, fabric) / fabric.chip.link if inside else 0.0
        across = len(inside) < len(move.pairs)
        return max(seconds, total / fabric.chip.network) if across else seconds
    first = fabric.node[group] == fabric.node[group[0]]
    members, nodes = int(first.sum()), len(set(fabric.node[group].tolist()))
    within = 0.0
    if members > 1:
        within = total / _rate_inside(group[first], fabric)
    return max(within, total / (members * fabric.chip.network)) if nodes > 1 else within


def _rate_inside(group: np.ndarray, fabric: Fabric) -> float:
    """Bytes per second that each device of a group in one node or slice sends."""
    if fabric.chip.node > 1:
        return fabric.chip.inside
    return ring_rate(fabric.place[group], fabric)


def _load(pairs: Sequence[tuple[int, int]], fabric: Fabric) -> int:
    """The most pairs that share a link of the torus in one direction, axis after axis."""
    loads = collections.Counter[tuple[int, ...]]()
    for source, target in pairs:
        at = fabric.place[source].copy()
        for axis, size in enumerate(fabric.size):
            step = int(fabric.place[target][axis] - at[axis])
            if _wraps(size, fabric.chip) and 2 * abs(step) > size:
                step -= size if step > 0 else -size
            for _ in range(abs(step)):
                loads[fabric.node[source], *at, axis, int(np.sign(step))] += 1
                at[axis] = (at[axis] + np.sign(step)) % size
    return max(loads.values(), default=1)


def _wraps(size: int, chip: Chip) -> bool:
    return size % chip.wraps == 0


def ring_rate(place: np.ndarray, fabric: Fabric) -> float:
    """Bytes per second that each device of a group on the torus sends in a ring's collective.

    Derived here. A group that lies along a whole axis that wraps around sends over both links. On a
    part of an axis, the device at the end receives everything over one link. If the group takes
    every k-th device, k groups share the links. A group on several axes runs a ring on all of them
    at once if each one is whole, and otherwise one after the other: the slowest one first, because
    it then moves the smallest part.

    Args:
      place: [devices, axes] the coordinates of the group.
      fabric: the torus.
    """
    chip, place = fabric.chip, np.unique(place, axis=0)
    if len(place) == 1:
        return _BETWEEN_CORES * chip.link
    phases = []  # (rate, devices) by torus axis
    for axis, size in enumerate(fabric.size):
        values = np.unique(place[:, axis])
        if len(values) < 2:
            continue
        stride = int(np.gcd.reduce(np.diff(values)))
        whole = len(values) * stride == size and _wraps(size, chip)
        rate = chip.link * (2 if whole else 1) / stride
        phases.append((rate, len(values), whole and stride == 1))
    if math.prod(count for _, count, _ in phases) != len(place):
        return chip.link  # not a box: no ring that keeps to neighbours
    if all(whole for _, _, whole in phases):
        return sum(rate for rate, _, _ in phases)
    seconds, done, total = 0.0, 1, len(place)
    for rate, count, _ in sorted(phases):
        seconds += done * (count - 1) / total / rate
        done *= count
    return (total - 1) / total / seconds
