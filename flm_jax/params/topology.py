"""Topologies by name, and the name of the topology that devices form.

A name is KIND:SIZES: the chips along the axes of a TPU's torus (v5p:8x8x8), or nodes x GPUs
(h100:16x8). @SLICES follows where several slices of TPUs work together (v6e:16x16@4).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from flm_jax.config import TOPOLOGY
from flm_jax.errors import UserError

# Kind -> how JAX calls its devices (`device_kind`): the words that one of them starts with.
KINDS = {
    "v4": ("TPU v4",),
    "v5e": ("TPU v5 lite", "TPU v5e"),
    "v5p": ("TPU v5", "TPU v5p"),
    "v6e": ("TPU v6 lite", "TPU v6e"),
    "tpu7x": ("TPU7x", "TPU7"),
    "h100": ("NVIDIA H100",),
    "h200": ("NVIDIA H200",),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Accelerators and how they are connected.

    Attributes:
      kind: one of `KINDS`, or another device's platform.
      sizes: chips along each axis of the torus, or nodes and GPUs in each.
      slices: number of such tori.
    """

    kind: str
    sizes: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        shape = "x".join(map(str, self.sizes))
        return f"{self.kind}:{shape}" + (f"@{self.slices}" if self.slices > 1 else "")


def parse(text: str) -> Topology:
    """Reads a topology's name. Raises UserError if it is malformed or its kind is not in `KINDS`.

    >>> parse("v6e:16x16@4")
    Topology(kind='v6e', sizes=(16, 16), slices=4)
    """
    found = TOPOLOGY.fullmatch(text)
    if not found or found[1] not in KINDS:
        raise UserError(
            f"topology={text}: give KIND:SIZES, such as v5p:8x8x8 or h100:16x8 (nodes x GPUs), "
            f"with @SLICES for several slices; kinds: {', '.join(KINDS)}",
            argument="topology",
        )
    sizes = tuple(int(size) for size in found[2].split("x"))
    return Topology(found[1], sizes, int(found[3] or 1))


def granules(devices: Sequence[Any]) -> dict[int, list[Any]]:
    """Groups devices by what only the slower network connects: slices of TPUs, or nodes.

    JAX numbers the slices of TPUs, if there are several, and on GPUs the nodes (or what NVLink
    joins). GPUs that are only described have no such number: a process has a node's GPUs.
    """
    groups: dict[int, list[Any]] = collections.defaultdict(list)
    number = process_of if by_process(devices) else slice_of
    for device in devices:
        groups[number(device)].append(device)
    return dict(groups)


def by_process(devices: Sequence[Any]) -> bool:
    """Whether a granule of these devices is a process, and not a slice as JAX numbers them."""
    if devices[0].platform == "tpu" or len({slice_of(device) for device in devices}) > 1:
        return False
    # One node's GPUs, with a process for each, are one granule.
    alone = len({process_of(device) for device in devices}) == len(devices)
    return devices[0].platform == "cpu" or not alone


def slice_of(device: Any) -> int:
    """The number of a device's slice, or node; 0 if there are none."""
    return int(getattr(device, "slice_index", None) or 0)


def process_of(device: Any) -> int:
    return int(device.process_index)


def topology_of(devices: Sequence[Any]) -> Topology:
    """The topology that devices form, as a run finds them (`jax.devices()`).

    Args:
      devices: all devices of the run, real or described.
    """
    first, groups = devices[0], granules(devices)
    if first.platform == "tpu":
        # The chips' coordinates; two devices of one chip share them.
        coords = [device.coords for device in groups[min(groups)]]
        sizes = tuple(max(c[i] for c in coords) - min(c[i] for c in coords) + 1 for i in range(3))
        kind = _kind(first)
        # v5e and v6e are two-dimensional: JAX gives them a third coordinate, 0.
        return Topology(kind, sizes[:2] if kind in ("v5e", "v6e") else sizes, len(groups))
    if first.platform in ("gpu", "cuda"):
        return Topology(_kind(first), (len(groups), len(devices) // len(groups)))
    return Topology(first.platform, (len(devices),))


def _kind(device: Any) -> str:
    """The kind of a device: that with the longest words that its name starts with."""
    fitting = {
        words: kind
        for kind, names in KINDS.items()
        for words in names
        if device.device_kind.startswith(words)
    }
    if fitting:
        return fitting[max(fitting, key=len)]
    return "".join(c if c.isalnum() else "_" for c in device.device_kind.lower())
