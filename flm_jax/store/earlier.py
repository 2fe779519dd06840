"""Train states in the layout of earlier versions: read as today's, never written.

Until multipliers had rows (`SlotAdamState.created`), a slot was only known to have a source or not,
and ages were kept for each axis, also for the two axes of the query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from flm_jax.params.axes import QUERY_HEADS
from flm_jax.train.optim import SlotAdamState

Tree = TypeVar("Tree")


class EarlierSlotAdamState(NamedTuple):
    """The earlier `SlotAdamState`."""

    steps: Any
    mu: Any
    nu: Any
    born: Any  # axis -> int32 [size]
    share: Any  # axis -> [size]
    sourced: Any  # axis -> [size]: 1, or 0 for slots without a source
    step_scale: Any  # [parameters]
    eps_scale: Any  # [parameters]


def as_stored(like: Tree, stored: Mapping[str, jax.ShapeDtypeStruct]) -> Tree:
    """Gives an abstract state the layout that a checkpoint has.

    The number of rows of the multipliers depends on the growths behind a state, not on its config.

    Args:
      like: `ShapeDtypeStruct`s of a state.
      stored: the checkpoint's leaves by name (`checkpoint.shapes`).

    Returns:
      `like` with the checkpoint's rows, or with its earlier optimizer state.
    """
    name = next((name for name in stored if name.endswith("/step_scale")), None)
    if name is None:
        return like
    prefix, shape = name.removesuffix("step_scale"), stored[name].shape

    def fitted(node: Any) -> Any:
        if not isinstance(node, SlotAdamState):
            return node

        def struct(x: Any, shape: tuple[int, ...]) -> Any:
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)

        if len(shape) == 1:
            scale = struct(node.step_scale, node.step_scale.shape[1:])
            sizes = {
                path.removeprefix(f"{prefix}born/"): x.shape
                for path, x in stored.items()
                if path.startswith(f"{prefix}born/")
            }
            born = {axis: struct(node.steps, size) for axis, size in sizes.items()}
            share = {axis: struct(node.step_scale, size) for axis, size in sizes.items()}
            return EarlierSlotAdamState(
                node.steps, node.mu, node.nu, born, share, share, scale, scale
            )

        def rows(x: Any) -> Any:
            return struct(x, (shape[0], *x.shape[1:]))

        return node._replace(
            share={kind: rows(x) for kind, x in node.share.items()},
            step_scale=rows(node.step_scale),
            eps_scale=rows(node.eps_scale),
        )

    return _on_adam(fitted, like)


def upgraded(state: Tree) -> Tree:
    """Turns an earlier optimizer state inside a state into today's; keeps everything else."""

    def of(node: Any) -> Any:
        return _upgraded(node) if isinstance(node, EarlierSlotAdamState) else node

    return _on_adam(of, state)


def _on_adam(function: Callable[[Any], Any], tree: Tree) -> Tree:
    def is_adam(node: Any) -> bool:
        return isinstance(node, SlotAdamState | EarlierSlotAdamState)

    mapped: Tree = jax.tree.map(function, tree, is_leaf=is_adam)
    return mapped


@jax.jit
def _slots(earlier: EarlierSlotAdamState) -> dict[str, Any]:
    """All of today's fields but the moments."""
    born, share = dict(earlier.born), dict(earlier.share)
    created = {axis: (x == 0).astype(jnp.int32) for axis, x in earlier.sourced.items()}
    for by_axis, combine in ((born, jnp.maximum), (created, jnp.maximum), (share, jnp.multiply)):
        groups, queries = (by_axis[axis] for axis in QUERY_HEADS)
        by_axis["query_heads"] = combine(groups[:, None], queries[None]).reshape(-1)
        del by_axis["q_per_kv"]

    def rows(x: jax.Array) -> jax.Array:
        return jnp.stack([x, jnp.ones_like(x)])

    return {
        "steps": earlier.steps,
        "born": born,
        "created": created,
        "share": {kind: rows(x) for kind, x in share.items()},
        "step_scale": rows(earlier.step_scale),
        "eps_scale": rows(earlier.eps_scale),
        "kept": jnp.ones((), earlier.step_scale.dtype),
    }


def _upgraded(earlier: EarlierSlotAdamState) -> SlotAdamState:
    slots = _slots(earlier._replace(mu={}, nu={}))
    return SlotAdamState(mu=earlier.mu, nu=earlier.nu, **slots)
