"""How one axis grows, and what that does to values and to gradients.

An expansion says for every slot of the grown axis which old slot it comes from, or that it is new.
Let an activation x on the axis become x' = x P, where P copies slots. A parameter that writes the
axis then copies its columns. One that reads it must divide a source slot's contribution among its
copies, with weights alpha that sum to 1 (P^+ with P P^+ = I). If every parameter is mapped so,
W' = P^+ W Q, the function is unchanged. By the chain rule, gradients map by the dual,
G' = P^T G (Q^+)^T: a side whose values are copied has its gradients weighted, and vice versa.
(Derived here; docs/growth.md has the equations, and the norms, which are the exception.)

    role     value    gradient
    IN       alpha    1
    OUT      1        alpha
    GAIN     gain     alpha / gain
    STACK    1        1

If a parameter carries the axis (`Param.carries`: the last norm before a tied head), its value is
also multiplied by alpha, and its gradient divided by alpha.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.errors import UserError
from flm_jax.params.axes import Param, Role
from flm_jax.params.trees import Window, along, slots_in

NEW = -1
_FEW_RUNS = 8
_MOST_SLOTS = 1 << 24  # of an axis; each takes some 30 bytes in memory


@dataclasses.dataclass(frozen=True)
class Run:
    """`length` consecutive slots: the old slots from `start` on, or new ones (start `NEW`)."""

    start: int
    length: int
    weight: float = 1.0  # alpha of copies
    ahead: bool = False  # copies are written as in the next layer (bert2BERT's AKI)

    def __post_init__(self) -> None:
        if self.start < NEW or not 0 <= self.length <= _MOST_SLOTS:
            raise UserError(
                f"growth: {self.length} slots from {self.start} on; a run has 0 to {_MOST_SLOTS} "
                f"slots, and starts at a slot, or at {NEW} for new ones"
            )


class DenseMap(NamedTuple):
    """A dense map of an axis (LiGO), as arrays or tracers [target, source].

    Attributes:
      reads: applied to parameters that read the axis.
      writes: applied to the others (writers, gains and stacked layers).
    """

    reads: Any
    writes: Any

    def matrix(self, role: Role) -> Any:
        """The map for a parameter with this role on the axis."""
        return self.reads if role is Role.IN else self.writes


DenseMaps = Mapping[str, DenseMap]  # by axis


@dataclasses.dataclass(frozen=True)
class Learned:
    """A `DenseMap` as a plan stores it: the bytes of its float32 matrices in base64."""

    reads: str
    writes: str

    @classmethod
    def of(cls, dense: DenseMap) -> Learned:
        """Encodes a dense map."""
        return cls(*(base64.b64encode(np.float32(m).tobytes()).decode() for m in dense))

    def arrays(self, source: int) -> DenseMap:
        """Decodes the dense map of an axis whose old size is `source`."""
        buffers = (base64.b64decode(text) for text in (self.reads, self.writes))
        return DenseMap(*(np.frombuffer(b, np.float32).reshape(-1, source) for b in buffers))


@dataclasses.dataclass(frozen=True)
class Expansion:
    """How one axis grows: where each slot comes from, and why added slots have no effect at first.

    A source slot's first occurrence is the old slot itself; later ones are copies. New slots and
    copies are together called added.

    Attributes:
      axis: its name in the axis table.
      source: old size.
      runs: the slots of the grown axis, in order.
      operator: name of the operator that made it (`operators.py`).
      exactness: "EXACT" if it leaves the function unchanged, else "APPROX".
      masked: added slots are hidden behind a run-time mask; copies then need no weights.
      zero: roles on this axis whose entries are zero at new slots, so that these have no effect. On
        `layers`, "stack": the residual writers of all added layers are zero.
      gain: factor on the gains of norms over this axis.
      fill: other entries of new slots: "fresh" as in a new model, or "mean" of the old slots.
      splits: another axis, whose slots are divided among the copies of a slot of this axis.
      learned: a dense map to use instead of copies.

    Raises:
      UserError: an old slot is missing; weights that must sum to 1 do not; or new slots are zero
        on both sides, so that their gradients would stay zero.
    """

    axis: str
    source: int
    runs: tuple[Run, ...]
    operator: str = ""
    exactness: str = "EXACT"
    masked: bool = False
    zero: tuple[str, ...] = ()
    gain: float = 1.0
    fill: str = "fresh"
    splits: str = ""
    learned: Learned | None = None

    def __post_init__(self) -> None:
        for name, size in (("source", self.source), ("target", self.target)):
            if not 0 <= size <= _MOST_SLOTS or not self.runs:
                raise UserError(
                    f"growth of axis {self.axis!r}: its {name} has {size} slots; growth is for 0 "
                    f"to {_MOST_SLOTS}"
                )
        kept = np.unique(self.index[self.index != NEW])
        if not np.array_equal(kept, np.arange(self.source)):
            raise UserError(
                f"growth of axis {self.axis!r}: {len(kept)} of its {self.source} slots are kept "
                f"in the {self.target} new ones; growth keeps every slot"
            )
        if {"in", "out"} <= set(self.zero):
            raise UserError(
                f"growth of axis {self.axis!r}: the writers and the readers of its new slots would "
                "both be zero, so that neither ever gets a gradient; leave one of them random "
                "(operator 'zero_pad')"
            )
        old = self.index != NEW
        total = np.bincount(self.index[old], weights=self.weight[old], minlength=self.source)
        if self.axis != "layers" and not self.masked and not np.allclose(total, 1, atol=1e-12):
            raise UserError(
                f"growth of axis {self.axis!r}: the weights of a source slot's copies sum to "
                f"{total.min()} .. {total.max()}; they must sum to 1"
            )

    @property
    def target(self) -> int:
        """New size."""
        return sum(run.length for run in self.runs)

    def _per_slot(self, values: list[float] | list[bool]) -> np.ndarray:
        """[target]: the value of each slot's run."""
        return np.repeat(np.array(values), [run.length for run in self.runs])

    @functools.cached_property
    def index(self) -> np.ndarray:
        """int64 [target]: the source slot, or NEW."""
        return np.concatenate(
            [
                np.full(r.length, NEW) if r.start == NEW else np.arange(r.start, r.start + r.length)
                for r in self.runs
            ]
        )

    @functools.cached_property
    def weight(self) -> np.ndarray:
        """float64 [target]: alpha of each slot."""
        return self._per_slot([run.weight for run in self.runs])

    @functools.cached_property
    def ahead(self) -> np.ndarray:
        """bool [target]: a copy that is written as in the next layer."""
        return self._per_slot([run.ahead for run in self.runs])

    @functools.cached_property
    def added(self) -> np.ndarray:
        """bool [target]: a new slot or a copy."""
        added = np.ones(self.target, bool)
        added[self.first] = False
        return added

    @functools.cached_property
    def new(self) -> np.ndarray:
        """bool [target]: comes from no old slot."""
        new: np.ndarray = self.index == NEW
        return new

    @property
    def first(self) -> np.ndarray:
        """int64 [source]: the position of the old slot itself."""
        values, positions = np.unique(self.index, return_index=True)
        first: np.ndarray = positions[values != NEW]
        return first

    @property
    def copies(self) -> np.ndarray:
        """int64 [target]: number of slots with the same source; for new slots arbitrary."""
        counts: np.ndarray = np.bincount(self.index[~self.new], minlength=self.source)[self.index]
        return counts

    @property
    def occurrences(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The n-th slot with each source, for n = 0, 1, ..: slots [source], whether it exists."""
        where: list[list[int]] = [[] for _ in range(self.source)]
        for slot, source in enumerate(self.index.tolist()):
            if source != NEW:
                where[source].append(slot)
        most = max((len(slots) for slots in where), default=0)
        padded = np.array([[*s, *[-1] * (most - len(s))] for s in where], int)
        padded = padded.reshape(self.source, most)
        return [(np.maximum(slots, 0), slots >= 0) for slots in padded.T]

    @property
    def pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """All pairs of slots with one source, by their distance in its order: slots, earlier."""
        order = np.argsort(self.index, kind="stable")
        order = order[self.index[order] != NEW]
        source = self.index[order]
        pairs = []
        for distance in range(1, len(self.occurrences)):
            equal = source[distance:] == source[:-distance]
            pairs.append((order[distance:][equal], order[:-distance][equal]))
        return pairs

    @property
    def silenced(self) -> bool:
        """Whether its copies are hidden by masks or zeros, and therefore have no weights."""
        return self.masked or Role.STACK.value in self.zero

    def keeps_history(self, moments: str) -> np.ndarray:
        """Marks the slots that keep their optimizer history: bool [target].

        Args:
          moments: "dual", "asym" or "reset" (`Plan`).
        """
        if moments == "reset":
            return np.zeros(self.target, bool)
        if moments == "asym" or self.silenced or self.ahead.any():
            return ~self.added
        return ~self.new

    @property
    def identity(self) -> bool:
        """Whether every slot stays where it is."""
        return np.array_equal(self.index, np.arange(self.source))

    def factor(self, role: Role, *, dual: bool, carried: bool = False) -> np.ndarray | None:
        """The factor on a parameter's entries at each slot.

        Args:
          role: the parameter's role on this axis.
          dual: whether it is for gradients instead of values.
          carried: whether the parameter carries the copies' weights (`Param.carries`).

        Returns:
          float64 [target]; None if all factors are 1.
        """
        factor = np.ones(self.target)
        if role is (Role.OUT if dual else Role.IN):
            factor = self.weight
        elif role is Role.GAIN:
            factor = self.weight / self.gain if dual else factor * self.gain
        if carried:
            factor = factor / self.weight if dual else factor * self.weight
        return None if np.all(factor == 1) else factor


def append_new(axis: str, source: int, target: int, **fields: Any) -> Expansion:
    """Puts new slots after the old ones.

    Args:
      axis: its name.
      source: old size.
      target: new size.
      **fields: further fields of `Expansion`.

    >>> append_new("mlp", 2, 4).index.tolist()
    [0, 1, -1, -1]
    """
    new = () if target == source else (Run(NEW, target - source),)
    return Expansion(axis, source, (Run(0, source), *new), **fields)


def from_index(
    axis: str,
    source: int,
    index: list[int],
    weights: list[float] | None = None,
    **fields: Any,
) -> Expansion:
    """Makes an expansion from the source of every slot.

    Args:
      axis: its name.
      source: old size.
      index: the source slot of each slot, or NEW.
      weights: alpha of each slot; None: 1.
      **fields: further fields of `Expansion`.

    >>> twice = from_index("mlp", 2, [0, 1, 0, 1], [0.5] * 4)
    >>> [(run.start, run.length, run.weight) for run in twice.runs]
    [(0, 2, 0.5), (0, 2, 0.5)]
    """
    runs: list[Run] = []
    for slot, weight in zip(index, weights or [1.0] * len(index), strict=True):
        if runs and _continues(runs[-1], slot, weight):
            runs[-1] = dataclasses.replace(runs[-1], length=runs[-1].length + 1)
        else:
            runs.append(Run(slot, 1, weight))
    return Expansion(axis, source, tuple(runs), **fields)


def _continues(run: Run, slot: int, weight: float) -> bool:
    """Whether a slot with this source and weight extends the run."""
    if weight != run.weight:
        return False
    if run.start == NEW:
        return slot == NEW
    return slot == run.start + run.length


Expansions = Mapping[str, Expansion]


def divides(param: Param, e: Expansion) -> bool:
    """Whether the parameter has the axis that e divides among its copies.

    Its entries are then only laid out differently: none is weighted, and none is added.
    """
    return e.splits in param.axes


def grown_dims(param: Param, expansions: Expansions) -> Iterator[tuple[int, Expansion, Role]]:
    """Yields the dimensions of a parameter in which it gets entries, with expansion and role."""
    for dim, (axis, role) in enumerate(zip(param.axes, param.roles, strict=True)):
        e = expansions.get(axis)
        if e is not None and not divides(param, e):
            yield dim, e, role


def split(x: jax.Array, dim: int, parts: int) -> jax.Array:
    """Divides dimension dim + 1 among copies: [.., k, g, ..] -> [.., k parts, g / parts, ..]."""
    shape = list(x.shape)
    shape[dim : dim + 2] = [shape[dim] * parts, shape[dim + 1] // parts]
    return x.reshape(shape)


def gather(
    x: jax.Array,
    param: Param,
    expansions: Expansions,
    window: Window | None = None,
    dense: DenseMaps | None = None,
) -> jax.Array:
    """Fills every slot of a grown parameter from its source, without weights.

    Args:
      x: the parameter. Along dimensions that the window cuts it already holds the sources of the
        window's slots.
      param: its table entry.
      expansions: of the axes that grow.
      window: the part of the grown parameter to fill; None: all of it.
      dense: maps to use in place of `Expansion.learned`, by axis; None: those of the expansions.

    Returns:
      x at the target's shape. New slots hold arbitrary entries.
    """
    for dim, axis in enumerate(param.axes):
        e = expansions.get(axis)
        if e is not None and divides(param, e) and not (window and window[dim]):
            x = split(x, dim, e.target // e.source)
    for dim, e, role in grown_dims(param, expansions):
        if window and window[dim]:
            continue
        if e.learned is not None:
            maps = e.learned.arrays(e.source) if dense is None else dense[e.axis]
            matrix = jnp.asarray(maps.matrix(role), x.dtype)
            x = jnp.moveaxis(jnp.tensordot(matrix, x, axes=(1, dim)), 0, dim)
        elif len(e.runs) <= _FEW_RUNS:
            # Slices and zeros move between neighbours on a mesh. A gather by index would bring the
            # whole axis to every device.
            pieces = [
                jnp.zeros((*x.shape[:dim], run.length, *x.shape[dim + 1 :]), x.dtype)
                if run.start == NEW
                else jax.lax.slice_in_dim(x, run.start, run.start + run.length, axis=dim)
                for run in e.runs
            ]
            x = jnp.concatenate(pieces, axis=dim)
        elif not e.identity:
            x = jnp.take(x, np.maximum(e.index, 0), axis=dim)
    return x


def weighted(
    x: jax.Array,
    param: Param,
    expansions: Expansions,
    *,
    scale: float = 1.0,
    dual: bool = False,
    power: int = 1,
    window: Window | None = None,
) -> jax.Array:
    """Multiplies a grown leaf by `scale` and the factors of its axes.

    The factors are multiplied with each other first, so that x is rounded once.

    Args:
      x: the leaf at the target's shape, or the window of it.
      param: its table entry.
      expansions: of the axes that grow.
      scale: a factor for the whole leaf.
      dual: whether to use the factors of gradients instead of those of values.
      power: power that all factors are raised to.
      window: the part of the leaf that x is; None: all of it.

    Returns:
      The product, in the dtype of x.
    """
    factor = jnp.asarray(scale**power, x.dtype)
    for dim, e, role in grown_dims(param, expansions):
        if e.learned is not None:
            continue  # the dense map holds the weights
        on_axis = e.factor(role, dual=dual, carried=e.axis in param.carries)
        if on_axis is not None:
            here = slots_in(jnp.asarray(on_axis**power, x.dtype), window[dim] if window else None)
            factor = factor * along(here, dim, x.ndim)
    return x * factor


def any_slot(
    param: Param,
    expansions: Expansions,
    which: Callable[[Expansion, Role], np.ndarray | None],
    window: Window | None = None,
) -> jax.Array | None:
    """Marks the entries of a grown leaf that lie in a marked slot on any of its axes.

    Built by broadcasting on the device: for a 1T model the whole mask does not fit a host.

    Args:
      param: the leaf's table entry.
      expansions: of the axes that grow.
      which: marks slots, from an expansion and the parameter's role: bool [target]; None: none.
      window: the part of the leaf; None: all of it.

    Returns:
      bool, broadcastable to the leaf or the window; None: no entry is marked.
    """
    marks: jax.Array | None = None
    for dim, e, role in grown_dims(param, expansions):
        slots = which(e, role)
        if slots is not None and slots.any():
            in_window = slots_in(jnp.asarray(slots), window[dim] if window else None)
            on_axis = along(in_window, dim, len(param.axes))
            marks = on_axis if marks is None else marks | on_axis
    return marks
