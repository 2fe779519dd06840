"""Draws what operators do to one matrix and to its gradient.

  flm growth draw --output=docs/growth.png

Each operator grows the same tiny matrix: values above, gradients below.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from flm_jax.commands.command import Call, Command, flag
from flm_jax.runtime import paths


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    output: str = flag("docs/growth.png", "The figure's path.")


# (recipe, width, units): `down` reads 3 units and writes a stream of 4.
PANELS = (
    ("msg", 6, 5),
    ("zero_pad", 6, 5),
    ("tile", 8, 6),
    ("tile_pad", 10, 7),
    ("uneven", 4, 6),
    ("net2net", 4, 5),
)


def main(call: Call[Flags]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from flm_jax import growth
    from flm_jax.config import TransformerConfig
    from flm_jax.growth.apply import grow_value
    from flm_jax.growth.expansion import any_slot
    from flm_jax.growth.moments import grow_moment
    from flm_jax.params import axes
    from flm_jax.runtime import figures

    path = "layers/mlp/down"
    small = TransformerConfig(
        vocab_size=8, num_layers=1, d_model=4, num_heads=1, head_dim=4, d_ff=3
    )
    param = axes.table(small)[path]
    x = jnp.linspace(0.4, 1.0, 12).reshape(1, 3, 4)
    figure, panels = figures.plt.subplots(2, len(PANELS), figsize=(13, 4.6))
    for column, (recipe, width, units) in zip(panels.T, PANELS, strict=True):
        big = dataclasses.replace(small, d_model=width, d_ff=units)
        plan = growth.plan(small, big, recipe)
        dual = dataclasses.replace(plan, moments="dual")
        value = np.array(grow_value(x, path, plan, jax.random.key(0))[0])
        gradient = np.array(grow_moment(x, path, dual, power=1)[0])
        new = any_slot(param, plan.by_axis, lambda e, role: e.new)
        fresh = np.zeros(value.shape, bool)
        if new is not None:
            fresh = np.array(jnp.broadcast_to(new[0], value.shape)) & (value != 0)
        names = (f"{recipe}\nvalue", "gradient")
        for panel, matrix, name in zip(column, (value, gradient), names, strict=True):
            shown = np.ma.masked_where(matrix == 0, matrix)
            panel.set_facecolor("#f2f2f2")
            if panel is column[0]:
                shown = np.ma.masked_where(fresh, shown)
                grey = np.ma.masked_where(~fresh, np.ones_like(matrix))
                panel.imshow(grey, cmap="gray", vmin=0, vmax=1.7)
            panel.imshow(shown, cmap="viridis", vmin=0, vmax=1)
            panel.axhline(2.5, color="white", linewidth=1.5)
            panel.axvline(3.5, color="white", linewidth=1.5)
            panel.set(title=name, xticks=[], yticks=[])
        column[1].set_xlabel("writes the stream")
    for row in panels:
        row[0].set_ylabel("reads units")
    figures.save(figure, paths.of(call.flags.output, "output"))
    return {"figure": call.flags.output}


COMMAND = Command(main, Flags, config="none")
