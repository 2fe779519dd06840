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
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from flm_jax import mapping
from flm_jax.config import MOMENTS, RATES, TransformerConfig
from flm_jax.errors import UserError
from flm_jax.growth import operators
from flm_jax.growth.expansion import Expansion
from flm_jax.params import axes, mup, trees
from flm_jax.params.axes import ModelSpec, Role, Table

VERSION = 2
Model = TransformerConfig | ModelSpec  # the decoder by its config, a model of your own by its spec

AnyModel = TypeVar("AnyModel", TransformerConfig, ModelSpec, Model)

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
      source, target: the models before and after: the decoder's configs, or the `ModelSpec`s of a
        model of your own.
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
    source: Model
    target: Model
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

    @functools.cached_property
    def small(self) -> ModelSpec:
        """The source: its table, sizes and scales."""
        return spec_of(self.source)

    @functools.cached_property
    def big(self) -> ModelSpec:
        """The target."""
        return spec_of(self.target)

    @property
    def config(self) -> TransformerConfig:
        """The decoder's config after the growth.

        Raises UserError if the plan is for a model of your own, which has no such config.
        """
        if isinstance(self.target, ModelSpec):
            raise UserError(
                "this runs flm_jax's decoder, and the plan is for a model of your own; use plan "
                "and grow alone for it"
            )
        return self.target

    @property
    def table(self) -> Table:
        """The axis table, the same before and after."""
        return self.big.table

    def check_source(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """The leaves by path. Raises UserError if they are not shaped like the source's."""
        leaves = dict(trees.flatten(tree))
        for path in dict.fromkeys([*self.table, *leaves]):
            have = leaves[path].shape if path in leaves else "missing"
            want = self.small.shape(path) if path in self.table else "no such parameter"
            if have != want:
                raise UserError(
                    f"grow: parameter {path!r} is {have}, the plan's source has {want}; use the "
                    "plan made for this state"
                )
        return leaves

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
        return tuple(range(self.small.sizes["layers"])) if e is None else tuple(e.index.tolist())

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

    def value_scale(self, path: str) -> float:
        """Keeps `multiplier * parameter` when the multiplier changes between sizes."""
        return self.small.scale(path).multiplier / self.big.scale(path).multiplier

    def gain(self, path: str) -> float:
        """What a norm's gains are multiplied by; 1 for other parameters."""
        param = self.table[path]
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


def spec_of(model: Model) -> ModelSpec:
    """What growth needs to know of a model."""
    return mup.spec(model) if isinstance(model, TransformerConfig) else model


def with_norm_eps(model: AnyModel, eps: float) -> AnyModel:
    """The model with another eps in its RMSNorms."""
    field = "norm_eps" if isinstance(model, ModelSpec) else "rms_norm_eps"
    changes: dict[str, Any] = {field: eps}
    return dataclasses.replace(model, **changes)


def plan(
    small: Model,
    big: Model,
    recipe: str = "msg",
    *,
    moments: str = "asym",
    rates: str = "target",
    noise_db: float = 0.0,
    layer_distances: Sequence[float] | None = None,
) -> Plan:
    """Compiles the difference of two models into one expansion per axis.

    Where a recipe adds zeros to the residual stream, RMSNorm's eps must become smaller for the
    function to stay (`norm_eps`). A target that has the source's eps gets it, in `Plan.target`.

    Args:
      small: the model as it is: the decoder's config, or the `ModelSpec` of a model of your own.
      big: the model to grow to, of the same kind; no axis smaller.
      recipe: operators by name, as "msg", "tile,identity" or "zero_pad,layers=stack"; see
        `operators.py` and docs/growth.md.
      moments: see `Plan`.
      rates: see `Plan`.
      noise_db: see `Plan`, decibels.
      layer_distances: how far each layer of `small` is from the identity; `msg` and `identity`
        put new layers beside the closest. None: all equal, so that the first layers are copied.

    Returns:
      The plan. Its `target` is the model to train from then on.

    Raises:
      UserError: the recipe cannot do it; names axis or field, both sizes and what could.

    Warns:
      LockedCopiesWarning: copies would never diverge from their source.
    """
    _check_models(small, big)
    before, after = spec_of(small), spec_of(big)
    layers = before.sizes.get("layers", 0)
    distances = [0.0] * layers if layer_distances is None else list(layer_distances)
    if len(distances) != layers:
        raise UserError(
            f"layer_distances has {len(distances)} entries for {layers} layers; give "
            "one for each layer of the source"
        )
    expansions = operators.expansions(recipe, before.sizes, after.sizes, distances)
    big = _with_norm_eps(big, before.norm_eps, after.norm_eps, expansions, recipe)
    if any(e.learned for e in expansions):
        moments = "reset"  # a dense map mixes histories
    made = Plan(recipe, small, big, expansions, moments, rates, noise_db)
    if made.lockable and not noise_db and moments != "asym":
        names = ", ".join(f"{e.axis} ({e.operator})" for e in made.lockable)
        warnings.warn(
            f"recipe {recipe!r} with moments {moments!r}: copies on {names} never diverge from "
            "their source; use moments 'asym', set noise_db (10 is usual), or use operator "
            "'uneven' where it can",
            LockedCopiesWarning,
            stacklevel=2,
        )
    return made


def _check_models(small: Any, big: Any) -> None:
    """Raises UserError if these are not two models that a growth can connect."""
    for name, model in (("small", small), ("big", big)):
        if not isinstance(model, TransformerConfig | ModelSpec):
            raise UserError(
                f"plan: {name} is a {type(model).__name__}; give a TransformerConfig, or the "
                "ModelSpec of a model of your own"
            )
    if type(small) is not type(big):
        raise UserError(
            f"plan: small is a {type(small).__name__} and big a {type(big).__name__}; give two of "
            "the same kind"
        )
    if isinstance(small, TransformerConfig):
        for name, why in _KEPT.items():
            old, new = getattr(small, name), getattr(big, name)
            if old != new:
                raise UserError(f"growth from {name} {old} to {new}: {why}; set {name} to {old}")
    before, after = spec_of(small), spec_of(big)
    if before.table != after.table or set(before.sizes) != set(after.sizes):
        raise UserError(
            "plan: small and big have different axis tables; growth keeps every parameter and its "
            "axes: give one table and two dictionaries of sizes"
        )


def norm_eps(small: Model, big: Model, recipe: str) -> float:
    """The target's RMSNorm eps with which the recipe is exact: smaller where it adds zeros.

    RMSNorm over q d of D coordinates, the rest zero: gain sqrt(q d / D) and eps q d / D give the
    old output (derived here, docs/growth.md).

    Raises:
      UserError: the recipe cannot grow `small` to `big`.
    """
    before, after = spec_of(small), spec_of(big)
    distances = [0.0] * before.sizes.get("layers", 0)
    expansions = operators.expansions(recipe, before.sizes, after.sizes, distances)
    return _needed_eps(before.norm_eps, expansions, recipe) or 0.0


def _needed_eps(eps: float | None, expansions: Sequence[Expansion], recipe: str) -> float | None:
    for e in expansions:
        if e.gain != 1:
            if eps is None:
                raise UserError(
                    f"growth of axis {e.axis!r} from {e.source} to {e.target}: recipe {recipe!r} "
                    "adds zeros, which only RMSNorm can make up for, and the model has another "
                    "norm (ModelSpec.norm_eps is None); operator 'tile' could"
                )
            return eps * int((~e.new).sum()) / e.target
    return eps


def _with_norm_eps(
    big: Model,
    old: float | None,
    given: float | None,
    expansions: Sequence[Expansion],
    recipe: str,
) -> Model:
    """The target with the eps that the recipe needs.

    Raises UserError if the target has another one that is not the source's either.
    """
    needed = _needed_eps(old, expansions, recipe)
    if needed is None or given is None:
        if needed is not given:
            raise UserError(f"plan: norm_eps is {old} before and {given} after; give both the same")
        return big
    if math.isclose(needed, given, rel_tol=1e-12):
        return big
    if given != old:
        raise UserError(
            f"growth from rms_norm_eps {old} to {given}: recipe {recipe!r} keeps the norms exact "
            f"with {needed!r}; leave the target's at {old}, and the plan sets it"
        )
    return with_norm_eps(big, needed)
