"""Settings of how a model is computed, which do not change its function.

What the backward pass keeps of a layer is a *policy*:

    none    everything
    dots    results of products of activations with weights; the rest is computed again
    full    the layer's input only
    NAMES   the named activations, joined with +, as in "qkv+attended"; the rest again

A group of layers can have a policy of its own: "dots:0-23,full:24-".
"""

from __future__ import annotations

import dataclasses
import re

from flm_jax.checks import require
from flm_jax.mapping import Checked

REMAT_POLICIES = ("none", "dots", "full")
# Activations that a policy can keep (`models/layers.py` names them). Per token, with N = K G heads
# of size H: qkv (N + 2 K) H values, attended N H, gate_up 2 F, branches 2 D.
REMAT_NAMES = ("qkv", "attended", "gate_up", "branches")


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Layers that follow each other and share a policy: `first` to `end` - 1."""

    policy: str
    first: int
    end: int


def parse_remat(remat: str, name: str) -> list[tuple[str, int, int | None]]:
    """The policies of a text such as "dots:0-2,full:3-", each with its first and last layer.

    Args:
      remat: one policy for all layers, or POLICY:FIRST-LAST joined with commas; the last group may
        leave out LAST.
      name: the field, for errors.

    Raises:
      UserError: a policy is unknown.

    >>> parse_remat("dots:0-2,full:3-", "remat")
    [('dots', 0, 2), ('full', 3, None)]
    """
    groups: list[tuple[str, int, int | None]] = []
    for part in [remat] if ":" not in remat else remat.split(","):
        match = re.fullmatch(r"([a-z_+]+)(?::(\d+)-(\d*))?", part)
        policy = match[1] if match else ""
        require(
            policy in REMAT_POLICIES or all(x in REMAT_NAMES for x in policy.split("+")),
            f"{name} has {part!r}; give {', '.join(REMAT_POLICIES)}, or names joined with + "
            f"({', '.join(REMAT_NAMES)}), each with :FIRST-LAST if groups of layers differ",
        )
        assert match is not None
        groups.append((policy, int(match[2] or 0), int(match[3]) if match[3] else None))
    return groups


def layer_groups(remat: str, num_layers: int) -> tuple[LayerGroup, ...]:
    """The groups of layers that share a policy.

    Args:
      remat: as for `parse_remat`.
      num_layers: the model's layers.

    Returns:
      The groups in order; together they are all layers.

    Raises:
      UserError: a policy is unknown, or the groups are not all layers in order.

    >>> layer_groups("dots:0-2,full:3-", 8)
    (LayerGroup(policy='dots', first=0, end=3), LayerGroup(policy='full', first=3, end=8))
    """
    groups = tuple(
        LayerGroup(policy, first, num_layers if last is None else last + 1)
        for policy, first, last in parse_remat(remat, "TransformerConfig.remat")
    )
    ends = [0, *(group.end for group in groups)]
    follow = ends == [*(group.first for group in groups), num_layers]
    filled = num_layers == 0 or all(group.first < group.end for group in groups)
    require(
        follow and filled,
        f"TransformerConfig.remat is {remat!r}, and the model has {num_layers} layers; give groups "
        "that follow each other from 0 on, the last one open, as in 'dots:0-3,full:4-'",
    )
    return groups


@dataclasses.dataclass(frozen=True)
class SplashConfig(Checked):
    """Tile sizes of the TPU's attention kernel, in tokens; 0: the largest of 512, 256 and 128.

    All must be multiples of 128 that divide the sequence length.

    Raises:
      UserError: a size is no multiple of 128.
    """

    block_q: int = 0  # queries of one step, forward
    block_kv: int = 0  # keys that are fetched in one step
    block_kv_compute: int = 0  # keys that are multiplied at once; divides block_kv
    block_q_backward: int = 0  # the same, backward
    block_kv_backward: int = 0
    block_kv_compute_backward: int = 0

    TILE = 128  # of the TPU's vector registers

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, size in self._sizes().items():
            require(
                size >= 0 and size % self.TILE == 0,
                f"SplashConfig.{name} is {size}; give a multiple of {self.TILE}, or 0",
            )

    def _sizes(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def blocks(self, length: int) -> dict[str, int]:
        """All sizes, for sequences of this length, which is a multiple of 128.

        Raises:
          UserError: a size does not divide the length, or the sizes do not fit each other.
        """
        default = next(size for size in (512, 256, self.TILE) if length % size == 0)
        chosen: dict[str, int] = {}
        for name, size in self._sizes().items():
            chosen[name] = size or default
            require(
                length % chosen[name] == 0,
                f"SplashConfig.{name} is {size}, which does not divide the sequence length "
                f"{length}; change one",
            )
        for suffix in ("", "_backward"):
            fetched, used = (chosen[f"block_kv{x}{suffix}"] for x in ("", "_compute"))
            require(
                fetched % used == 0,
                f"SplashConfig: for length {length}, block_kv{suffix} is {fetched} and "
                f"block_kv_compute{suffix} {used}; the second must divide the first",
            )
        return chosen
