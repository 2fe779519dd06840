"""Growth from disk to disk: the maps of `apply.py`, window by window, in bounded memory.

The target's leaves are cut into consecutive pieces. A piece depends only on the sources of its
slots: these are read, mapped as a window of the leaf, and written. Fresh entries depend only on
their index, so the result is bit-identical to `growth.grow` under `jax.jit`. Pieces that are
already written are kept: after an interruption, a second call writes the missing ones.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from flm_jax.errors import UserError
from flm_jax.growth._plan import Plan
from flm_jax.growth.apply import grow_value, leaf_key, looks_ahead, next_layer
from flm_jax.growth.expansion import NEW
from flm_jax.growth.moments import check as check_state
from flm_jax.growth.moments import grow_moment, grow_slots
from flm_jax.params.axes import Table
from flm_jax.runtime import processes
from flm_jax.store.checkpoint import by_name
from flm_jax.store.chunked import chunk_shape
from flm_jax.store.earlier import upgraded
from flm_jax.train.optim import SlotAdamState
from flm_jax.train.train_step import TrainState

WORKERS = 3  # pieces in progress at once: one is read, one computed, one written
# The memory of a worker, in pieces, is at most this: the input, XLA's copy of it, the gathered
# sources, the result, and tensorstore's buffers for reading and writing.
_COPIES = 6
HELD = WORKERS * _COPIES  # pieces in memory at once
_BATCHES = 8  # a batch of grown pieces, which become one file, takes this part of the memory
_LARGEST = 32 << 20  # bytes of a piece; larger pieces are not faster


class Chunked(Protocol):
    """Leaves that are stored in pieces; `chunk` is the smallest that can be read alone."""

    def chunk(self, name: str) -> tuple[int, ...]: ...


class Source(Chunked, Protocol):
    """The checkpoint to grow: `store.chunked.CheckpointReader`."""

    leaves: dict[str, jax.ShapeDtypeStruct]

    def read(self, name: str, slices: Sequence[slice | np.ndarray] | None = None) -> np.ndarray: ...


class Target(Protocol):
    """The checkpoint to write: `store.chunk_writer.CheckpointWriter`."""

    def pieces(self, name: str) -> Iterator[tuple[slice, ...]]: ...
    def holds(self, name: str, piece: Sequence[slice]) -> bool: ...
    def write(self, name: str, slices: Sequence[slice] | None, values: np.ndarray) -> None: ...


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf shaped like a parameter: the parameter (power 0), or its first or second moment."""

    name: str
    path: str
    power: int


def parameter_leaves(names: Iterable[str], table: Table) -> list[Leaf]:
    """Returns the leaves among `names` that are shaped like parameters."""
    leaves = []
    for name in names:
        for power, part in enumerate(("params/", "/mu/", "/nu/")):
            _, _, path = name.partition(part)
            if path in table:
                leaves.append(Leaf(name, path, power))
    return leaves


def check(plan: Plan) -> None:
    """Checks that a plan can be applied piece by piece.

    Raises:
      UserError: it cannot; names what needs whole leaves.
    """
    whole = [
        f"axis {e.axis!r} by {e.operator!r}, a dense map," for e in plan.expansions if e.learned
    ]
    whole += [
        f"axis {e.axis!r} by {e.operator!r}, with the mean of its old slots,"
        for e in plan.expansions
        if e.fill == "mean"
    ]
    if plan.noise_db:
        whole.append(f"noise_db {plan.noise_db}, relative to the level of a leaf,")
    if whole:
        raise UserError(
            f"growth from disk to disk works on slices, but {' and '.join(whole)} needs whole "
            "leaves; grow in memory (flm train), or use another recipe"
        )


def chunks(
    plan: Plan, names: Mapping[str, jax.ShapeDtypeStruct], source: Chunked, memory: int
) -> dict[str, tuple[int, ...]]:
    """Chooses the pieces of the target's large leaves, so that the work fits into memory.

    Args:
      plan: the growth.
      names: the target's leaves by name.
      source: the checkpoint to grow.
      memory: bytes.

    Returns:
      The shape of a piece, for each large leaf by name.

    Raises:
      UserError: the memory is too small for a leaf.
    """
    limit = min(for_pieces(memory) // HELD, _LARGEST)
    shapes = {}
    for leaf in parameter_leaves(names, plan.table):
        itemsize = names[leaf.name].dtype.itemsize
        # Heads that are divided among copies stay together.
        divided = {axis for e in plan.expansions if e.splits for axis in (e.axis, e.splits)}
        whole = [d for d, axis in enumerate(plan.table[leaf.path].axes) if axis in divided]
        chunk = chunk_shape(plan.big.shape(leaf.path), itemsize, limit, whole)
        shapes[leaf.name] = chunk
        largest = max(math.prod(c) * itemsize for c in (chunk, source.chunk(leaf.name)))
        if largest * HELD > max(for_pieces(memory), limit * HELD):
            raise UserError(
                f"memory is {memory:,} bytes, but {leaf.name} comes in pieces of {largest:,} bytes "
                f"and {HELD} of them are held beside two batches; give "
                f"memory={math.ceil(largest * HELD * _BATCHES / (_BATCHES - 4))}",
                argument="memory",
            )
    return shapes


def batch_bytes(memory: int) -> int:
    """Returns the size of a batch of grown pieces, which are written as one file."""
    return max(memory // _BATCHES, 1)


def for_pieces(memory: int) -> int:
    """Returns what is left beside two batches, one of them held twice while it is written."""
    return memory - 4 * batch_bytes(memory)


def grow(
    source: Source,
    target: Target,
    names: TrainState,
    plan: Plan,
    key: jax.Array,
    report: Callable[[int], None] = lambda done: None,
) -> int:
    """Grows a train state from one checkpoint into another.

    With several processes each grows its share of the pieces, of equal size but for one piece.

    Args:
      source: a checkpoint of `plan.source`.
      target: a checkpoint of `plan.target`, in pieces from `chunks`; pieces that it already holds
        are skipped.
      names: the train state's tree, with the names of leaves in their place.
      plan: a plan that passes `check`.
      key: as in `growth.grow`; the result is bit-identical to its result.
      report: called with the number of bytes after each write.

    Returns:
      The number of bytes that this process wrote.

    Raises:
      UserError: `check` refuses the plan, or writing fails; pieces that are written stay.
    """
    check(plan)
    large = parameter_leaves(jax.tree.leaves(names), plan.table)
    missing = [
        (leaf, piece)
        for leaf in large
        for piece in target.pieces(leaf.name)
        if not target.holds(leaf.name, piece)
    ]
    written = 0
    if processes.first():
        written = _grow_small(source, target, names, {leaf.name for leaf in large}, plan)
        report(written)
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        work = functools.partial(_grow_piece, source, target, plan, key, _Programs(plan))
        futures = [pool.submit(work, *item) for item in processes.share(missing)]
        try:
            for future in concurrent.futures.as_completed(futures):
                report(future.result())
                written += future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return written


class _Programs:
    """Compiled maps: one for each kind of leaf and size of a piece, for all positions of it."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._lock = threading.Lock()
        self._compiled: dict[Any, Callable[..., jax.Array]] = {}

    def of(self, leaf: Leaf, sizes: tuple[int | None, ...]) -> Callable[..., jax.Array]:
        """The map `f(x, following, key, starts)` of a leaf's pieces.

        `sizes`: the piece's size along each dimension; None: the whole dimension.
        """
        plan, path = self._plan, leaf.path
        kind = (plan.table[path], plan.small.scale(path), plan.big.scale(path), leaf.power, sizes)
        with self._lock:
            if kind not in self._compiled:
                program = functools.partial(_map, plan, path, leaf.power, sizes)
                self._compiled[kind] = jax.jit(program)
            return self._compiled[kind]


def _map(
    plan: Plan,
    path: str,
    power: int,
    sizes: tuple[int | None, ...],
    x: jax.Array,
    following: jax.Array | None,
    key: jax.Array,
    starts: jax.Array,
) -> jax.Array:
    """Maps the piece of a leaf that starts at `starts`."""
    window = [None if n is None else (starts[d], n) for d, n in enumerate(sizes)]
    if power:
        return grow_moment(x, path, plan, power, window)
    return grow_value(x, path, plan, key, window, following)


def _grow_piece(
    source: Source,
    target: Target,
    plan: Plan,
    key: jax.Array,
    programs: _Programs,
    leaf: Leaf,
    piece: tuple[slice, ...],
) -> int:
    """Reads, maps and writes one piece; returns the number of bytes written."""
    param = plan.table[leaf.path]
    cut = [s != slice(0, n) for s, n in zip(piece, plan.big.shape(leaf.path), strict=True)]
    slots = [
        _sources(plan, axis, s) if c else None
        for axis, s, c in zip(param.axes, piece, cut, strict=True)
    ]
    x = _read(source, plan, leaf, slots)
    following = None
    if not leaf.power and looks_ahead(param, plan) and slots[0] is not None:
        next_layers = next_layer(slots[0], plan.small.sizes["layers"])
        following = _read(source, plan, leaf, [next_layers, *slots[1:]])
    sizes = tuple(s.stop - s.start if c else None for s, c in zip(piece, cut, strict=True))
    starts = np.array([s.start for s in piece], np.int32)
    program = programs.of(leaf, sizes)
    grown = np.asarray(program(x, following, leaf_key(key, leaf.path), starts))
    target.write(leaf.name, piece, grown)
    return grown.nbytes


def _sources(plan: Plan, axis: str, slots: slice) -> np.ndarray:
    """The source of each of these slots of an axis; `NEW` if it has none."""
    e = plan.by_axis.get(axis)
    return np.arange(slots.start, slots.stop) if e is None else e.index[slots]


def _read(source: Source, plan: Plan, leaf: Leaf, slots: Sequence[np.ndarray | None]) -> np.ndarray:
    """Reads a leaf at these sources along each dimension (None: all).

    The entries of new slots are arbitrary, so nothing is read if all are new.
    """
    all_new = any(s is not None and (s == NEW).all() for s in slots)
    if all_new or (leaf.power and plan.moments == "reset"):
        shape = [
            n if s is None else len(s)
            for n, s in zip(plan.small.shape(leaf.path), slots, strict=True)
        ]
        return np.zeros(shape, source.leaves[leaf.name].dtype)
    return source.read(leaf.name, [slice(None) if s is None else _indices(s) for s in slots])


def _indices(slots: np.ndarray) -> slice | np.ndarray:
    """Slots as a slice if they are consecutive; new ones as slot 0."""
    slots = np.maximum(slots, 0)
    first = int(slots[0])
    consecutive = np.array_equal(slots, np.arange(first, first + len(slots)))
    return slice(first, first + len(slots)) if consecutive else slots


def _grow_small(
    source: Source, target: Target, names: TrainState, large: Collection[str], plan: Plan
) -> int:
    """Grows all leaves that are not shaped like a parameter; returns the bytes written."""
    state = jax.tree.map(lambda name: None if name in large else source.read(name), names)

    def is_adam(node: Any) -> bool:
        return isinstance(node, SlotAdamState)

    state = upgraded(state)
    check_state(state.opt_state, plan)
    slots = jax.jit(functools.partial(grow_slots, plan=plan))
    grown = jax.tree.map(
        lambda node: slots(node) if is_adam(node) else node, state, is_leaf=is_adam
    )
    written = 0
    for name, value in by_name(grown).items():
        array = np.asarray(value)
        target.write(name, None, array)
        written += array.nbytes
    return written
