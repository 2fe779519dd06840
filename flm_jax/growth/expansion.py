"""How one axis grows, and what that does to values and to gradients.

An expansion says for every slot of the grown axis which old slot it comes from, or that it is new.
Let an activation x on the axis become x' = x P, where P copies slots. A parameter that writes the
axis then copies its columns; one that reads it must share a source slot's contribution among its
copies, with weights alpha that sum to 1 (P^+ with P P^+ = I). With every parameter mapped so,
W' = P^+ W Q, the function is unchanged; by the chain rule gradients map by the dual,
G' = P^T G (Q^+)^T: the side that is copied in value has its gradient weighted and the other way
round. (Derived here; the block's norms are the exception, see `operators.py`.)

    role     value    gradient
    IN       alpha    1
    OUT      1        alpha
    GAIN     1        alpha
    STACK    1        1
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.axes import Param, Role
from flm_jax.errors import UserError

NEW = -1


@dataclasses.dataclass(frozen=True)
class Run:
    """`length` consecutive slots: copies of the old slots from `start` on, or new (`NEW`)."""

    start: int
    length: int
    weight: float = 1.0  # alpha, of copies


@dataclasses.dataclass(frozen=True)
class Expansion:
    """One axis: where each of its slots comes from.

    A source slot's first occurrence is the old slot itself; later ones are copies. New slots and
    copies are called added. `masked` axes hide their added slots behind a run-time mask, so that
    copies need no sharing of weights there.

    Raises UserError if an old slot is missing, or if the weights of an unmasked axis do not sum
    to 1 for each source slot.
    """

    axis: str
    source: int  # old size
    runs: tuple[Run, ...]
    masked: bool = False

    def __post_init__(self) -> None:
        kept = np.unique(self.index[self.index != NEW])
        if not np.array_equal(kept, np.arange(self.source)):
            raise UserError(
                f"growth of axis {self.axis!r}: {len(kept)} of its {self.source} slots are kept "
                f"in the {self.target} new ones; growth keeps every slot"
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
        return np.concatenate([np.full(r.length, r.weight) for r in self.runs])

    @functools.cached_property
    def added(self) -> np.ndarray:
        """bool [target]: a new slot, or a copy."""
        added = np.ones(self.target, bool)
        values, first = np.unique(self.index, return_index=True)
        added[first[values != NEW]] = False
        return added

    @functools.cached_property
    def new(self) -> np.ndarray:
        """bool [target]: comes from no old slot."""
        return self.index == NEW

    @property
    def identity(self) -> bool:
        return np.array_equal(self.index, np.arange(self.source))


def append_new(axis: str, source: int, target: int, *, masked: bool) -> Expansion:
    """Old slots first, then new ones."""
    new = () if target == source else (Run(NEW, target - source),)
    return Expansion(axis, source, (Run(0, source), *new), masked)


def from_index(axis: str, source: int, index: list[int], *, masked: bool) -> Expansion:
    """The expansion with that source slot (or NEW) for each slot, every weight 1."""
    runs: list[Run] = []
    for slot in index:
        last = runs[-1] if runs else None
        if (
            last
            and ((slot == NEW) == (last.start == NEW))
            and (slot == NEW or slot == last.start + last.length)
        ):
            runs[-1] = dataclasses.replace(last, length=last.length + 1)
        else:
            runs.append(Run(slot, 1))
    return Expansion(axis, source, tuple(runs), masked)


def _along(vector: np.ndarray, dim: int, ndim: int) -> np.ndarray:
    return vector.reshape([-1 if d == dim else 1 for d in range(ndim)])


def _weighted(role: Role, *, dual: bool) -> bool:
    return role in ((Role.OUT, Role.GAIN) if dual else (Role.IN,))


def expand(
    x: jax.Array,
    param: Param,
    expansions: Mapping[str, Expansion],
    *,
    fill: jax.Array | None = None,
    dual: bool = False,
    power: int = 1,
    keep_copies: bool = True,
) -> jax.Array:
    """Expands one array that is shaped like `param` along every axis that grows.

    Args:
      x: the parameter, or its gradient or moment.
      param: its entry in the axis table.
      expansions: axis -> expansion, of the axes that grow.
      fill: entries of new slots, of the target's shape; None: zeros.
      dual: use the gradient's weights instead of the value's.
      power: power of the weights: 2 for a second moment.
      keep_copies: False fills copies like new slots.

    Returns: the array at the target's shape, x's dtype.
    """
    filled: Any = None
    for dim, (axis, role) in enumerate(zip(param.axes, param.roles, strict=True)):
        e = expansions.get(axis)
        if e is None:
            continue
        if not e.identity:
            x = jnp.take(x, np.maximum(e.index, 0), axis=dim)
        if _weighted(role, dual=dual) and not np.all(e.weight == 1):
            x = x * jnp.asarray(_along(e.weight**power, dim, len(param.axes)), x.dtype)
        missing = e.new if keep_copies else e.added
        if missing.any():
            # On the device: at 1T the combination of all axes does not fit a host.
            along = jnp.asarray(_along(missing, dim, len(param.axes)))
            filled = along if filled is None else filled | along
    if filled is None:
        return x
    return jnp.where(filled, jnp.zeros((), x.dtype) if fill is None else fill.astype(x.dtype), x)
