"""Every program that a run executes on its devices, stage by stage, without arrays.

Each comes from the function that the runner itself calls, with arguments as `ShapeDtypeStruct`s
that have the runner's shapes, dtypes and shardings. `held` is what else lies in the devices' memory
meanwhile.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flm_jax import growth
from flm_jax.config import ExperimentConfig, TransformerConfig
from flm_jax.growth import measure
from flm_jax.growth.mesh import in_order_of
from flm_jax.inference import evaluation
from flm_jax.params import sharding
from flm_jax.params.sharding import Layout
from flm_jax.runs.stage import optimizer_of, plan_of
from flm_jax.train.train_step import TrainState, abstract_state, init_program, make_train_step

# All programs, in the order in which a run comes to them.
PROGRAMS = (
    "init", "restore", "receipt_before", "growth", "receipt_after", "train_masked", "train",
    "evaluate_masked", "evaluate",
)  # fmt: skip

_BATCH_DTYPES = {
    "tokens": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32,
    "weights": jnp.float32,
}  # fmt: skip
_MASK = jax.ShapeDtypeStruct((), jnp.float32)  # the value of the run-time masks


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a stage.

    Attributes:
      stage: the stage's name.
      name: one of `PROGRAMS`.
      function: the jitted function; None: arrays are only placed (restore).
      arguments: its arguments, without arrays.
      mesh: the mesh that is set while it is traced and runs.
      held: trees of what lies in memory beside its arguments, results and temporaries.
    """

    stage: str
    name: str
    function: Any
    arguments: tuple[Any, ...]
    mesh: Mesh
    held: Any = ()

    @property
    def held_bytes(self) -> int:
        """Bytes of `held` on the device that has most."""
        return sum(map(shard_bytes, jax.tree.leaves(self.held)))

    def lower(self) -> Any:
        """Traces and lowers it, as `jax.jit` does when the runner calls it."""
        with jax.set_mesh(self.mesh), warnings.catch_warnings():
            # A growth donates a state that is smaller than its result; see `grow_on_mesh`.
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            return self.function.lower(*self.arguments)


def shard_bytes(x: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array on one device."""
    shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return math.prod(map(int, shape)) * int(x.dtype.itemsize)


def programs(config: ExperimentConfig, index: int, layouts: list[Layout]) -> Iterator[Program]:
    """Yields the programs of one stage.

    Args:
      config: the chain as it runs on the devices; see `chain.on_devices`.
      index: the stage's index in it.
      layouts: mesh and sharding of each stage.
    """
    stage, layout = config.stages[index], layouts[index]
    mesh = layout.mesh
    tx, _ = optimizer_of(config, index)
    state = abstract_state(stage.model, tx, layout)
    program = functools.partial(Program, stage.name, mesh=mesh)
    plan = None
    if index:
        plan = plan_of(config.stages[index - 1].model, stage)
        yield from _growth_programs(config, index, layouts, plan, state)
    else:
        key = jax.eval_shape(lambda: jax.random.key(0))
        yield program("init", init_program(stage.model, tx, layout), (key,))
    yield program("restore", None, (), held=state)

    length = config.data_of(index).sequence_length
    batch = _placed(stage.batch_size, length, mesh)
    masks_at = plan.masks if plan and plan.masked else None
    added = growth.added_slots(plan) if plan else None
    step = make_train_step(stage, tx, mesh, masks_at, layout.rules, added=added)
    texts = _placed(config.eval.batch_size, length, mesh)
    rest = dataclasses.replace(state, params=())  # evaluation takes the parameters alone
    if masks_at:
        yield program("train_masked", step, (state, batch, _MASK))
        masked = (state.params, texts, stage.model, masks_at, _MASK)
        yield program("evaluate_masked", evaluation.summed_nats, masked, held=rest)
    yield program("train", step, (state, batch, None))
    plain = (state.params, texts, stage.model, masks_at, None)
    yield program("evaluate", evaluation.summed_nats, plain, held=rest)


def _growth_programs(
    config: ExperimentConfig,
    index: int,
    layouts: list[Layout],
    plan: growth.Plan,
    state: TrainState,
) -> Iterator[Program]:
    """Yields the programs of a stage's growth and its receipt; `state`: the grown one."""
    stage, small = config.stages[index], config.stages[index - 1]
    source, target = layouts[index - 1], layouts[index]
    small_tx, _ = optimizer_of(config, index - 1)
    before = abstract_state(small.model, small_tx, source)
    rows, length = stage.growth.calibration_sequences, config.data_of(index).sequence_length
    batch = _on_host(rows, length)
    program = functools.partial(Program, stage.name)

    rest = dataclasses.replace(before, params=())
    yield program(
        "receipt_before", measure.source, (before.params, batch, small.model), source.mesh, rest
    )
    moved = Layout(in_order_of(target.mesh, source.mesh), source.rules)
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (abstract_state(small.model, small_tx, moved), key)
    logits = _logits(rows, length, small.model, target.mesh)
    grow = growth.growth_program(plan, arguments[0], target)
    yield program("growth", grow, arguments, target.mesh, logits)
    rest = dataclasses.replace(state, params=())
    yield program(
        "receipt_after", measure.grown, (state.params, batch, plan), target.mesh, (rest, logits)
    )


def _placed(rows: int, length: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as `sharding.place_batch` puts it on the mesh."""
    placement = sharding.batch_sharding(rows, mesh)
    return {
        name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=placement)
        for name, dtype in _BATCH_DTYPES.items()
    }


def _on_host(rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as the receipt takes it: from the host, where every process has all of it."""
    return {
        name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in _BATCH_DTYPES.items()
    }


def _logits(rows: int, length: int, model: TransformerConfig, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The parent's logits, which the receipt holds during the growth, as the model places them."""
    shape = (rows, length, model.vocab_size)
    dtype = jnp.promote_types(model.dtype, jnp.float32)
    spec = PartitionSpec(*sharding.batch_sharding(rows, mesh).spec, None, "tensor")
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
