"""Figures of the µP studies (`mup.py`)."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from flm_jax.runtime.figures import ACCENT, GUIDE, LINE, clean, plt, save

_NAMES = {"mup": "µP", "completep": "CompleteP", "sp": "standard"}


def draw_coordinates(found: dict[str, Any], axis: str, path: pathlib.Path) -> None:
    """Size of each activation's change after the last step, against the width or the depth."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for panel, (parametrisation, result) in zip(panels, found.items(), strict=True):
        colors = plt.get_cmap("viridis")
        names = list(result["changes"])
        for n, name in enumerate(names):
            ys = [steps[-1] for steps in result["changes"][name]]
            color = ACCENT if name == "logits" else colors(0.85 * n / len(names))
            panel.plot(result[f"{axis}s"], ys, marker="o", markersize=3, color=color, label=name)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(result[f"{axis}s"], [str(size) for size in result[f"{axis}s"]])
        steepest = result["max_slope"]
        panel.set(title=f"{_NAMES[parametrisation]}: steepest slope {steepest:+.2f}")
        panel.set_xlabel("width (d_model)" if axis == "width" else "depth (layers)")
        clean(panel)
    panels[0].set_ylabel("root mean square of the change (activation)")
    panels[1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def draw_sweep(found: dict[str, Any], axis: str, path: pathlib.Path) -> None:
    """Validation bits per byte against each hyper-parameter, a line for every width or depth."""
    panels_of = [(p, name) for p, names in found.items() for name in names]
    figure, panels = plt.subplots(
        1, len(panels_of), figsize=(3.3 * len(panels_of), 3.4), squeeze=False
    )
    for panel, (parametrisation, name) in zip(panels[0], panels_of, strict=True):
        result = found[parametrisation][name]
        sizes = list(result["bpb"])
        for n, size in enumerate(sizes):
            color = plt.get_cmap("viridis")(0.8 * n / max(len(sizes) - 1, 1))
            ys = [np.nan if y is None else y for y in result["bpb"][size]]
            errors = [e or 0 for e in result["bpb_errors"][size]]
            panel.errorbar(
                result["grid"], ys, errors, marker="o", markersize=3, color=color, label=str(size)
            )
            best = result["grid"].index(result["best"][size])
            panel.plot(result["grid"][best], ys[best], "o", color=ACCENT, markersize=6)
        panel.set_xscale("log", base=2)
        panel.set(
            title=f"{_NAMES[parametrisation]}: {name}", xlabel=f"{name} over the proxy's (ratio)"
        )
        clean(panel)
    panels[0][0].set_ylabel("validation bits per byte")
    panels[0][0].legend(title=axis, fontsize=7, frameon=False)
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
    panels[0].set_ylabel("root mean square of updates (parameter)")
    panels[-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)
