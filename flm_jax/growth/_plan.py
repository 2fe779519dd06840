"""A growth as data: `plan` compiles the difference of two models.

The same plan maps parameters (`apply.py`), optimizer state and slot ages (`moments.py`), for arrays
and for `ShapeDtypeStruct`s. It is stored with the checkpoint that it produced.
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
from flm_jax.checks import require_version
from flm_jax.config import BLOCK_FIELDS, MOMENTS, RATES, TransformerConfig
from flm_jax.data import json_text
from flm_jax.errors import UserError
from flm_jax.growth import locks, operators
from flm_jax.growth.expansion import NEW, Expansion
from flm_jax.params import axes, mup, trees
from flm_jax.params.axes import ModelSpec, Role, Table

VERSION = 2
Model = TransformerConfig | ModelSpec  # the decoder's config, or the spec of a model of your own

AnyModel = TypeVar("AnyModel", TransformerConfig, ModelSpec, Model)

# Fields that must stay: each changes the function in a way that no expansion can undo.
_KEPT = {
    "head_dim": "RoPE's frequencies depend on it; add heads instead (num_heads: operators "
    "'msg', 'zero_pad', 'tile')",
    "rope_theta": "it changes the angle by which every query and key is rotated",
    **dict.fromkeys(BLOCK_FIELDS, "it is part of every layer's function"),
}


class LockedCopiesWarning(UserWarning):
    """Copies that will never diverge from their source."""


class UnfinishedRampWarning(UserWarning):
    """A growth of a state whose multipliers are still fading from an earlier growth."""


class UselessNoiseWarning(UserWarning):
    """Noise for copies, in a growth without copies that it could separate."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the model `source` becomes the model `target`.

    Attributes:
      recipe: names of operators (`operators.py`).
      source: the model before: the decoder's config, or the `ModelSpec` of a model of your own.
      target: the model after, of the same kind.
      expansions: one for each axis that grows.
      moments: what happens to Adam's moments. "dual": every slot keeps its history, mapped like
        gradients. "asym": added slots start from zero, with their own age (SPARKLING). "reset": all
        slots start from zero.
      rates: "target": every slot trains by the target's config. "carry": the source's steps keep
        their size in the function, so learning rate and eps follow the maps (docs/growth.md).
        "ramp": carried at first, then faded to the target's over the growth's ramp.
      noise_db: signal-to-noise ratio, in decibels, of the antisymmetric noise that separates
        copies (HyperCloning, arXiv 2409.12903, section 3); 0: no noise.
      old_rate: learning rate of old slots over that of added ones in the training that follows.
        It maps nothing, but separates copies from their source.

    Raises:
      UserError: moments, rates or noise_db has a value that is not allowed.
    """

    recipe: str
    source: Model
    target: Model
    expansions: tuple[Expansion, ...]
    moments: str = "asym"
    rates: str = "target"
    noise_db: float = 0.0
    old_rate: float = mapping.added(1.0)

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
        """The expansion of each axis that grows."""
        return {e.axis: e for e in self.expansions}

    @functools.cached_property
    def small(self) -> ModelSpec:
        """Table, sizes and scales of the source."""
        return spec_of(self.source)

    @functools.cached_property
    def big(self) -> ModelSpec:
        """Table, sizes and scales of the target."""
        return spec_of(self.target)

    @property
    def config(self) -> TransformerConfig:
        """The decoder's config after the growth.

        Raises:
          UserError: the plan is for a model of your own, which has no such config.
        """
        if isinstance(self.target, ModelSpec):
            raise UserError(
                "plan.config: this needs flm_jax's decoder, and the plan is for a model of your "
                "own; use only plan and grow for it"
            )
        return self.target

    @property
    def table(self) -> Table:
        """The axis table; it is the same before and after."""
        return self.big.table

    def check_source(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Flattens parameters, or a tree like them, and checks their shapes.

        Returns:
          The leaves by path.

        Raises:
          UserError: a leaf is missing, unknown, or not shaped as in the source.
        """
        leaves = dict(trees.flatten(tree))
        for path in dict.fromkeys([*self.table, *leaves]):
            have = _shape_of(leaves[path]) if path in leaves else "missing"
            want = self.small.shape(path) if path in self.table else "no such parameter"
            if have != want:
                raise UserError(
                    f"grow: parameter {path!r} is {have}, the plan's source has {want}; use the "
                    "plan made for this state"
                )
        return leaves

    @property
    def exactness(self) -> str:
        """ "EXACT" if no expansion changes the function, else "APPROX"."""
        exact = all(e.exactness == operators.EXACT for e in self.expansions)
        return operators.EXACT if exact else operators.APPROX

    @property
    def masked(self) -> bool:
        """Whether it has run-time masks, which must rise to 1."""
        return any(e.masked for e in self.expansions)

    @property
    def layer_map(self) -> tuple[int, ...]:
        """The source layer of every layer of the target, -1 for a new one."""
        if "layers" in self.by_axis:
            return tuple(self.by_axis["layers"].index.tolist())
        return tuple(range(self.small.sizes["layers"]))

    @functools.cached_property
    def stacks(self) -> frozenset[str]:
        """Axes that stack layers."""
        return frozenset(
            axis for param in self.table.values() for axis in param.axes
            if param.has(Role.STACK, axis)
        )  # fmt: skip

    def locks(self, state: Any = None) -> dict[str, tuple[int, ...]]:
        """Finds the copies that will never differ from an earlier slot of the same source.

        Whether they can follows from the values, moments, ages and multipliers of all that reads
        and writes them (`locks.py`).

        Args:
          state: the `TrainState`, or its optimizer state, before the growth. None: every slot is
            taken to have a history. Parameters alone have none: a new optimizer treats all alike.

        Returns:
          axis -> positions of such copies on the grown axis; an axis without any is left out.
        """
        if state is None:
            return locks.locked(self)
        return locks.locked(self, locks.history(state, self), locks.values_of(state))

    def value_scale(self, path: str) -> float:
        """Factor on values that keeps `multiplier * parameter` when the multiplier changes."""
        return self.small.scale(path).multiplier / self.big.scale(path).multiplier

    def gain(self, path: str) -> float:
        """Factor on a norm's gains; 1 for other parameters."""
        param = self.table[path]
        pairs = zip(param.axes, param.roles, strict=True)
        return math.prod(
            self.by_axis[axis].gain for axis, r in pairs if r is Role.GAIN and axis in self.by_axis
        )

    def masks(self, value: jax.Array | float) -> dict[str, jax.Array]:
        """Makes the run-time masks.

        Args:
          value: mask of added slots, in [0, 1]. It may be traced, so that a ramp compiles once.

        Returns:
          For each masked axis: float32 [size], 1 on old slots and `value` on added ones.
        """
        return {
            e.axis: jnp.where(e.added, jnp.asarray(value, jnp.float32), jnp.float32(1))
            for e in self.expansions
            if e.masked
        }

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps({"version": VERSION, **mapping.to_dict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Reads the plan from `to_json`'s text.

        Raises:
          UserError: the text has another version of the format, or is not a plan.
        """
        try:
            data = json_text.parse(text)
        except ValueError as error:
            raise UserError(f"plan: not JSON ({error}); restore plan.json") from None
        if not isinstance(data, dict):
            raise UserError("plan: no JSON object; restore plan.json")
        require_version("plan", data, VERSION, first=0)
        made = mapping.from_mapping(cls, data, "plan")
        _check_models(made.source, made.target)
        grown = dict(made.small.sizes)
        for e in made.expansions:
            if grown.get(e.axis) != e.source:
                raise UserError(
                    f"plan: it grows axis {e.axis!r} from {e.source}, and the source has "
                    f"{grown.get(e.axis)}; restore plan.json"
                )
            grown[e.axis] = e.target
            if e.splits in grown and e.source:
                grown[e.splits] //= max(e.target // e.source, 1)
        if grown != made.big.sizes:
            raise UserError(
                f"plan: its expansions lead to {grown}, and its target is {made.big.sizes}; "
                "restore plan.json"
            )
        return made

    def digest(self) -> str:
        """SHA-256 of the JSON text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _shape_of(leaf: Any) -> tuple[int, ...] | str:
    """A leaf's shape; for what is no array the name of its type."""
    shape: tuple[int, ...] | None = getattr(leaf, "shape", None)
    return f"of type {type(leaf).__name__}" if shape is None else shape


def spec_of(model: Model) -> ModelSpec:
    """What growth needs to know about a model."""
    return mup.spec(model) if isinstance(model, TransformerConfig) else model


def with_norm_eps(model: AnyModel, eps: float) -> AnyModel:
    """Sets the eps of a model's RMSNorms over `embed`; that of queries and keys stays."""
    changes: dict[str, Any] = {"norm_eps": eps}
    if isinstance(model, TransformerConfig):
        changes = {"rms_norm_eps": eps}
        if model.qk_norm != "none" and eps != model.rms_norm_eps:
            changes["qk_norm_eps"] = model.qk_norm_eps or model.rms_norm_eps
    return dataclasses.replace(model, **changes)


def plan(
    small: Model,
    big: Model,
    recipe: str | Mapping[str, str] = "msg",
    *,
    moments: str = "asym",
    rates: str = "target",
    noise_db: float = 0.0,
    old_rate: float = 1.0,
    layer_distances: Sequence[float] | None = None,
) -> Plan:
    """Compiles the difference of two models into one expansion per axis.

    Two fields of the target follow from the growth (`derived`), and `Plan.target` has them: the eps
    of the norms and, where layers differ in kind, the kind of each.

    Args:
      small: the model as it is: the decoder's config, or the `ModelSpec` of a model of your own.
      big: the model to grow to, of the same kind; no axis may be smaller.
      recipe: names of operators, as in "msg", "tile,identity" or "zero_pad,layers=stack", or the
        operator of each axis, as in {"layers": "stack"}; see `operators.py` and docs/growth.md.
      moments: see `Plan`.
      rates: see `Plan`.
      noise_db: see `Plan`; decibels.
      old_rate: see `Plan`; `GrowthConfig.old_rate` of the stage that trains the grown model.
      layer_distances: how far each layer of `small` is from the identity; `msg` and `identity`
        put new layers beside the closest. None: all equal, so that the first layers are copied.

    Returns:
      The plan. Its `target` is the model to train after the growth.

    Raises:
      UserError: the recipe cannot grow `small` to `big`; names the axis or field, both sizes and
        operators that can. Or an argument has the wrong type.

    Warns:
      LockedCopiesWarning: copies would never diverge from their source.
      UselessNoiseWarning: noise_db is set, but there are no copies that noise can separate.

    >>> from flm_jax import Param, grow
    >>> table = {"up": Param.of("embed:in mlp:out"), "down": Param.of("mlp:in embed:out")}
    >>> small, big = ({"embed": 2, "mlp": size} for size in (2, 4))
    >>> wider = plan(ModelSpec(table, small), ModelSpec(table, big), "tile")
    >>> params = {"up": jnp.ones((2, 2)), "down": jnp.ones((2, 2))}
    >>> grow(params, wider, jax.random.key(0))["down"].tolist()
    [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    """
    _check_models(small, big)
    recipe = operators.text_of(recipe)
    layers = spec_of(small).sizes.get("layers", 0)
    distances = [0.0] * layers if layer_distances is None else list(layer_distances)
    if len(distances) != layers:
        raise UserError(
            f"layer_distances has {len(distances)} entries for {layers} layers; give one for each "
            "layer of the source"
        )
    expansions = _expansions(small, big, recipe, distances)
    big = _with_derived(small, big, expansions, recipe)
    learned = [e.axis for e in expansions if e.learned]
    if learned:
        moments = "reset"  # a dense map mixes the histories of slots
        if rates != "target":
            raise UserError(
                f"growth.rates is {rates!r}, but axis {learned[0]!r} grows by a dense map, which "
                "mixes the slots' steps, so that no factor keeps them; use rates 'target'"
            )
        if old_rate != 1:
            raise UserError(
                f"growth.old_rate is {old_rate}, but axis {learned[0]!r} grows by a dense map, "
                "which leaves no slot as it was; set old_rate to 1, or use operator 'net2net' or "
                "'stack'"
            )
    made = Plan(recipe, small, big, expansions, moments, rates, noise_db, old_rate)
    if found := locks.expected(made):
        warnings.warn(locks.warning(made, found), LockedCopiesWarning, stacklevel=2)
    if noise_db and all(locks.noised(made, param) is None for param in made.table.values()):
        names = ", ".join(f"{e.axis} ({e.operator})" for e in expansions) or "none"
        warnings.warn(
            f"growth.noise_db is {noise_db} without effect: noise separates copies that share an "
            f"activation, and the growing axes ({names}) have none; set noise_db to 0",
            UselessNoiseWarning,
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
            "plan: small and big have different axis tables, but growth keeps every parameter and "
            "its axes; give one table and two dictionaries of sizes"
        )


def derived(small: AnyModel, big: AnyModel, recipe: str) -> AnyModel:
    """Gives the target the fields that follow from the growth.

    The eps of the RMSNorms is smaller than the source's if the recipe adds zeros to the stream. If
    q d of D coordinates are copies and the rest are zero, gains times sqrt(q d / D) and eps times
    q d / D give the old output (derived here, docs/growth.md).

    If the source's layers differ in kind (sliding window, no RoPE), each layer of the target is of
    the kind of the layer that it comes from. Such layers are chosen by place, not by distance, so
    that their kinds are known before the growth.

    Args:
      small: the model before.
      big: the model after; a field that still has the source's value is set.
      recipe: names of operators.

    Returns:
      The target.

    Raises:
      UserError: the recipe cannot grow `small` to `big`, or `big` has another value.
    """
    distances = [0.0] * spec_of(small).sizes.get("layers", 0)
    return _with_derived(small, big, _expansions(small, big, recipe, distances), recipe)


def norm_eps(small: Model, big: Model, recipe: str) -> float:
    """The RMSNorm eps of the target with which the recipe is exact (`derived`).

    Args:
      small: the model before.
      big: the model after; its own eps is not used.
      recipe: names of operators.

    Returns:
      The eps; 0.0 for a model without RMSNorm.

    Raises:
      UserError: the recipe cannot grow `small` to `big`.
    """
    distances = [0.0] * spec_of(small).sizes.get("layers", 0)
    expansions = _expansions(small, big, recipe, distances)
    return _needed_eps(spec_of(small).norm_eps, expansions, recipe) or 0.0


def _expansions(
    small: Model, big: Model, recipe: str, distances: Sequence[float]
) -> tuple[Expansion, ...]:
    """The recipe's expansions for two models."""
    before, after = spec_of(small), spec_of(big)
    if isinstance(small, TransformerConfig) and len(set(small.kinds)) > 1:
        distances = [0.0] * small.num_layers  # see `derived`
    return operators.expansions(
        recipe, before.sizes, after.sizes, distances, axes.normed_axes(before.table)
    )


def _with_derived(
    small: Model, big: AnyModel, expansions: Sequence[Expansion], recipe: str
) -> AnyModel:
    """Sets the target's fields that follow from these expansions."""
    if isinstance(small, TransformerConfig) and isinstance(big, TransformerConfig):
        big = dataclasses.replace(big, **_derived_kinds(small, big, expansions))
    old, given = spec_of(small).norm_eps, spec_of(big).norm_eps
    big = _with_norm_eps(big, old, given, expansions, recipe)
    if isinstance(small, TransformerConfig) and isinstance(big, TransformerConfig):
        of_small, of_big = (m.qk_norm_eps or m.rms_norm_eps for m in (small, big))
        if small.qk_norm != "none" and of_small != of_big:
            raise UserError(
                f"growth from qk_norm_eps {of_small} to {of_big}: it is part of every layer's "
                f"function; set qk_norm_eps to {of_small}"
            )
    return big


def _derived_kinds(
    small: TransformerConfig, big: TransformerConfig, expansions: Sequence[Expansion]
) -> dict[str, Any]:
    """The target's `layer_kinds`, if they are not as given."""
    grown = [e for e in expansions if e.axis == "layers"]
    if not grown or not small.num_layers:
        return {}
    index = grown[0].index.tolist()
    kinds = tuple(
        small.kinds[source] if source != NEW else big.kinds[layer]
        for layer, source in enumerate(index)
    )
    if kinds == big.kinds:
        return {}
    if big.layer_kinds != small.layer_kinds:
        raise UserError(
            f"growth from layer_kinds {small.layer_kinds} to {big.layer_kinds}: by this recipe the "
            f"layers come from layers {index}, whose kinds are {kinds}; leave the target's at "
            f"{small.layer_kinds}, and the plan sets it"
        )
    return {"layer_kinds": kinds}


def _needed_eps(eps: float | None, expansions: Sequence[Expansion], recipe: str) -> float | None:
    """The eps with which these expansions are exact, for a source with `eps`."""
    for e in expansions:
        if e.gain != 1:
            if eps is None:
                raise UserError(
                    f"growth of axis {e.axis!r} from {e.source} to {e.target}: recipe {recipe!r} "
                    "adds zeros, which only RMSNorm can compensate, and the model has another norm "
                    "(ModelSpec.norm_eps is None); use operator 'tile'"
                )
            return eps * int((~e.new).sum()) / e.target
    return eps


def _with_norm_eps(
    big: AnyModel,
    old: float | None,
    given: float | None,
    expansions: Sequence[Expansion],
    recipe: str,
) -> AnyModel:
    """Gives the target the eps that the recipe needs, unless it has it.

    Raises UserError if the target's eps is neither that nor the source's.
    """
    needed = _needed_eps(old, expansions, recipe)
    if needed is None or given is None:
        if needed is not given:
            raise UserError(
                f"plan: norm_eps is {old} in small and {given} in big; give None to both or a "
                "number to both"
            )
        return big
    if math.isclose(needed, given, rel_tol=1e-12):
        return big
    if given != old:
        raise UserError(
            f"growth from rms_norm_eps {old} to {given}: recipe {recipe!r} keeps the norms exact "
            f"with {needed!r}; leave the target's at {old}, and the plan sets it"
        )
    return with_norm_eps(big, needed)
