"""A growth as data: `plan` compiles the difference of two configs, `grow` applies it.

The same plan maps parameters, optimizer state and slot ages, arrays and `ShapeDtypeStruct`s
(through `jax.eval_shape`), and is stored with the checkpoint that it made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax import axes, mup
from flm_jax import config as config_lib
from flm_jax.config import TransformerConfig
from flm_jax.errors import UserError
from flm_jax.growth.expansion import Expansion, Run, expand
from flm_jax.growth.operators import RECIPES
from flm_jax.optim import SlotAdamState
from flm_jax.state import TrainState

VERSION = 1
Tree = TypeVar("Tree")

# Fields that growth must not touch: each changes the function in a way no expansion undoes.
_KEPT = ("head_dim", "rope_theta", "rms_norm_eps", "vocab_size")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a model of config `source` becomes one of config `target`."""

    recipe: str
    source: TransformerConfig
    target: TransformerConfig
    expansions: tuple[Expansion, ...]  # of the axes that grow

    @property
    def by_axis(self) -> dict[str, Expansion]:
        return {e.axis: e for e in self.expansions}

    @property
    def exactness(self) -> str:
        return RECIPES[self.recipe].exactness

    @property
    def layer_map(self) -> tuple[int, ...]:
        """The source layer of every layer of the target."""
        e = self.by_axis.get("layers")
        return tuple(range(self.source.num_layers)) if e is None else tuple(e.index.tolist())

    def value_scale(self, param: axes.Param) -> float:
        """Keeps `multiplier * parameter` when the config's multiplier changes between sizes."""
        return axes.multiplier_of(param, self.source) / axes.multiplier_of(param, self.target)

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
        return json.dumps({"version": VERSION, **config_lib.to_dict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises UserError on another version of the format."""
        data = json.loads(text)
        if (version := data.pop("version", None)) != VERSION:
            raise UserError(f"plan: version {version}, but this code reads version {VERSION}")
        return cls(
            recipe=data["recipe"],
            source=config_lib.from_mapping(TransformerConfig, data["source"], "plan.source"),
            target=config_lib.from_mapping(TransformerConfig, data["target"], "plan.target"),
            expansions=tuple(
                Expansion(e["axis"], e["source"], tuple(Run(**r) for r in e["runs"]), e["masked"])
                for e in data["expansions"]
            ),
        )

    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def plan(
    small: TransformerConfig,
    big: TransformerConfig,
    recipe: str = "msg",
    *,
    layer_distances: Sequence[float] | None = None,
) -> Plan:
    """Compiles the difference of two configs into one expansion per axis.

    Args:
      small: the model as it is.
      big: the model as it shall be; no axis smaller.
      recipe: a name of `operators.RECIPES`.
      layer_distances: how far each layer of `small` is from the identity; new layers go beside
        the closest. None: all equal, so that the first layers are copied.

    Raises:
      UserError: naming the field and both values, if the recipe cannot do it.
    """
    if recipe not in RECIPES:
        raise UserError(f"growth.recipe is {recipe!r}; choose one of {', '.join(sorted(RECIPES))}")
    for name in _KEPT:
        old, new = getattr(small, name), getattr(big, name)
        if old != new:
            raise UserError(
                f"growth from {name} {old} to {new}: recipe {recipe!r} keeps it; set the target's "
                f"{name} to {old}"
            )
    distances = [0.0] * small.num_layers if layer_distances is None else list(layer_distances)
    if len(distances) != small.num_layers:
        raise UserError(
            f"layer_distances has {len(distances)} entries for {small.num_layers} layers; give "
            "one for each layer of the source"
        )
    sizes = axes.axis_sizes(big)
    expansions = []
    for axis, source in axes.axis_sizes(small).items():
        target = sizes[axis]
        if target < source:
            raise UserError(
                f"growth of axis {axis!r} from {source} to {target}: a target is never smaller "
                f"than its source; set it to {source} or more"
            )
        if target == source:
            continue
        e = RECIPES[recipe].expansion(axis, source, target, distances)
        if e is None:
            raise UserError(
                f"growth of axis {axis!r} from {source} to {target}: recipe {recipe!r} cannot "
                "grow it"
            )
        expansions.append(e)
    return Plan(recipe, small, big, tuple(expansions))


def grow(tree: Tree, plan: Plan, key: jax.Array) -> Tree:
    """Expands a parameter tree or a whole train state by a plan.

    Old slots keep their parameters and moments. Added slots get fresh parameters (copies: their
    source's), zero moments, and their own step count, which starts now.

    Args:
      tree: parameters (nested dicts as in `axes.PARAMS`) or a `TrainState` of config `plan.source`.
      plan: from `plan`.
      key: of the fresh entries; the result depends on it and the inputs alone.

    Returns: the same kind of tree at the size of `plan.target`.

    Raises:
      UserError: the tree is not of `plan.source`.
    """
    if not isinstance(tree, TrainState):
        return _grow_params(tree, plan, key)
    grown_opt = jax.tree.map(
        lambda node: _grow_moments(node, plan) if isinstance(node, SlotAdamState) else node,
        tree.opt_state,
        is_leaf=lambda node: isinstance(node, SlotAdamState),
    )
    params = _grow_params(tree.params, plan, key)
    return dataclasses.replace(tree, params=params, opt_state=grown_opt)


def _checked(tree: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    leaves = dict(axes.flatten(tree))
    expected = {path: param.shape(plan.source) for path, param in axes.TABLE.items()}
    for path in dict.fromkeys([*expected, *leaves]):
        have = leaves[path].shape if path in leaves else "missing"
        if have != expected.get(path, "absent"):
            raise UserError(
                f"grow: parameter {path!r} is {have}, the plan's source has "
                f"{expected.get(path, 'no such parameter')}; use the plan made for this state"
            )
    return leaves


def _grow_params(tree: Any, plan: Plan, key: jax.Array) -> Any:
    grown = {}
    for path, x in _checked(tree, plan).items():
        param = axes.TABLE[path]
        leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        fresh = mup.initializer(param, plan.target)(leaf_key, param.shape(plan.target), x.dtype)
        old = x * jnp.asarray(plan.value_scale(param), x.dtype)
        grown[path] = expand(old, param, plan.by_axis, fill=fresh)
    return axes.unflatten(grown)


def _grow_moments(state: SlotAdamState, plan: Plan) -> SlotAdamState:
    """Moments by the dual map; the second moment by its square. Added slots start at zero."""

    def mapped(tree: Any, power: int) -> Any:
        grown = {}
        for path, x in _checked(tree, plan).items():
            param = axes.TABLE[path]
            old = x * jnp.asarray(plan.value_scale(param) ** -power, x.dtype)
            grown[path] = expand(
                old, param, plan.by_axis, dual=True, power=power, keep_copies=False
            )
        return axes.unflatten(grown)

    def born(axis: str, old: jax.Array) -> jax.Array:
        e = plan.by_axis.get(axis)
        if e is None:
            return old
        return jnp.where(e.added, state.steps, jnp.take(old, np.maximum(e.index, 0)))

    return SlotAdamState(
        steps=state.steps,
        mu=mapped(state.mu, 1),
        nu=mapped(state.nu, 2),
        born={axis: born(axis, old) for axis, old in state.born.items()},
    )
