"""The named recipes: which expansion each axis gets.

`msg`, Masked Structural Growth (arXiv 2305.02869; Tele-FLM-1T uses it, arXiv 2407.02783), adapted
to a pre-norm block without biases. Added slots are hidden behind run-time masks that rise from 0
to 1, so new entries may be anything: they are drawn as a fresh model of the target's size would
be. RMSNorm is the reason for masks inside the norms: zero slots would change its mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from flm_jax.growth import depth
from flm_jax.growth.expansion import Expansion, append_new, from_index


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to do on each axis.

    exactness: "EXACT" if the function is unchanged right after the growth.
    widths: axis -> (axis, old size, new size) -> Expansion.
    layers: (distances, new number of layers) -> layer map; its copies are masked if `masked`.
    """

    name: str
    exactness: str
    widths: Mapping[str, Callable[[str, int, int], Expansion]]
    layers: Callable[[Sequence[float], int], list[int]]
    masked: bool

    def expansion(
        self, axis: str, source: int, target: int, distances: Sequence[float]
    ) -> Expansion | None:
        """The axis's expansion, or None if the recipe cannot grow that axis."""
        if axis == "layers":
            index = self.layers(distances, target)
            return from_index(axis, source, index, masked=self.masked)
        return self.widths[axis](axis, source, target) if axis in self.widths else None


def _masked_append(axis: str, source: int, target: int) -> Expansion:
    return append_new(axis, source, target, masked=True)


RECIPES: dict[str, Recipe] = {
    "msg": Recipe(
        name="msg",
        exactness="EXACT",
        widths=dict.fromkeys(("embed", "mlp", "kv_heads", "q_per_kv"), _masked_append),
        layers=depth.beside_smallest,
        masked=True,
    ),
}
