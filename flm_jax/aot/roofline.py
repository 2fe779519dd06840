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
    """Published figures of one device.

    Attributes:
      flops: dense bfloat16 FLOPs per second.
      hbm_bytes: size of the memory, in bytes.
      hbm_bandwidth: bytes per second.
      network: bytes per second that the device sends to other nodes, in one direction.
      source: where the figures were published.
      node: devices in one node; 1: all devices communicate through `network`.
      inside: bytes per second that the device sends inside its node, in one direction.
    """

    flops: float
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
    # A chip is two devices in JAX; these are the figures of one: half of the chip's.
    "tpu7x": Chip(1153.5e12, 96 * 2**30, 3690e9, 300e9, "docs.cloud.google.com/tpu/docs/tpu7x"),
    "h100": Chip(989e12, 80e9, 3350e9, 50e9, _H100, node=8, inside=450e9),
    "h200": Chip(989e12, 141e9, 4800e9, 50e9, _H200, node=8, inside=450e9),
}


def seconds_of(move: Move, chip: Chip) -> float:
    """Returns a lower bound on the time of all runs of a collective, in seconds.

    Between nodes, a ring passes the same bytes through every node. Each of the group's devices in
    a node sends an equal part of them through its own network card, and all of them inside the
    node.

    >>> from flm_jax.aot.hlo import Move
    >>> seconds_of(Move("all-gather", count=2, bytes=300e9, group=(0, 1)), CHIPS["v4"])
    2.0
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
    """Computes lower bounds on a program's time from arithmetic, HBM and network.

    Derived here. Arithmetic: the model's FLOPs, and a third more for full rematerialisation. HBM:
    each device reads its weights in the compute dtype three times, and reads and writes its master
    weights and moments once; a growth reads its arguments and writes its results. Network: the sum
    of `seconds_of` over the collectives. The three are assumed to overlap perfectly, so the largest
    one is a bound and not a forecast.

    Args:
      stage: the stage of the program.
      what: "train", "train_masked" or "growth".
      report: the report of `compiler.compile_for` so far.
      moves: the program's collectives.
      chip: the device that runs the program.

    Returns:
      `step_s` (the bound in seconds), `bound` (its name), `seconds` (all three bounds),
      `utilisation` (share of the chip's FLOPs at the bound) and `figures` (their source).
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
