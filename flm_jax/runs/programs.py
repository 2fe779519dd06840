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
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flm_jax import growth
from flm_jax.config import ExperimentConfig, TransformerConfig
from flm_jax.growth import measure
from flm_jax.growth.mesh import in_order_of, parts
from flm_jax.inference import evaluation
from flm_jax.params import sharding, trees
from flm_jax.params.digest import digest_program
from flm_jax.params.sharding import Layout
from flm_jax.runs import numerics
from flm_jax.runs.stage import optimizer_of, plan_of
from flm_jax.train.train_step import TrainState, abstract_state, init_program, make_train_step

# All kinds of programs, in the order in which a run comes to them.
KINDS = (
    "init", "receipt_before", "growth", "receipt_after", "receipt_gradient", "receipt_update",
    "receipt_largest", "receipt_stuck", "restore", "train_masked", "evaluate_masked", "train",
    "evaluate", "digest",
)  # fmt: skip

_BATCH_DTYPES = {
    "tokens": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32,
    "weights": jnp.float32,
}  # fmt: skip
_MASK = jax.ShapeDtypeStruct((), jnp.float32)  # the value of the run-time masks, from the host


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a stage.

    Attributes:
      stage: the stage's name.
      name: one of `KINDS`; a growth's parts are numbered, as in "growth_1".
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
    def kind(self) -> str:
        """One of `KINDS`."""
        return self.name.rstrip("_0123456789")

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
        yield program("init", init_program(stage.model, tx, layout), (_key(mesh),))
    yield program("restore", None, (), held=state)

    length = config.data_of(index).sequence_length
    batch = _placed(stage.batch_size, length, mesh)
    masks_at = plan.masks if plan and plan.masked else None
    added = growth.added_slots(plan) if plan else None
    guarded = numerics.guarded(config.numerics)
    step = make_train_step(stage, tx, mesh, masks_at, layout.rules, added=added, guarded=guarded)
    texts = _placed(config.eval.batch_size, length, mesh)
    rest = dataclasses.replace(state, params=())  # evaluation takes the parameters alone
    if masks_at:
        yield program("train_masked", step, (state, batch, _MASK))
        masked = (state.params, texts, stage.model, masks_at, _MASK)
        yield program("evaluate_masked", evaluation.summed_nats, masked, held=rest)
    yield program("train", step, (state, batch, None))
    plain = (state.params, texts, stage.model, masks_at, None)
    yield program("evaluate", evaluation.summed_nats, plain, held=rest)
    leaves = dict(trees.flatten(state.params))
    yield program("digest", digest_program(leaves), (leaves,), held=rest)


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
    key = _key(target.mesh)
    old = parts(abstract_state(small.model, small_tx, moved), plan)
    new = parts(state, plan)
    logits = _logits(rows, length, small.model, target.mesh)
    for n, part in enumerate(old):
        grow = growth.growth_program(plan, part, target)
        held = (new[:n], old[n + 1 :], logits)
        yield program(f"growth_{n + 1}", grow, (part, key), target.mesh, held)
    yield from _receipt_programs(config, index, target.mesh, plan, state, logits)


def _receipt_programs(
    config: ExperimentConfig,
    index: int,
    mesh: Mesh,
    plan: growth.Plan,
    state: TrainState,
    logits: jax.ShapeDtypeStruct,
) -> Iterator[Program]:
    """Yields the programs of the receipt after the growth; `logits`: the parent's."""
    stage, params, moments = config.stages[index], state.params, measure.slot_adam(state)
    rows, length = stage.growth.calibration_sequences, config.data_of(index).sequence_length
    program = functools.partial(Program, stage.name, mesh=mesh)
    rest = (dataclasses.replace(state, params=()), logits)
    batch = _on_host(rows, length)
    yield program("receipt_after", measure.grown, (params, batch, plan), held=rest)
    if not plan.expansions:
        return
    with jax.set_mesh(mesh):
        zeros = {name: np.zeros(x.shape, x.dtype) for name, x in batch.items()}
        padded, accumulate = measure.in_microbatches(zeros, stage)
    batch = _on_host(len(padded["tokens"]), length)
    gradient = measure.gradient_program(plan, stage, accumulate, params)
    mask = jax.ShapeDtypeStruct((), jnp.float32, sharding=_everywhere(mesh))
    yield program("receipt_gradient", gradient, (params, batch, mask), held=rest)
    grown_at = sum(before.steps for before in config.stages[:index])
    update = measure.update_program(plan, stage, config.optimizer, grown_at, params)
    # Gradients, and directions after them, are placed like the parameters.
    yield program("receipt_update", update, (params, moments, params), held=logits)
    held = (params, moments, logits)
    yield program("receipt_largest", measure.largest_step, (plan, params), held=held)
    yield program("receipt_stuck", measure.stuck, (plan, params, params), held=logits)


def _everywhere(mesh: Mesh) -> NamedSharding:
    """Where JAX puts a small array that is made while the mesh is set."""
    return NamedSharding(mesh, PartitionSpec())


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A random key."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=_everywhere(mesh))


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
