"""An independent model of a chain of growths, in plain numpy and float64.

It has the maps of a growth and AdamW. Both are written from the equations of docs/growth.md, entry
by entry: nothing is imported from the code that they check. A growth is read from its plan's JSON.
Random entries (fresh ones and noise) cannot be computed here: they are taken from the grown model,
after a check of the rules that they must obey.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from flm_jax.studies.decoder_oracle import (
    PARAMS,
    RESIDUAL_WRITERS,
    VECTORS,
    Array,
    Config,
    Tree,
    decay,
    eps,
    multiplier,
    rate,
    shape_of,
    std,
)

NEW = -1
_BOUND = 3.4642  # random entries are bounded by this many standard deviations
TOLERANCE = 1e-9  # relative to the largest entry


class Mismatch(Exception):
    """The code and this model disagree.

    Attributes:
      kind: which check failed.
      detail: where, and by how much.
    """

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


def require_close(
    kind: str, name: str, got: Array, want: Array, tolerance: float = TOLERANCE
) -> None:
    """Raises Mismatch unless two arrays agree within `tolerance` of the largest entry, or of 1."""
    if got.shape != want.shape:
        raise Mismatch(kind, f"{name} has shape {got.shape}; expected {want.shape}")
    if not got.size:
        return
    error = float(np.max(np.abs(got - want)))
    if not error <= tolerance * max(1.0, float(np.max(np.abs(want)))):
        where = np.unravel_index(
            np.argmax(np.nan_to_num(np.abs(got - want), nan=np.inf)), got.shape
        )
        place = tuple(int(i) for i in where)
        raise Mismatch(
            kind, f"{name}{list(place)} is {got[place]:.12g}; expected {want[place]:.12g}"
        )


# AdamW.


@dataclasses.dataclass(frozen=True)
class Settings:
    """The optimizer's settings; names as in the configs."""

    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    learning_rate: float
    matrix_learning_rate: float
    added_rate: float = 1.0
    added_rate_steps: int = 1


@dataclasses.dataclass(frozen=True)
class State:
    """Parameters and the optimizer's state, with one number per entry of every parameter.

    Attributes:
      steps: updates done.
      value, mu, nu: the parameters and Adam's moments.
      born: `steps` when the entry was added.
      step_factor, eps_factor: F and H of docs/growth.md, as they are before any fading.
      fade_start, fade_steps: the multipliers fade over so many steps; 0: they stay.
      grown_at: `steps` at the last growth; None: there was none.
    """

    steps: int
    value: Tree
    mu: Tree
    nu: Tree
    born: Tree
    step_factor: Tree
    eps_factor: Tree
    fade_start: int = 0
    fade_steps: int = 0
    grown_at: int | None = None

    def kept(self, update: int) -> float:
        """The exponent of the multipliers at an update."""
        if not self.fade_steps:
            return 1.0
        return 1 - min(max((update - self.fade_start) / self.fade_steps, 0.0), 1.0)


def adamw(state: State, grads: Tree, config: Config, settings: Settings) -> State:
    """One update of AdamW."""
    t, s = state.steps + 1, settings
    norm = math.sqrt(sum(float(np.sum(g**2)) for g in grads.values()))
    clip = s.clip_norm / norm if norm > s.clip_norm else 1.0
    kept = state.kept(t)
    value, mu, nu = {}, {}, {}
    for path, g in grads.items():
        g = g * clip
        mu[path] = s.b1 * state.mu[path] + (1 - s.b1) * g
        nu[path] = s.b2 * state.nu[path] + (1 - s.b2) * g**2
        age = t - state.born[path]
        m_hat = mu[path] / (1 - s.b1**age)
        v_hat = nu[path] / (1 - s.b2**age)
        here = s.eps * eps(path, config) * state.eps_factor[path] ** kept
        step = state.step_factor[path] ** kept * m_hat / (np.sqrt(v_hat) + here)
        if state.grown_at is not None:
            added = state.born[path] >= state.grown_at
            progress = np.minimum(age / s.added_rate_steps, 1) * added
            step = step * (1 + (s.added_rate - 1) * progress)
        peak = s.learning_rate if path in VECTORS else s.matrix_learning_rate
        # Learning rates are float32 numbers, whatever the dtype of the parameters.
        learning_rate = float(np.float32(peak * rate(path, config)))
        decayed = step + s.weight_decay * decay(path, config) * state.value[path]
        value[path] = state.value[path] - learning_rate * decayed
    return dataclasses.replace(state, steps=t, value=value, mu=mu, nu=nu)


# Growth.


@dataclasses.dataclass(frozen=True)
class AxisMap:
    """How one axis grows, from a plan's JSON.

    Attributes:
      axis: its name.
      source, target: old and new size.
      index: the source slot of each slot, or NEW.
      alpha: the copy weight of each slot.
      ahead: copies that are written as in the next layer.
      fields: the other fields of the plan.
    """

    axis: str
    source: int
    target: int
    index: Array
    alpha: Array
    ahead: Array
    fields: Mapping[str, Any]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> AxisMap:
        """Reads one of a plan's expansions."""
        slots = [
            (NEW if run["start"] == NEW else run["start"] + n, run["weight"], run["ahead"])
            for run in data["runs"]
            for n in range(run["length"])
        ]
        index = np.array([slot for slot, _, _ in slots], int)
        alpha = np.array([weight for _, weight, _ in slots], float)
        ahead = np.array([late for _, _, late in slots], bool)
        return cls(data["axis"], data["source"], len(slots), index, alpha, ahead, data)

    @property
    def new(self) -> Array:
        """bool [target]: slots without a source."""
        new: Array = self.index == NEW
        return new

    @property
    def first(self) -> Array:
        """int [source]: the position of each old slot itself."""
        return np.array([int(np.argmax(self.index == n)) for n in range(self.source)], int)

    @property
    def added(self) -> Array:
        """bool [target]: new slots and copies."""
        added = np.ones(self.target, bool)
        added[self.first] = False
        return added

    @property
    def copied(self) -> Array:
        """bool [target]: slots whose source has several."""
        counts = np.bincount(self.index[~self.new], minlength=self.source + 1)
        copied: Array = (counts[self.index] > 1) & ~self.new
        return copied

    @property
    def zero(self) -> tuple[str, ...]:
        """Roles that are zero at new slots."""
        return tuple(self.fields["zero"])

    @property
    def silent(self) -> bool:
        """Whether its copies have no effect at first."""
        return bool(self.fields["masked"]) or "stack" in self.zero

    @property
    def hidden(self) -> bool:
        """Whether its copies have no effect at first, or are written as in the next layer."""
        return self.silent or bool(self.ahead.any())

    @property
    def even(self) -> bool:
        """Whether every slot is a copy with a weight, so that the small model can be followed."""
        f = self.fields
        special = self.hidden or f["learned"] or f["splits"] or self.new.any()
        return not special and self.axis != "layers" and f["exactness"] == "EXACT"

    def restarted(self, moments: str) -> Array:
        """bool [target]: slots whose entries start without history."""
        if moments == "reset":
            return np.ones(self.target, bool)
        return self.added if moments == "asym" or self.hidden else self.new

    def learned(self, role: str) -> Array:
        """The dense map [target, source] of parameters with this role."""
        text = self.fields["learned"]["reads" if role == "in" else "writes"]
        return np.frombuffer(base64.b64decode(text), np.float32).reshape(-1, self.source)


def _summed(x: Array, dim: int, e: AxisMap) -> Array:
    """Sums over the copies of each source slot, along one dimension."""
    slots = [np.take(x, np.flatnonzero(e.index == n), dim).sum(dim) for n in range(e.source)]
    return np.stack(slots, dim)


def _along(vector: Array, dim: int, ndim: int) -> Array:
    return vector.reshape([-1 if d == dim else 1 for d in range(ndim)])


class Growth:
    """The maps of one growth."""

    def __init__(self, plan: Mapping[str, Any]):
        """Reads the plan's JSON."""
        self.plan = plan
        self.small: Config = plan["source"]
        self.big: Config = plan["target"]
        self.axes = {data["axis"]: AxisMap.of(data) for data in plan["expansions"]}

    @property
    def exact(self) -> bool:
        """Whether the function is to stay as it is."""
        return all(e.fields["exactness"] == "EXACT" for e in self.axes.values())

    @property
    def masked(self) -> bool:
        """Whether there are run-time masks."""
        return any(e.fields["masked"] for e in self.axes.values())

    @property
    def follows(self) -> bool:
        """Whether the grown model must follow the small one's AdamW from here on."""
        same = self.plan["moments"] == "dual" and self.plan["rates"] == "carry"
        return same and not self.plan["noise_db"] and all(e.even for e in self.axes.values())

    def masks(self, value: float) -> dict[str, Array]:
        """Run-time masks with `value` at added slots."""
        return {
            e.axis: np.where(e.added, value, 1.0) for e in self.axes.values() if e.fields["masked"]
        }

    def _dims(self, path: str) -> Iterator[tuple[int, AxisMap, str, bool]]:
        """Dimension, map and role; and whether the axis is only laid out differently here."""
        has = [axis for axis, _ in PARAMS[path]]
        for dim, (axis, role) in enumerate(PARAMS[path]):
            if axis in self.axes:
                e = self.axes[axis]
                yield dim, e, role, e.fields["splits"] in has

    def gather(self, path: str, x: Array, next_layer: bool = False) -> Array:
        """Fills every slot from its source; new slots get arbitrary entries."""
        if next_layer:
            x = x[np.minimum(np.arange(len(x)) + 1, len(x) - 1)]
        for dim, e, role, laid_out in self._dims(path):
            if e.fields["learned"]:
                x = np.moveaxis(np.tensordot(e.learned(role), x, (1, dim)), 0, dim)
            elif laid_out:
                # Query head g of group k goes on in the part of the group that has it.
                parts = e.target // e.source
                share = x.shape[dim + 1] // parts
                pieces = [
                    np.take(np.take(x, k, dim), range(n * share, (n + 1) * share), dim)
                    for k in range(e.source)
                    for n in range(parts)
                ]
                x = np.stack(pieces, dim)
            elif e.fields["fill"] == "mean" and x.shape[dim] == e.target:
                continue  # already extended
            elif x.shape[dim] == 0:
                x = np.zeros((*x.shape[:dim], e.target, *x.shape[dim + 1 :]), x.dtype)
            else:
                x = np.take(x, np.maximum(e.index, 0), dim)
        return x

    def factor(self, path: str, *, dual: bool = False) -> Array:
        """f, or h for gradients: [.. like the grown parameter ..]."""
        scale = multiplier(path, self.small) / multiplier(path, self.big)
        out = np.full(shape_of(path, self.big), 1 / scale if dual else scale)
        for dim, e, role, laid_out in self._dims(path):
            if laid_out or e.fields["learned"]:
                continue
            gain = e.fields["gain"]
            by_role: dict[str, tuple[Any, Any]] = {
                "in": (e.alpha, 1.0),
                "out": (1.0, e.alpha),
                "gain": (gain, e.alpha / gain),
                "stack": (1.0, 1.0),
            }
            here = np.broadcast_to(by_role[role][dual], (e.target,))
            out = out * _along(here, dim, out.ndim)
        return out

    def _marked(self, path: str, which: Callable[[AxisMap, str], Array | None]) -> Array:
        """bool, like the grown parameter: entries in a slot that `which(map, role)` marks."""
        out = np.zeros(shape_of(path, self.big), bool)
        for dim, e, role, laid_out in self._dims(path):
            slots = which(e, role)
            if slots is not None and not laid_out:
                out |= _along(np.asarray(slots), dim, out.ndim)
        return out

    def created(self, path: str) -> Array:
        """bool: entries in a slot without a source."""
        return self._marked(path, lambda e, role: e.new)

    def restarted(self, path: str, moments: str) -> Array:
        """bool: entries that start without history."""
        if moments == "reset":
            return np.ones(shape_of(path, self.big), bool)
        return self._marked(path, lambda e, role: e.restarted(moments))

    def follow(self, path: str, x: Array) -> Array:
        """The value map, where it needs no random entries."""
        followed: Array = self.gather(path, x) * self.factor(path)
        return followed

    def values(self, path: str, x: Array, grown: Array) -> Array:
        """The grown parameter.

        Args:
          path: its name.
          x: the parameter before.
          grown: the project's result, from which random entries are taken.

        Raises:
          Mismatch: a random entry breaks its rule.
        """
        if grown.shape != shape_of(path, self.big):
            raise Mismatch("parameters", f"{path} has shape {grown.shape}")
        x = self._with_mean(path, x, grown)
        factor = self.factor(path)
        want = self.gather(path, x) * factor
        if PARAMS[path][0][0] == "layers":
            late = self._marked(path, lambda e, role: e.ahead if role == "out" else None)
            if late.any():
                want = np.where(late, self.gather(path, x, next_layer=True) * factor, want)

        def is_fresh(e: AxisMap, role: str) -> Array | None:
            return e.new if e.fields["fill"] == "fresh" else None

        def is_zero(e: AxisMap, role: str) -> Array | None:
            if role not in e.zero:
                return None
            if role == "stack":
                return e.added if path in RESIDUAL_WRITERS else None
            return e.new

        fresh = self._marked(path, is_fresh)
        zero = self._marked(path, is_zero)
        want = np.where(fresh, grown, want)
        want[zero] = 0.0
        self._check_fresh(path, grown[fresh & ~zero])
        if self.plan["noise_db"]:
            want = self._with_noise(path, want, grown, fresh | zero)
        return want

    def _check_fresh(self, path: str, entries: Array) -> None:
        """Fresh entries are 1 times the gain, or bounded draws that are not all 0."""
        deviation = std(path, self.big)
        if not entries.size:
            return
        if not deviation:
            gains = [e.fields["gain"] for _, e, role, _ in self._dims(path) if role == "gain"]
            want = np.full(entries.shape, math.prod(gains))
            require_close("parameters", f"fresh entries of {path}", entries, want)
        elif not 0 < np.max(np.abs(entries)) <= _BOUND * deviation:
            raise Mismatch(
                "parameters",
                f"fresh entries of {path} reach {np.max(np.abs(entries)):.4g}, at a standard "
                f"deviation of {deviation:.4g}",
            )

    def _with_mean(self, path: str, x: Array, grown: Array) -> Array:
        """x with new slots that are means of the old ones; readers also get random deviations."""
        for dim, e, role, _ in self._dims(path):
            if e.fields["fill"] != "mean":
                continue
            rows = np.moveaxis(x, dim, 0)
            mean = rows.mean(0, keepdims=True)
            new = np.repeat(mean, e.target - e.source, 0)
            if role == "in":
                drawn = np.moveaxis(grown, dim, 0)[e.source :]
                for other, f, _, _ in self._dims(path):
                    if other != dim:
                        drawn = np.take(drawn, f.first, other)
                drawn = drawn * multiplier(path, self.big) / multiplier(path, self.small)
                spread = np.abs(rows - mean).sum(0) / math.sqrt(max(e.source - 1, 1))
                if np.any(np.abs(drawn - new) > _BOUND * spread + TOLERANCE):
                    raise Mismatch("parameters", f"new rows of {path} are too far from the mean")
                new = drawn
            x = np.moveaxis(np.concatenate([rows, new]), 0, dim)
        return x

    def _with_noise(self, path: str, want: Array, grown: Array, exempt: Array) -> Array:
        """Adds the noise of `grown`: in readers of copies, summing to 0 over a slot's copies."""
        noise = np.where(exempt, 0.0, grown - want)
        readers = [
            (dim, e)
            for dim, e, role, laid_out in self._dims(path)
            if role == "in" and not laid_out and not e.silent and not e.fields["learned"]
            and e.copied.any()
        ]  # fmt: skip
        if not readers:
            return want
        total = noise
        for dim, e in readers:
            total = _summed(total, dim, e)
        require_close("noise", f"the sum over copies in {path}", total, np.zeros_like(total))
        level = 10 ** (-self.plan["noise_db"] / 20)
        loudest = 10 * level * np.max(np.abs(want), initial=0)
        if np.max(np.abs(noise), initial=0) > loudest:
            raise Mismatch("noise", f"in {path} it reaches {np.max(np.abs(noise)):.4g}")
        return want + noise

    def grow(self, state: State, grown: Tree, ramp_steps: int) -> State:
        """The grown state.

        Args:
          state: the state before.
          grown: the project's parameters, for their random entries.
          ramp_steps: steps in which the multipliers fade, if the plan's rates are "ramp".
        """
        rates, moments = self.plan["rates"], self.plan["moments"]
        kept = state.kept(state.steps)
        out: dict[str, Any] = {
            name: {} for name in ("value", "mu", "nu", "born", "step_factor", "eps_factor")
        }
        for path in PARAMS:
            out["value"][path] = self.values(path, state.value[path], grown[path])
            h, restarted = self.factor(path, dual=True), self.restarted(path, moments)
            for name, power in (("mu", 1), ("nu", 2)):
                mapped = self.gather(path, getattr(state, name)[path]) * h**power
                out[name][path] = np.where(restarted, 0.0, mapped)
            old = self.gather(path, state.born[path])
            out["born"][path] = np.where(restarted, state.steps, old)
            ones = np.ones(shape_of(path, self.big))
            out["step_factor"][path] = out["eps_factor"][path] = ones
            if rates != "target":
                created = self.created(path)
                ratio = rate(path, self.small) / rate(path, self.big)
                f = self.gather(path, state.step_factor[path] ** kept) * self.factor(path) * ratio
                own = eps(path, self.small) / eps(path, self.big)
                of_eps = self.gather(path, state.eps_factor[path] ** kept) * h * own
                out["step_factor"][path] = np.where(created, 1.0, f)
                out["eps_factor"][path] = np.where(created, 1.0, of_eps)
        fading = ramp_steps if rates == "ramp" else 0
        return State(state.steps, **out, grown_at=state.steps, fade_start=state.steps,
                     fade_steps=fading)  # fmt: skip

    def check_gradient(self, before: Tree, after: Tree) -> int:
        """Compares the grown model's gradient with the dual map of the source's.

        Only the sum over the copies of a repeated key/value head is known.

        Returns:
          The number of arrays compared.
        """
        for path in PARAMS:
            kept = ~self.restarted(path, "dual")
            got = after[path] * kept
            want = self.gather(path, before[path]) * self.factor(path, dual=True) * kept
            for dim, e, _, laid_out in self._dims(path):
                if e.fields["splits"] and not laid_out:
                    got, want = _summed(got, dim, e), _summed(want, dim, e)
            require_close("gradients", path, got, want)
        return len(PARAMS)

    def has_entries(self, axis: str) -> bool:
        """Whether the grown model has parameters with this axis: without layers, some are empty."""
        shapes = (shape_of(path, self.big) for path, on in PARAMS.items() if axis in dict(on))
        return any(0 not in shape for shape in shapes)

    def locked(self, value: Tree) -> dict[str, tuple[int, ...]]:
        """Copies that act as an earlier one: equal writers, readers in proportion to the weights.

        Args:
          value: parameters some steps after the growth.

        Returns:
          For each axis with such copies, their positions.
        """
        found = {}
        for e in self.axes.values():
            positions = [
                copy
                for copy in range(e.target)
                if any(
                    e.index[copy] == e.index[earlier] != NEW and self._same(value, e, copy, earlier)
                    for earlier in range(copy)
                )
            ]
            if positions:
                found[e.axis] = tuple(positions)
        return found

    def _same(self, value: Tree, e: AxisMap, copy: int, earlier: int) -> bool:
        """Whether the entries of two slots are in proportion; not if there are none (no layers)."""
        entries = 0
        for path in PARAMS:
            for dim, (axis, role) in enumerate(PARAMS[path]):
                if axis == e.axis:
                    a, b = (np.take(value[path], p, dim) for p in (copy, earlier))
                    if role == "in":
                        a, b = a / e.alpha[copy], b / e.alpha[earlier]
                    largest = np.max(np.abs(b), initial=1)
                    if np.max(np.abs(a - b), initial=0) > TOLERANCE * largest:
                        return False
                    entries += a.size
        return entries > 0
