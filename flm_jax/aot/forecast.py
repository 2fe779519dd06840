"""A forecast of a training step's time, and a bound on it.

The **bound** is the least time: arithmetic, HBM and the busiest mesh axis at the chip's published
peaks, all overlapping perfectly. The **forecast** uses the shares of the peaks that programs reach
(`chips.py`) and counts what is not hidden behind computation. `flm forecast --published` compares
it with published runs (`published.py`).

What is hidden (derived here; a compiled program shows it by its own schedule):
  - Weights over fsdp are gathered, and their gradients are scattered, while other layers compute.
    What takes longer than the computation is exposed.
  - On TPUs a branch's output is scattered inside its product, piece by piece (windowed einsum). On
    GPUs it is exposed.
  - Gathers and sums of the stream over tensor are exposed: the next product needs all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flm_jax.aot import chips, work
from flm_jax.aot.chips import Chip
from flm_jax.aot.hlo import Move
from flm_jax.aot.links import Fabric, seconds_of
from flm_jax.aot.work import Step, Work
from flm_jax.config import MESH_AXES
from flm_jax.params import counts


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A step's time on each device, in seconds.

    Attributes:
      step_s: the forecast of the whole step.
      maps_s: its linear maps.
      attention_s: its attention kernels.
      traffic_s: HBM traffic beside them: norms, activations, the loss, the optimizer.
      exposed_s: communication that nothing hides.
      hidden_s: communication behind computation.
      axes_s: all communication by mesh axis, at the published peaks.
      bound_s: the least time of the step.
      bound: what sets it: "compute", "hbm" or a mesh axis.
      tokens_per_s: tokens of each device in a second, by the forecast.
      utilisation: share of the chip's peak FLOPs, by the forecast; recomputation is not counted.
      bound_utilisation: the same at the bound.
      unknown: collectives in loops whose length could not be read; they count 0 seconds.
    """

    step_s: float
    maps_s: float
    attention_s: float
    traffic_s: float
    exposed_s: float
    hidden_s: float
    axes_s: dict[str, float]
    bound_s: float
    bound: str
    tokens_per_s: float
    utilisation: float
    bound_utilisation: float
    unknown: int = 0

    def as_json(self) -> dict[str, Any]:
        """Its fields as JSON values."""
        return dataclasses.asdict(self)


def forecast(step: Step, fabric: Fabric, *, stream_hidden: float = 0.0) -> Forecast:
    """Forecasts a step from its description alone.

    Args:
      step: the step.
      fabric: where the mesh's devices are.
      stream_hidden: the share of the stream's collectives, beside windowed ones, that is hidden.
        Other systems hide some; this project hides none.
    """
    chip = fabric.chip
    parts = {
        "forward": work.forward(step),
        "backward": work.backward(step),
        "ends": work.ends(step),
        "update": work.update(step),
    }
    behind = dict.fromkeys(parts, 0.0)  # communication that can be hidden, by part
    blocking = dict.fromkeys(parts, 0.0)
    found = list(work.moves(step))
    for part, what, move in found:
        seconds = seconds_of(move, fabric) / chip.links
        windowed = chip.node == 1 and move.kind == "reduce-scatter"
        hidden = stream_hidden if what == "stream" and not windowed else 1.0
        behind[part] += hidden * seconds
        blocking[part] += (1 - hidden) * seconds
    exposed = {
        name: max(blocking[name], behind[name] - sum(_busy(parts[name], chip))) for name in parts
    }
    not_hidden = sum(exposed.values())
    rest = sum(behind.values()) + sum(blocking.values()) - not_hidden
    return _forecast(step, fabric, parts, [move for *_, move in found], not_hidden, rest)


def of_program(step: Step, fabric: Fabric, moves: Iterable[Move]) -> Forecast:
    """Forecasts a compiled step: its own collectives and schedule, the same computation.

    Args:
      step: what was compiled.
      fabric: where the mesh's devices are.
      moves: the program's collectives (`hlo.moves`).
    """
    moves = list(moves)
    parts = {
        "layers": _sum(work.forward(step), work.backward(step)),
        "rest": _sum(work.ends(step), work.update(step)),
    }
    links, busy = fabric.chip.links, sum(sum(_busy(p, fabric.chip)) for p in parts.values())
    blocking = sum(seconds_of(move, fabric) for move in moves if not move.hidden) / links
    # Different mesh axes, and both directions of a ring, run at once.
    behind = _by_axis(step.mesh, fabric, [move for move in moves if move.hidden])
    longest = max(behind.values(), default=0.0) / links
    exposed = blocking + max(0.0, longest - busy)
    return _forecast(step, fabric, parts, moves, exposed, min(longest, busy))


def _forecast(
    step: Step,
    fabric: Fabric,
    parts: dict[str, Work],
    moves: list[Move],
    exposed: float,
    hidden: float,
) -> Forecast:
    chip, total = fabric.chip, _sum(*parts.values())
    busy = [_busy(part, chip) for part in parts.values()]
    maps, attention, traffic = (sum(values) for values in zip(*busy, strict=True))
    axes_s = _by_axis(step.mesh, fabric, moves)
    bounds = {
        "compute": (total.maps + total.attention) / chip.flops,
        "hbm": (total.weights + total.traffic) / chip.hbm_bandwidth,
        **axes_s,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    seconds = maps + attention + traffic + exposed
    needed = step.tokens * counts.flops_per_token_train(step.model, step.length) / chip.flops
    return Forecast(
        step_s=seconds,
        maps_s=maps,
        attention_s=attention,
        traffic_s=traffic,
        exposed_s=exposed,
        hidden_s=hidden,
        axes_s=axes_s,
        bound_s=bounds[bound],
        bound=bound,
        tokens_per_s=step.tokens / seconds,
        utilisation=needed / seconds,
        bound_utilisation=needed / bounds[bound],
        unknown=sum(move.count is None for move in moves),
    )


def _busy(part: Work, chip: Chip) -> tuple[float, float, float]:
    """Seconds of a part's maps, attention and other traffic."""
    memory = chip.hbm_bandwidth * chips.HBM
    return (
        max(part.maps / (chip.flops * chip.matrix), part.weights / memory),
        part.attention / (chip.flops * chips.ATTENTION),
        part.traffic / memory,
    )


def _sum(*parts: Work) -> Work:
    fields = [field.name for field in dataclasses.fields(Work)]
    return Work(**{name: sum(getattr(part, name) for part in parts) for name in fields})


def _lane(move: Move) -> str:
    """Which links a collective uses: a permutation one direction of a ring, others both."""
    if move.kind != "collective-permute":
        return "ring"
    upwards = sum(target > source for source, target in move.pairs)
    return "up" if 2 * upwards > len(move.pairs) else "down"


def _by_axis(mesh: Mapping[str, int], fabric: Fabric, moves: Iterable[Move]) -> dict[str, float]:
    """Seconds of collectives by mesh axis; permutations up and down a ring run at once."""
    lanes: dict[str, dict[str, float]] = {}
    for move in moves:
        if move.bytes and len(set(move.group)) > 1:
            lane = lanes.setdefault(axis_of(mesh, move), dict.fromkeys(("ring", "up", "down"), 0.0))
            lane[_lane(move)] += seconds_of(move, fabric)
    return {axis: lane["ring"] + max(lane["up"], lane["down"]) for axis, lane in lanes.items()}


def axis_of(mesh: Mapping[str, int], move: Move) -> str:
    """The mesh axis, or axes with + between them, along which a collective's devices lie."""
    sizes = [mesh.get(axis, 1) for axis in MESH_AXES]
    places = np.array(np.unravel_index(np.array(move.group), sizes))
    along = [axis for axis, at in zip(MESH_AXES, places, strict=True) if len(np.unique(at)) > 1]
    return "+".join(along)
