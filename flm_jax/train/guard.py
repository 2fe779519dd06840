"""Guards of train steps: are numbers finite, and which state is kept if they are not."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether all entries of all floating-point leaves are finite."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]).all()


def chosen(finite: jax.Array, new: Tree, old: Tree) -> Tree:
    """Returns the new leaves if `finite`, and otherwise the old ones.

    The choice is made inside the compiled step, for each leaf: the donated state is still there,
    and XLA needs no second copy of it. Single numbers (steps done, exponents that follow from them)
    are always the new ones: a step that is skipped counts, so that schedules, ages and the position
    in the data stay together.

    Args:
      finite: the choice.
      new: parameters and an optimizer's state.
      old: the same before the step.
    """

    def choose(x: jax.Array, before: jax.Array) -> jax.Array:
        return x if x.ndim == 0 else jnp.where(finite, x, before)

    kept: Tree = jax.tree.map(choose, new, old)
    return kept
