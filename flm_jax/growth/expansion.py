"""How one axis grows, and what that does to values and to gradients.

An expansion says for every slot of the grown axis which old slot it comes from, or that it is new.
Let an activation x on the axis become x' = x P, where P copies slots. A parameter that writes the
axis then copies its columns; one that reads it must share a source slot's contribution among its
copies, with weights alpha that sum to 1 (P^+ with P P^+ = I). With every parameter mapped so,
W' = P^+ W Q, the function is unchanged; by the chain rule gradients map by the dual,
G' = P^T G (Q^+)^T: the side that is copied in value has its gradient weighted and the other way
round. (Derived here; docs/growth.md has the equations and the norms, which are the exception.)

    role     value    gradient
    IN       alpha    1
    OUT      1        alpha
    GAIN     gain     alpha / gain
    STACK    1        1

A parameter that carries the axis (`Param.carries`: the last norm before a tied head) has its value
multiplied by alpha besides, and its gradient divided by it.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.errors import UserError
from flm_jax.params.axes import Param, Role
from flm_jax.params.trees import Window, along, slots_in

NEW = -1
_FEW_RUNS = 8


@dataclasses.dataclass(frozen=True)
class Run:
    """`length` consecutive slots: copies of the old slots from `start` on, or new (`NEW`)."""

    start: int
    length: int
    weight: float = 1.0  # alpha, of copies
    ahead: bool = False  # copies are written as in the next layer (bert2BERT's AKI)


@dataclasses.dataclass(frozen=True)
class Learned:
    """A dense map of an axis (LiGO): float32 [target, source] matrices as base64 of their bytes.

    reads: applied to parameters that read the axis; writes: to the others.
    """

    reads: str
    writes: str

    @classmethod
    def of(cls, reads: np.ndarray, writes: np.ndarray) -> Learned:
        return cls(*(base64.b64encode(np.float32(m).tobytes()).decode() for m in (reads, writes)))

    def matrix(self, role: Role, source: int) -> np.ndarray:
        text = self.reads if role is Role.IN else self.writes
        return np.frombuffer(base64.b64decode(text), np.float32).reshape(-1, source)


@dataclasses.dataclass(frozen=True)
class Expansion:
    """One axis: where each of its slots comes from, and what keeps added slots from showing.

    A source slot's first occurrence is the old slot itself; later ones are copies. New slots and
    copies are called added.

    Attributes:
      axis: its name in the axis table.
      source: old size.
      runs: the slots of the grown axis, in order.
      operator: name of the operator that made it (`operators.py`).
      exactness: "EXACT" if it leaves the function unchanged, else "APPROX".
      masked: added slots are hidden behind a run-time mask; their copies share no weights.
      zero: roles on this axis whose entries are zero at new slots, so that they do not show. On
        `layers`, "stack": the residual writers of all added layers are zero.
      gain: what the gains of norms over this axis are multiplied by.
      fill: other entries of new slots: "fresh" as in a new model, or "mean" of the old slots.
      splits: an axis whose slots are dealt out among the copies of a slot of this one.
      learned: a dense map instead of copies.

    Raises UserError if an old slot is missing, if weights that must sum to 1 do not, or if new
    slots are silenced on both sides: their gradients would be zero for ever.
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
        kept = np.unique(self.index[self.index != NEW])
        if not np.array_equal(kept, np.arange(self.source)):
            raise UserError(
                f"growth of axis {self.axis!r}: {len(kept)} of its {self.source} slots are kept "
                f"in the {self.target} new ones; growth keeps every slot"
            )
        if {"in", "out"} <= set(self.zero):
            raise UserError(
                f"growth of axis {self.axis!r}: what writes and what reads its new slots would "
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
        return sum(run.length for run in self.runs)

    def _per_slot(self, values: list[float | bool]) -> np.ndarray:
        return np.repeat(np.array(values), [run.length for run in self.runs])

    @functools.cached_property
    def index(self) -> np.ndarray:
        """int64 [target]: the source slot, or NEW."""
        return np.concatenate(
            [np.full(r.length, NEW) if r.start == NEW else np.arange(r.start, r.start + r.length)
             for r in self.runs]
        )  # fmt: skip

    @functools.cached_property
    def weight(self) -> np.ndarray:
        """float64 [target]: alpha."""
        return self._per_slot([run.weight for run in self.runs])

    @functools.cached_property
    def ahead(self) -> np.ndarray:
        """bool [target]."""
        return self._per_slot([run.ahead for run in self.runs])

    @functools.cached_property
    def added(self) -> np.ndarray:
        """bool [target]: a new slot, or a copy."""
        added = np.ones(self.target, bool)
        added[self.first] = False
        return added

    @functools.cached_property
    def new(self) -> np.ndarray:
        """bool [target]: comes from no old slot."""
        return self.index == NEW

    @property
    def first(self) -> np.ndarray:
        """int64 [source]: where the old slot itself is."""
        values, first = np.unique(self.index, return_index=True)
        return first[values != NEW]

    @property
    def even_copies(self) -> np.ndarray:
        """bool [target]: a copy with the same weight as the old slot."""
        own = np.append(self.weight[self.first], np.nan)  # NEW is the last
        return self.added & (self.weight == own[self.index])

    @property
    def silenced(self) -> bool:
        """Its copies are hidden, by masks or zeros, rather than sharing weights."""
        return self.masked or Role.STACK.value in self.zero

    @property
    def identity(self) -> bool:
        return np.array_equal(self.index, np.arange(self.source))

    def factor(self, role: Role, *, dual: bool, carried: bool = False) -> np.ndarray | None:
        """What entries are multiplied by on this axis: float64 [target], None for ones.

        Args:
          role: of the parameter on this axis.
          dual: for gradients, instead of values.
          carried: whether the parameter carries the copies' weights (`Param.carries`).
        """
        factor = np.ones(self.target)
        if role is (Role.OUT if dual else Role.IN):
            factor = self.weight
        elif role is Role.GAIN:
            factor = self.weight / self.gain if dual else factor * self.gain
        if carried:
            factor = factor / self.weight if dual else factor * self.weight
        return None if np.all(factor == 1) else factor


def append_new(axis: str, source: int, target: int, **how: Any) -> Expansion:
    """Old slots first, then new ones. `how`: further fields of `Expansion`."""
    new = () if target == source else (Run(NEW, target - source),)
    return Expansion(axis, source, (Run(0, source), *new), **how)


def from_index(
    axis: str,
    source: int,
    index: list[int],
    weights: list[float] | None = None,
    **how: Any,
) -> Expansion:
    """The expansion with that source slot (or NEW) and weight (None: 1) for each slot."""
    runs: list[Run] = []
    for slot, weight in zip(index, weights or [1.0] * len(index), strict=True):
        last = runs[-1] if runs else None
        if (
            last
            and last.weight == weight
            and ((slot == NEW) == (last.start == NEW))
            and (slot == NEW or slot == last.start + last.length)
        ):
            runs[-1] = dataclasses.replace(last, length=last.length + 1)
        else:
            runs.append(Run(slot, 1, weight))
    return Expansion(axis, source, tuple(runs), **how)


Expansions = Mapping[str, Expansion]


def grown_dims(param: Param, expansions: Expansions) -> Iterator[tuple[int, Expansion, Role]]:
    """The dimensions of a parameter that grow, with their expansion and role."""
    for dim, (axis, role) in enumerate(zip(param.axes, param.roles, strict=True)):
        if axis in expansions:
            yield dim, expansions[axis], role


def gather(
    x: jax.Array, param: Param, expansions: Expansions, window: Window | None = None
) -> jax.Array:
    """x at the target's shape, every slot from its source (new slots: from any); no weights.

    Along dimensions that the window cuts, x has the sources of the window's slots already.
    """
    for dim, e, role in grown_dims(param, expansions):
        if window and window[dim]:
            continue
        if e.learned is not None:
            matrix = jnp.asarray(e.learned.matrix(role, e.source), x.dtype)
            x = jnp.moveaxis(jnp.tensordot(matrix, x, axes=(1, dim)), 0, dim)
        elif e.splits in param.axes:
            # [.., k, g, ..] -> [.., k r, g / r, ..]: each copy takes its part of the other axis.
            parts = e.target // e.source
            shape = list(x.shape)
            shape[dim : dim + 2] = [shape[dim] * parts, shape[dim + 1] // parts]
            x = x.reshape(shape)
        elif len(e.runs) <= _FEW_RUNS:
            # Slices and zeros: on a mesh they move between neighbours, where a gather by index
            # would bring the whole axis to every device.
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
    """x times scale and the factors of its axes, to a power. x: the leaf, or a window of it.

    The factors are multiplied with each other first, so that x is rounded once.
    """
    factor = jnp.asarray(scale**power, x.dtype)
    for dim, e, role in grown_dims(param, expansions):
        carried = e.axis in param.carries
        on_axis = None if e.splits in param.axes else e.factor(role, dual=dual, carried=carried)
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
    """Whether an entry lies, on any axis, in a slot that `which` marks (bool [target]); None: no.

    Of the whole leaf, or of a window.

    Built by broadcasting on the device: at 1T the combination of all axes does not fit a host.
    """
    found: jax.Array | None = None
    for dim, e, role in grown_dims(param, expansions):
        marked = which(e, role)
        if marked is not None and marked.any():
            marks = slots_in(jnp.asarray(marked), window[dim] if window else None)
            here = along(marks, dim, len(param.axes))
            found = here if found is None else found | here
    return found
