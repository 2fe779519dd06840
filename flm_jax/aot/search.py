"""Searches mesh, slices, accumulation and rematerialisation, ranked by the forecast."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from flm_jax.aot import work
from flm_jax.aot.forecast import Forecast, forecast
from flm_jax.aot.places import fabric, places
from flm_jax.config import (
    ExperimentConfig,
    GrowthConfig,
    LayoutConfig,
    MeshConfig,
    RulesConfig,
    StageConfig,
    TransformerConfig,
)
from flm_jax.errors import UserError
from flm_jax.execution import REMAT_POLICIES
from flm_jax.params import axes
from flm_jax.params.topology import parse

# The compiler needed 0.95 (52B, remat dots) to 1.09 (1T, full) times the estimated memory in six
# programs on v5p, so a layout must fit with this factor.
MARGIN = 1.1
_MOST_TENSOR = 64


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layout that was forecast.

    Attributes:
      layout: the layout, as a stage takes it.
      forecast: its step.
      memory: bytes of HBM on each device, estimated.
    """

    layout: LayoutConfig
    forecast: Forecast
    memory: float


def step_of(stage: StageConfig, length: int, mesh: MeshConfig, devices: int) -> work.Step:
    """A stage's step on a mesh.

    Args:
      stage: the stage as it is computed there (`StageConfig.on`).
      length: tokens in a sequence.
      mesh: the mesh.
      devices: devices of the mesh, where its data axis takes what the others leave.
    """
    data = mesh.data or devices // (mesh.fsdp * mesh.tensor)
    sizes = {"data": data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    return work.Step(stage.model, stage.batch_size, length, sizes, stage.accumulate, mesh.rules)


def search_layouts(
    stage: StageConfig, length: int, topologies: Sequence[str], remats: Sequence[str] = ()
) -> list[Candidate]:
    """Forecasts the layouts of a stage that should fit in memory.

    For each mesh and rematerialisation it takes the fewest microbatches that fit: more of them
    gather the weights more often. Nothing is compiled: the best ones still need `flm preflight`.

    Args:
      stage: its model, and sequences of one step.
      length: tokens in a sequence.
      topologies: names; those of one chip with different numbers of slices compare slices.
      remats: policies to try; (): all.

    Returns:
      The candidates, those with the most tokens per second and device first.

    Raises:
      UserError: a topology is unknown, or no layout fits; says what misses least.
    """
    found: list[Candidate] = []
    nearest: tuple[float, str] = (math.inf, "")
    for topology in topologies:
        for mesh in meshes(stage.model, stage.batch_size, topology):
            try:
                where = fabric(topology, mesh)
            except UserError:
                continue  # this mesh cannot be laid over the topology
            for remat in remats or REMAT_POLICIES:
                model = dataclasses.replace(stage.model, remat=remat)
                rows = stage.batch_size // (len(where.node) // mesh.tensor)
                for accumulate in _divisors(rows):
                    tried = dataclasses.replace(stage, model=model, accumulate=accumulate)
                    step = step_of(tried, length, mesh, len(where.node))
                    needed = work.memory(step)
                    nearest = min(nearest, (MARGIN * needed / where.chip.hbm_bytes, topology))
                    if MARGIN * needed <= where.chip.hbm_bytes:
                        layout = LayoutConfig(topology, mesh, accumulate, remat)
                        found.append(Candidate(layout, forecast(step, where), needed))
                        break
    if not found:
        share, topology = nearest
        what = f"the least needs {share:.2f} times a device's memory on {topology}"
        raise UserError(
            f"stage {stage.name}: no layout fits {', '.join(topologies)}; "
            + (what if topology else f"no mesh divides batch_size {stage.batch_size} and the model")
            + "; give more devices, or another batch",
            argument="topology",
        )
    return sorted(found, key=lambda c: -c.forecast.tokens_per_s)


def alone(config: ExperimentConfig, index: int, layout: LayoutConfig) -> ExperimentConfig:
    """A chain of one stage with one layout, to compile the stage's step in it."""
    length = config.data_of(index).sequence_length
    stage = dataclasses.replace(
        config.stages[index], layouts=(layout,), sequence_length=length, growth=GrowthConfig()
    )
    return dataclasses.replace(config, stages=(stage,))


def meshes(model: TransformerConfig, batch: int, topology: str) -> Iterator[MeshConfig]:
    """Yields the meshes of a topology that divide a model and a batch, over all its slices."""
    devices, slices = len(places(topology)), parse(topology).slices
    sizes = axes.axis_sizes(model)
    for tensor in _divisors(devices // slices):
        rules = _rules(sizes, tensor)
        if tensor > _MOST_TENSOR or rules is None:
            continue
        for fsdp in _divisors(devices // tensor):
            data = devices // (fsdp * tensor)
            if sizes["embed"] % fsdp or batch % (data * fsdp):
                continue
            for dcn_data, dcn_fsdp in itertools.product(_divisors(slices), repeat=2):
                whole = data % dcn_data == 0 and fsdp % dcn_fsdp == 0
                if dcn_data * dcn_fsdp == slices and whole:
                    yield MeshConfig(data, fsdp, tensor, rules, dcn_data, dcn_fsdp)


def _rules(sizes: dict[str, int], tensor: int) -> RulesConfig | None:
    """Rules by which every parameter divides over `tensor` devices; None: there are none."""
    if sizes["mlp"] % tensor or sizes["vocab"] % tensor:
        return None
    if sizes["kv_heads"] % tensor == 0:
        return RulesConfig()
    if sizes["q_per_kv"] % tensor == 0:
        return RulesConfig(kv_heads="", q_per_kv="tensor")
    return None


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
