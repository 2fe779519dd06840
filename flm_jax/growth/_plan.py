"""A growth as data: `plan` compiles the difference of two configs.

The same plan maps parameters, optimizer state and slot ages (`apply.py`), arrays and
`ShapeDtypeStruct`s, and is stored with the checkpoint that it made.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from flm_jax import mapping
from flm_jax.config import MOMENTS, RATES, TransformerConfig
from flm_jax.errors import UserError
from flm_jax.growth import operators
from flm_jax.growth.expansion import Expansion
from flm_jax.params import axes
from flm_jax.params.axes import Role

VERSION = 2

# Fields that growth must not touch: each changes the function in a way no expansion undoes.
_KEPT = {
    "head_dim": "RoPE's frequencies depend on it; add heads instead (num_heads: operators "
    "'msg', 'zero_pad', 'tile')",
    "rope_theta": "it turns every query and key by another angle",
}


class LockedCopiesWarning(UserWarning):
    """Copies that nothing will ever separate from their source."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a model of config `source` becomes one of config `target`.

    Attributes:
      recipe: the operators' names (`operators.py`).
      source, target: the configs.
      expansions: of the axes that grow.
      moments: what Adam's moments become. "dual": every slot's history comes along, through the
        gradients' map. "asym": added slots begin anew, with an age of their own (SPARKLING).
        "reset": all begin anew.
      rates: "target": every slot trains as the target's config says. "carry": the source's steps
        keep their size in the function: learning rate and eps follow the maps (docs/growth.md).
        "ramp": carried at first, then faded to the target's over the growth's ramp.
      noise_db: signal-to-noise ratio, in decibels, of the antisymmetric noise that separates
        copies (HyperCloning, arXiv 2409.12903, section 3); 0: none.
    """

    recipe: str
    source: TransformerConfig
    target: TransformerConfig
    expansions: tuple[Expansion, ...]
    moments: str = "asym"
    rates: str = "target"
    noise_db: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in (("moments", MOMENTS), ("rates", RATES)):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"growth.{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}"
                )
        if self.noise_db < 0:
            raise UserError(f"growth.noise_db is {self.noise_db}; give decibels above 0, or 0: off")

    @functools.cached_property
    def by_axis(self) -> dict[str, Expansion]:
        return {e.axis: e for e in self.expansions}

    @property
    def exactness(self) -> str:
        """EXACT if no expansion changes the function, else APPROX."""
        exact = all(e.exactness == operators.EXACT for e in self.expansions)
        return operators.EXACT if exact else operators.APPROX

    @property
    def masked(self) -> bool:
        """Whether it has run-time masks that must rise."""
        return any(e.masked for e in self.expansions)

    @property
    def layer_map(self) -> tuple[int, ...]:
        """The source layer of every layer of the target, -1 for a new one."""
        e = self.by_axis.get("layers")
        return tuple(range(self.source.num_layers)) if e is None else tuple(e.index.tolist())

    @property
    def lockable(self) -> tuple[Expansion, ...]:
        """Expansions whose copies start equal to their source in all that they do.

        Equal activations, equal weights: only noise or other moments separate them. Layers differ
        by their place, repeated key/value heads by their queries, AKI's copies by their inputs.
        """
        return tuple(
            e
            for e in self.expansions
            if e.axis in axes.WIDTHS
            and not (e.silenced or e.splits or e.learned or e.ahead.any())
            and e.even_copies.any()
        )

    def value_scale(self, param: axes.Param) -> float:
        """Keeps `multiplier * parameter` when the config's multiplier changes between sizes."""
        return axes.multiplier_of(param, self.source) / axes.multiplier_of(param, self.target)

    def gain(self, param: axes.Param) -> float:
        """What a norm's gains are multiplied by; 1 for other parameters."""
        pairs = zip(param.axes, param.roles, strict=True)
        return math.prod(
            self.by_axis[axis].gain for axis, r in pairs if r is Role.GAIN and axis in self.by_axis
        )

    def masks(self, value: jax.Array | float) -> dict[str, jax.Array]:
        """Run-time masks: axis -> float32 [size], 1 on old slots and `value` on added ones.

        `value` may be traced: a ramp compiles once.
        """
        return {
            e.axis: jnp.where(e.added, jnp.asarray(value, jnp.float32), jnp.float32(1))
            for e in self.expansions
            if e.masked
        }

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **mapping.to_dict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises UserError on another version of the format."""
        data = json.loads(text)
        if (version := data.pop("version", None)) != VERSION:
            raise UserError(f"plan: version {version}, but this code reads version {VERSION}")
        return mapping.from_mapping(cls, data, "plan")

    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def plan(
    small: TransformerConfig,
    big: TransformerConfig,
    recipe: str = "msg",
    *,
    moments: str = "asym",
    rates: str = "target",
    noise_db: float = 0.0,
    layer_distances: Sequence[float] | None = None,
) -> Plan:
    """Compiles the difference of two configs into one expansion per axis.

    Args:
      small: the model as it is.
      big: the model as it shall be; no axis smaller.
      recipe: operators by name, as "msg", "tile,identity" or "zero_pad,layers=stack"; see
        `operators.py` and docs/growth.md.
      moments, rates, noise_db: see `Plan`.
      layer_distances: how far each layer of `small` is from the identity; `msg` and `identity`
        put new layers beside the closest. None: all equal, so that the first layers are copied.

    Raises:
      UserError: naming axis or field, both sizes and what could, if the recipe cannot do it.

    Warns:
      LockedCopiesWarning: copies would stay equal to their source for ever.
    """
    for name, why in _KEPT.items():
        old, new = getattr(small, name), getattr(big, name)
        if old != new:
            raise UserError(f"growth from {name} {old} to {new}: {why}; set {name} to {old}")
    distances = [0.0] * small.num_layers if layer_distances is None else list(layer_distances)
    if len(distances) != small.num_layers:
        raise UserError(
            f"layer_distances has {len(distances)} entries for {small.num_layers} layers; give "
            "one for each layer of the source"
        )
    expansions = operators.expansions(recipe, small, big, distances)
    needed = _norm_eps(small, expansions)
    if not math.isclose(needed, big.rms_norm_eps, rel_tol=1e-12):
        raise UserError(
            f"growth from rms_norm_eps {small.rms_norm_eps} to {big.rms_norm_eps}: recipe "
            f"{recipe!r} keeps the norms exact with rms_norm_eps {needed!r}; set the target's to it"
        )
    if any(e.learned for e in expansions):
        moments = "reset"  # a dense map mixes histories
    made = Plan(recipe, small, big, expansions, moments, rates, noise_db)
    if made.lockable and not noise_db and moments != "asym":
        names = ", ".join(f"{e.axis} ({e.operator})" for e in made.lockable)
        warnings.warn(
            f"recipe {recipe!r} with moments {moments!r}: copies on {names} stay equal to their "
            "source for ever; use moments 'asym', set noise_db (10 is usual), or use operator "
            "'uneven' where it can",
            LockedCopiesWarning,
            stacklevel=2,
        )
    return made


def _norm_eps(small: TransformerConfig, expansions: Sequence[Expansion]) -> float:
    for e in expansions:
        if e.gain != 1:
            return small.rms_norm_eps * int((~e.new).sum()) / e.target
    return small.rms_norm_eps


def norm_eps(small: TransformerConfig, big: TransformerConfig, recipe: str) -> float:
    """The target's `rms_norm_eps` with which the recipe is exact: smaller where it adds zeros.

    RMSNorm over q d of D coordinates, the rest zero: gain sqrt(q d / D) and eps q d / D give the
    old output (derived here, docs/growth.md).
    """
    return _norm_eps(small, operators.expansions(recipe, small, big, [0.0] * small.num_layers))
