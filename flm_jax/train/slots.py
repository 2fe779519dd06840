"""Numbers of slots, combined to numbers of a parameter's entries."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flm_jax.params.axes import ModelSpec, Param, Role


def combined(
    spec: ModelSpec,
    param: Param,
    vectors: Mapping[str, Any],
    combine: Callable[[jax.Array, jax.Array], jax.Array],
    applies: Callable[[Param, str, Role], bool] = lambda param, axis, role: True,
) -> jax.Array:
    """Combines per-slot vectors by broadcasting, over the slots that `applies` picks.

    Args:
      spec: the model.
      param: the parameter.
      vectors: kind of slot (`Param.slots`) -> [size].
      combine: joins the numbers of two of an entry's slots.
      applies: (parameter, axis, role) -> whether the slots on this axis count.

    Returns:
      An array that broadcasts to the parameter's shape; ones if no slot counts.
    """
    parts = []
    for kind, dims in param.slots.items():
        if applies(param, param.axes[dims[0]], param.roles[dims[0]]):
            shape = [spec.sizes[a] if d in dims else 1 for d, a in enumerate(param.axes)]
            parts.append(jnp.asarray(vectors[kind]).reshape(shape))
    one = jnp.ones((1,) * len(param.axes), jax.tree.leaves(vectors)[0].dtype)
    return functools.reduce(combine, parts) if parts else one
