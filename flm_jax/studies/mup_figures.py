"""Figures of the µP studies (`mup.py`)."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from flm_jax.runtime.figures import ACCENT, GUIDE, LINE, clean, plt, save

_NAMES = {"mup": "µP", "sp": "standard"}


def draw_coordinates(found: dict[str, Any], path: pathlib.Path) -> None:
    """Size of each activation's change after the last step, against the width."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for panel, (parametrisation, result) in zip(panels, found.items(), strict=True):
        colors = plt.get_cmap("viridis")
        names = list(result["changes"])
        for n, name in enumerate(names):
            ys = [steps[-1] for steps in result["changes"][name]]
            color = ACCENT if name == "logits" else colors(0.85 * n / len(names))
            panel.plot(result["widths"], ys, marker="o", markersize=3, color=color, label=name)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(result["widths"], [str(w) for w in result["widths"]])
        steepest = result["max_slope"]
        panel.set(
            title=f"{_NAMES[parametrisation]}: steepest slope {steepest:+.2f}", xlabel="width"
        )
        clean(panel)
    panels[0].set_ylabel("root mean square of the change")
    panels[1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def draw_sweep(found: dict[str, Any], path: pathlib.Path) -> None:
    """Validation bits per byte against each hyper-parameter, a line for every width."""
    panels_of = [(p, name) for p, names in found.items() for name in names]
    figure, panels = plt.subplots(
        1, len(panels_of), figsize=(3.3 * len(panels_of), 3.4), squeeze=False
    )
    for panel, (parametrisation, name) in zip(panels[0], panels_of, strict=True):
        result = found[parametrisation][name]
        widths = list(result["bpb"])
        for n, width in enumerate(widths):
            color = plt.get_cmap("viridis")(0.8 * n / max(len(widths) - 1, 1))
            ys = [np.nan if y is None else y for y in result["bpb"][width]]
            panel.plot(result["grid"], ys, marker="o", markersize=3, color=color, label=str(width))
            best = result["grid"].index(result["best"][width])
            panel.plot(result["grid"][best], ys[best], "o", color=ACCENT, markersize=6)
        panel.set_xscale("log", base=2)
        panel.set(title=f"{_NAMES[parametrisation]}: {name}", xlabel="times the proxy's")
        clean(panel)
    panels[0][0].set_ylabel("validation bits per byte")
    panels[0][0].legend(title="width", fontsize=7, frameon=False)
    save(figure, path)


def draw_growth(found: dict[str, Any], path: pathlib.Path) -> None:
    """Sizes of updates by role from the growth on, against a model of the target's width."""
    reference = found["reference"]
    figure, panels = plt.subplots(
        1, len(reference), figsize=(3.7 * len(reference), 3.4), sharex=True
    )
    colors = {"msg": LINE, "zero_pad": ACCENT, "tile": "#3a8a4d"}
    for panel, (kind, always) in zip(panels, reference.items(), strict=True):
        panel.plot(always, color=GUIDE, linewidth=3, alpha=0.5, label="always the target's width")
        for recipe, arm in found["arms"].items():
            panel.plot(arm["sizes"][f"{kind} old"], color=colors[recipe], label=f"{recipe}, old")
            panel.plot(
                arm["sizes"][f"{kind} added"], "--", color=colors[recipe], label=f"{recipe}, added"
            )
        panel.axvline(found["ramp_steps"], color=GUIDE, linewidth=1, linestyle=":")
        panel.set_yscale("log")
        panel.set(title=f"{kind}-like" if kind != "readout" else kind, xlabel="steps since growth")
        clean(panel)
    panels[0].set_ylabel("root mean square of updates")
    panels[-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)
