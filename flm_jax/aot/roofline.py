"""A lower bound on a program's time on a chip, from the chip's published figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from flm_jax.aot.hlo import Move
from flm_jax.config import StageConfig
from flm_jax.params import counts


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one device, per second; networks are per device, one direction.

    The `node` devices of one node communicate through `inside`, devices of different nodes through
    `network`. `node` 1: all devices communicate through `network`.
    """

    flops: float  # bfloat16, dense
    hbm_bytes: float
    hbm_bandwidth: float
    network: float
    source: str
    node: int = 1
    inside: float = 0.0


_H100 = "NVIDIA H100 SXM data sheet; NVLink inside 8 GPUs, one 400 Gb/s card for each beyond"
_H200 = "NVIDIA H200 SXM data sheet; NVLink inside 8 GPUs, one 400 Gb/s card for each beyond"
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9, "cloud.google.com/tpu/docs/v4"),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, "cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, "cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 448e9, "cloud.google.com/tpu/docs/v6e"),
    "h100": Chip(989e12, 80e9, 3350e9, 50e9, _H100, node=8, inside=450e9),
    "h200": Chip(989e12, 141e9, 4800e9, 50e9, _H200, node=8, inside=450e9),
}


def seconds_of(move: Move, chip: Chip) -> float:
    """Returns the least time of all runs of a collective, in seconds.

    Between nodes, a ring passes the same bytes through every node; each of the group's devices in a
    node carries an equal part of them through its own card, and all of them inside.
    """
    sent = move.count * move.bytes
    if chip.node == 1:
        return sent / chip.network
    nodes = len({device // chip.node for device in move.group})
    in_node = len(move.group) / nodes
    inside = sent / chip.inside if in_node > 1 else 0.0
    return max(inside, sent / (in_node * chip.network)) if nodes > 1 else inside


def roofline(
    stage: StageConfig, what: str, report: dict[str, Any], moves: Iterable[Move], chip: Chip
) -> dict[str, Any]:
    """Bounds a program's time by arithmetic, HBM and network, each alone.

    Arithmetic: model FLOPs, and a third more for full rematerialisation. HBM: each device's weights
    in the compute dtype three times, master weights and moments read and written once; a growth
    reads its arguments and writes its results. Network: `seconds_of` each collective. Perfect
    overlap is assumed, so this is a bound, not a forecast.
    """
    params = counts.params(stage.model)
    recompute = 4 / 3 if stage.model.remat == "full" else 1.0
    width = 2 if stage.model.dtype == "bfloat16" else 4
    if what == "growth":
        moved = 2 * report["argument_bytes"] + 2 * 12 * params / report["devices"]
    else:
        moved = 3 * width * params / report["mesh"]["tensor"] + 24 * params / report["devices"]
    seconds = {
        "compute": recompute * report["model_flops_per_device"] / chip.flops,
        "hbm": moved / chip.hbm_bandwidth,
        "interconnect": sum(seconds_of(move, chip) for move in moves),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    step = seconds[bound]
    return {
        "step_s": step,
        "bound": bound,
        "utilisation": report["model_flops_per_device"] / chip.flops / step if step else 0.0,
        "seconds": seconds,
        "figures": chip.source,
    }
