"""Which copies can never differ: decided from a plan and an optimizer state, before any step.

Two slots with the same source stay locked to each other if everything that reads and writes them
is in proportion and stays so: their values, gradients, moments, ages and multipliers. With shares
a and b, their readers are then a : b and their writers equal (docs/growth.md, "Locked copies").
What ends a lock: unequal moments or ages, another rate for old slots, shares whose steps are not
carried, noise, entries that
are drawn afresh, and readers or writers from another layer.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax.growth.expansion import Expansion, divides, grown_dims, split
from flm_jax.params import trees
from flm_jax.params.axes import Param, Role
from flm_jax.train.optim import SlotAdamState

if TYPE_CHECKING:
    from flm_jax.growth._plan import Plan

History = Mapping[str, np.ndarray]  # kind of slot -> bool [size]: whether it was ever stepped


def locked(
    plan: Plan, history: History | None = None, values: Sequence[Mapping[str, Any]] = ()
) -> dict[str, tuple[int, ...]]:
    """Finds the copies that never differ from an earlier slot of the same source.

    Args:
      plan: the growth.
      history: which slots of the source have taken a step; None: all of them.
      values: the source's parameters, and its moments if there are any. They decide whether copies
        from the next layer differ, and the queries of repeated heads; (): these are taken to.

    Returns:
      Positions on each axis that has such copies.
    """
    found = {}
    for e in plan.expansions:
        paths = [
            path
            for path, p in plan.table.items()
            if e.axis in p.axes and 0 not in plan.big.shape(path)
        ]
        # Layers differ by their place. Slots of empty parameters do nothing.
        if not paths or e.axis in plan.stacks:
            continue
        if any(_separates(plan, path, e) for path in paths):
            continue
        seen: set[Hashable] = set()
        again = []
        rows = zip(e.index.tolist(), *_traits(plan, e, history, values), strict=True)
        for slot, traits in enumerate(rows):
            if not e.new[slot] and traits in seen:
                again.append(slot)
            seen.add(traits)
        if again:
            found[e.axis] = tuple(again)
    return found


def warning(plan: Plan, found: Mapping[str, tuple[int, ...]]) -> str:
    """The text of a warning about locked copies; names axes and what separates them."""
    names = ", ".join(f"{axis} ({plan.by_axis[axis].operator})" for axis in found)
    counts = ", ".join(str(len(slots)) for slots in found.values())
    other = "" if plan.moments == "asym" else ", or use moments 'asym'"
    return (
        f"recipe {plan.recipe!r} with moments {plan.moments!r} and rates {plan.rates!r}: copies on "
        f"{names} never diverge from an earlier copy ({counts} of them); set noise_db (10 is usual)"
        f"{other}"
    )


def expected(plan: Plan) -> dict[str, tuple[int, ...]]:
    """The locks of any trained state. A dense map is left out: its fit makes all rows differ."""
    return {axis: slots for axis, slots in locked(plan).items() if not plan.by_axis[axis].learned}


def history(state: Any, plan: Plan) -> History | None:
    """Which slots have taken a step, from an optimizer's state; None if it does not say."""

    def is_adam(node: Any) -> bool:
        return isinstance(node, SlotAdamState | optax.ScaleByAdamState)

    for node in jax.tree.leaves(state, is_leaf=is_adam):
        if isinstance(node, SlotAdamState):
            steps = np.asarray(node.steps)
            return {kind: np.asarray(born) < steps for kind, born in node.born.items()}
        if isinstance(node, optax.ScaleByAdamState):
            stepped = bool(np.asarray(node.count) > 0)
            return {kind: np.full(plan.small.count(kind), stepped) for kind in plan.small.slots}
    if isinstance(state, Mapping):
        return {kind: np.zeros(plan.small.count(kind), bool) for kind in plan.small.slots}
    return None


def values_of(state: Any) -> list[Mapping[str, Any]]:
    """Parameters and moments of a train state; [] if it has none, or not all on this process."""
    params = getattr(state, "params", None)
    if params is None:
        return []
    found = [params]
    for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SlotAdamState)):
        if isinstance(node, SlotAdamState):
            found += [node.mu, node.nu]
    here = all(getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(found))
    return found if here else []


def _separates(plan: Plan, path: str, e: Expansion) -> bool:
    """Whether the parameter makes any two slots of e's axis differ."""
    param = plan.table[path]
    if e.masked or noised(plan, param) is not None:
        return True
    for _, other, role in grown_dims(param, plan.by_axis):
        if other is e or not other.new.any() or other.fill == "mean":
            continue
        zero = role.value in other.zero and (role is not Role.STACK or param.residual_writer)
        if not zero and plan.big.scale(path).std:
            return True  # each slot has entries of its own there
    return False


def _traits(
    plan: Plan, e: Expansion, history: History | None, values: Sequence[Mapping[str, Any]]
) -> list[list[Any]]:
    """Lists over the slots; slots that are equal in all of them are locked."""
    kept = e.keeps_history(plan.moments) & _stepped(plan, e, history)
    traits = [kept.tolist()]
    if plan.old_rate != 1:
        traits.append(e.added.tolist())
    if plan.rates != "carry":
        traits.append(np.round(e.weight, 12).tolist())
    if ahead_differs(plan, e):
        traits.append((e.ahead & _next_differs(plan, e, values)[e.index]).tolist())
    if e.splits:
        traits.append(_served(plan, e, values).tolist())
    if e.learned is not None:
        dense = e.learned.arrays(e.source)
        traits.append([row.tobytes() for row in np.concatenate([dense.reads, dense.writes], 1)])
    return traits


def _stepped(plan: Plan, e: Expansion, history: History | None) -> np.ndarray:
    """bool [target]: whether some entry of the slot's source has taken a step."""
    stepped = np.ones(e.source, bool)
    if history is not None:
        stepped[:] = False
        for param in plan.table.values():
            if e.axis in param.axes:
                stepped |= _with_history(plan, param, e.axis, history)
    padded: np.ndarray = np.append(stepped, False)[e.index]  # NEW (-1) picks the last
    return padded


def _with_history(plan: Plan, param: Param, axis: str, history: History) -> np.ndarray:
    """bool [source]: whether the parameter has a stepped entry at each slot of the axis."""
    here: np.ndarray = np.zeros(plan.small.sizes[axis], bool)
    others = True
    for kind, dims in param.slots.items():
        axes = [param.axes[dim] for dim in dims]
        slots = history[kind].reshape([plan.small.sizes[a] for a in axes])
        if axis in axes:
            rest = tuple(d for d, a in enumerate(axes) if a != axis)
            here = np.asarray(slots.any(axis=rest))
        else:
            others = others and bool(slots.any())
    return here & others


def ahead_differs(plan: Plan, e: Expansion) -> bool:
    """Whether copies that are written as in the next layer differ: not if there is no next one."""
    writers = (p for p in plan.table.values() if p.stacked and p.has(Role.OUT, e.axis))
    return bool(e.ahead.any()) and any(plan.small.sizes[p.axes[0]] > 1 for p in writers)


def _next_differs(plan: Plan, e: Expansion, values: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """bool [source]: whether a slot is written differently in some layer and the next."""
    if not values:
        return np.ones(e.source, bool)
    differs = np.zeros(e.source, bool)
    for path, x in trees.flatten(values[0]):
        param = plan.table[path]
        if param.stacked and param.has(Role.OUT, e.axis):
            dim = param.axes.index(e.axis)
            others = tuple(d for d in range(x.ndim) if d != dim)
            differs |= np.asarray((x[1:] != x[:-1]).any(axis=others))
    return differs


def _served(plan: Plan, e: Expansion, values: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """int [target]: the first slot of the same source that serves equal parts of the split axis."""
    first = np.arange(e.target)
    if not values:
        return first
    parts = [
        jnp.moveaxis(split(x, param.axes.index(e.axis), e.target // e.source),
                     param.axes.index(e.axis), 0)
        for tree in values
        for path, x in trees.flatten(tree)
        if divides(param := plan.table[path], e)
    ]  # fmt: skip
    for slots, earlier in e.pairs:  # the farthest comes last, so that the first equal slot wins
        same = np.ones(len(slots), bool)
        for x in parts:
            rest = tuple(range(1, x.ndim))
            same &= np.asarray((x[slots] == x[earlier]).all(axis=rest))
        first[slots[same]] = earlier[same]
    return first


def noised(plan: Plan, param: Param) -> int | None:
    """The dimension along which a parameter gets noise that sums to zero over copies; None: none.

    It is the first in which it reads copies of one activation.
    """
    if not plan.noise_db:
        return None
    for dim, e, role in grown_dims(param, plan.by_axis):
        if role is Role.IN and takes_noise(plan, e):
            return dim
    return None


def takes_noise(plan: Plan, e: Expansion) -> bool:
    """Whether an axis has copies of one activation, which noise can separate."""
    silent = e.silenced or e.splits or e.learned or ahead_differs(plan, e)
    copies = e.added & ~e.new
    return e.axis not in plan.stacks and not silent and bool(copies.any())
