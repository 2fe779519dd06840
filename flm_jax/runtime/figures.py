"""The style of figures: drawn without a screen, one colour for measurements, grey for guides."""

from __future__ import annotations

import io
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["ACCENT", "GUIDE", "LINE", "clean", "plt", "save"]

LINE, GUIDE, ACCENT = "#2458a6", "#9a9a9a", "#c4501b"


def clean(axes: Any) -> None:
    """Hides the top and right borders of a plot."""
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Any, path: pathlib.Path) -> None:
    """Writes a figure as an image file, also on a bucket; creates its folder, closes the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    drawn = io.BytesIO()
    # A legend beside the panels belongs to the figure.
    figure.savefig(drawn, dpi=130, format=path.suffix.removeprefix("."), bbox_inches="tight")
    path.write_bytes(drawn.getvalue())
    plt.close(figure)
