"""How figures look: drawn without a screen, one hue for what is measured, grey for guides."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["ACCENT", "GUIDE", "LINE", "clean", "plt", "save"]

LINE, GUIDE, ACCENT = "#2458a6", "#9a9a9a", "#c4501b"


def clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Any, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
