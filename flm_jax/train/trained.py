"""Which entries a stage trains, and how fast (docs/growth.md, "What a stage trains").

One rule gives every entry a factor on its learning rate:

    parameter not in `train_paths`            0
    some slot of the entry was just added     1
    all slots of the entry are old            `growth.old_rate`

With factor 0 an entry is frozen: it keeps its bits, and is not decayed. Its moments and ages go on
as if its learning rate were 0, so that a later stage can train it without a start of its own. Only
entries that train count in the norm that is clipped.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax.config import StageConfig
from flm_jax.errors import UserError
from flm_jax.params import mup, trees
from flm_jax.params.axes import ModelSpec
from flm_jax.train.slots import combined

AddedSlots = Mapping[str, np.ndarray]  # kind of slot -> bool [size]: added by the stage's growth


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a stage trains.

    Attributes:
      stage: the stage's name, for errors.
      spec: its model.
      paths: the parameters that train.
      old_rate: factor on the learning rate of entries all of whose slots are old.
    """

    stage: str
    spec: ModelSpec
    paths: frozenset[str]
    old_rate: float

    @classmethod
    def of(cls, stage: StageConfig) -> Trained:
        """Reads what a stage trains from its config.

        Raises:
          UserError: a pattern of `train_paths` matches no parameter.
        """
        spec = mup.spec(stage.model)
        paths: set[str] = set()
        for pattern in stage.train_paths or ("*",):
            found = fnmatch.filter(spec.table, pattern)
            if not found:
                raise UserError(
                    f"stage {stage.name}: train_paths has {pattern!r}, which matches no "
                    f"parameter; the model has {', '.join(spec.table)}"
                )
            paths.update(found)
        return cls(stage.name, spec, frozenset(paths), stage.growth.old_rate)

    @property
    def everything(self) -> bool:
        """Whether every entry trains at the stage's rate."""
        return self.old_rate == 1 and len(self.paths) == len(self.spec.table)

    def check(self, added: AddedSlots | None) -> None:
        """Checks the slots that the stage's growth added.

        Args:
          added: the slots; None: the stage did not grow.

        Raises:
          UserError: the stage has an `old_rate` and did not grow, the vectors do not fit the model,
            or nothing would train.
        """
        if self.old_rate == 1:
            return
        rate = f"stage {self.stage}: growth.old_rate is {self.old_rate}"
        if added is None:
            raise UserError(
                f"{rate}, but without a growth all slots are old; set it to 1, and train_paths to "
                "the parameters to train (make_train_step takes the added slots of a growth as "
                "`added`)"
            )
        have = {kind: len(slots) for kind, slots in added.items()}
        want = {kind: self.spec.count(kind) for kind in self.spec.slots}
        if have != want:
            raise UserError(
                f"{rate}, and the added slots have sizes {have}, but the model has {want}; give "
                "growth.added_slots of the plan that grew it"
            )
        slots = (added[kind] for path in self.paths for kind in self.spec.table[path].slots)
        if self.old_rate == 0 and not any(x.any() for x in slots):
            raise UserError(
                f"{rate}, and its growth adds no slot to {', '.join(sorted(self.paths))}, so that "
                "nothing would train; set old_rate above 0, or grow an axis of these"
            )

    def rate(self, path: str, added: AddedSlots | None) -> Any:
        """The factor on the learning rate of a parameter's entries.

        Args:
          path: the parameter.
          added: the slots that the stage's growth added.

        Returns:
          A number, or an array that broadcasts to the parameter's shape.
        """
        if path not in self.paths:
            return 0.0
        if self.old_rate == 1:
            return 1.0
        self.check(added)
        assert added is not None
        param = self.spec.table[path]
        is_added = combined(self.spec, param, added, jnp.logical_or) if param.slots else False
        return jnp.where(is_added, 1.0, self.old_rate)

    def norm(self, grads: Any, added: AddedSlots | None) -> jax.Array:
        """The global norm of the gradients (nested dicts) of all entries that train."""
        kept = {
            path: jnp.where(self.rate(path, added) > 0, g, jnp.zeros((), g.dtype))
            for path, g in trees.flatten(grads)
        }
        norm: jax.Array = optax.tree.norm(grads if self.everything else kept)
        return norm

    def scaled(self, updates: Any, added: AddedSlots | None) -> Any:
        """Multiplies updates (nested dicts) by the factor of each entry."""
        if self.everything:
            return updates

        def scaled(path: str, update: jax.Array) -> jax.Array:
            rate = jnp.asarray(self.rate(path, added), update.dtype)
            # Adding -0.0 changes no value's bits; adding 0.0 would change those of -0.0.
            return jnp.where(rate > 0, rate * update, jnp.asarray(-0.0, update.dtype))

        return trees.unflatten({path: scaled(path, u) for path, u in trees.flatten(updates)})


def clip_by_trained_norm(
    max_norm: float, trained: Trained
) -> optax.GradientTransformationExtraArgs:
    """Scales all gradients so that the norm of those that train is at most `max_norm`.

    It is `optax.clip_by_global_norm` with another norm. Gradients of frozen entries are scaled
    alike; only their moments see them.

    Args:
      max_norm: the largest norm.
      trained: what the stage trains.

    Returns:
      The transformation; its update takes `added` (`Trained.rate`).
    """

    def update(
        grads: Any, state: optax.EmptyState, params: Any = None, **extra: Any
    ) -> tuple[Any, optax.EmptyState]:
        del params
        norm = trained.norm(grads, extra.get("added"))

        def clipped(g: jax.Array) -> jax.Array:
            return jnp.where(norm < max_norm, g, g / norm.astype(g.dtype) * max_norm)

        return jax.tree.map(clipped, grads), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def at_trained_rate(
    tx: optax.GradientTransformation, trained: Trained
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the updates of `tx` by the factor of each entry.

    Args:
      tx: makes the updates. The result has its state, so that a stage reads the optimizer state of
        a stage that trains something else.
      trained: what the stage trains.

    Returns:
      The transformation; its update takes `added` (`Trained.rate`).
    """

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return trained.scaled(updates, extra.get("added")), state

    return optax.GradientTransformationExtraArgs(tx.init, update)
