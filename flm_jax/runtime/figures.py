"""The style of figures, and one way to save them: as an image, as SVG, and their data as CSV.

Drawn without a screen; one colour for measurements, grey for guides.
"""

from __future__ import annotations

import csv
import io
import pathlib
from collections.abc import Iterator
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.ticker import FuncFormatter, MaxNLocator

from flm_jax.runtime.display import short

__all__ = ["ACCENT", "GUIDE", "LINE", "clean", "counted", "plt", "save", "whole"]

LINE, GUIDE, ACCENT = "#2458a6", "#9a9a9a", "#c4501b"
_COLUMNS = ("panel", "series", "x_label", "x", "y_label", "y", "low", "high", "value")


def clean(axes: Any) -> None:
    """Hides the top and right borders of a plot."""
    axes.spines[["top", "right"]].set_visible(False)


def counted(axis: Any) -> None:
    """Writes the ticks of an axis of counts in words, as 78k."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def whole(axis: Any) -> None:
    """Puts the ticks of an axis of steps or layers on whole numbers."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def save(figure: Any, path: pathlib.Path) -> None:
    """Writes a figure as PATH, as SVG and as CSV beside it; creates its folder, closes the figure.

    The same figure gives the same files, also on a bucket. The CSV has a row for each point of a
    line, bar or image that is in the coordinates of the data; guides are left out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        for suffix in dict.fromkeys((path.suffix, ".svg")):
            drawn, kind = io.BytesIO(), suffix.removeprefix(".")
            metadata = {"metadata": {"Date": None}} if kind == "svg" else {}
            # A legend beside the panels belongs to the figure.
            figure.savefig(drawn, dpi=130, format=kind, bbox_inches="tight", **metadata)
            path.with_suffix(suffix).write_bytes(drawn.getvalue())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(_points(figure))
    path.with_suffix(".csv").write_bytes(text.getvalue().encode())
    plt.close(figure)


def _points(figure: Any) -> Iterator[tuple[Any, ...]]:
    """Yields the rows of the CSV."""
    for number, axes in enumerate(figure.axes):
        panel, x_label, y_label = (
            " ".join(text.split())
            for text in (
                f"{number} {axes.get_title()}",
                axes.get_xlabel() or figure.get_supxlabel(),
                axes.get_ylabel() or figure.get_supylabel(),
            )
        )
        bars = [c for c in axes.containers if isinstance(c, BarContainer)]
        errors = {
            c.lines[0]: c
            for c in axes.containers
            if isinstance(c, ErrorbarContainer) and c.lines[0]
        }
        for n, line in enumerate(axes.lines):
            if line.get_transform() != axes.transData or line.get_gid() == "guide":
                continue  # a guide
            container = errors.get(line)
            if container is None and any(line in c.lines[1] for c in errors.values()):
                continue  # the caps of error bars
            series = _label(container or line, n)
            limits = _limits(container)
            for i, (x, y) in enumerate(zip(line.get_xdata(), line.get_ydata(), strict=True)):
                low, high = limits[i] if i < len(limits) else ("", "")
                yield panel, series, x_label, x, y_label, y, low, high, ""
        for n, group in enumerate(bars):
            for bar in group.patches:
                x = bar.get_x() + bar.get_width() / 2
                y = bar.get_y() + bar.get_height()
                yield panel, _label(group, n), x_label, x, y_label, y, "", "", ""
        for n, image in enumerate(axes.images):
            for (y, x), value in np.ndenumerate(np.ma.filled(image.get_array(), np.nan)):
                yield panel, f"image {n}", x_label, x, y_label, y, "", "", value


def _label(artist: Any, number: int) -> str:
    """The label of a line or bars; without one, its number."""
    label = str(artist.get_label() or "")
    return str(number) if not label or label.startswith("_") else label


def _limits(container: ErrorbarContainer | None) -> list[tuple[float, float]]:
    """The ends of vertical error bars; [] without them."""
    if container is None or not container.has_yerr:
        return []
    segments = container.lines[2][-1].get_segments()
    return [(float(s[0][1]), float(s[1][1])) if len(s) == 2 else (np.nan, np.nan) for s in segments]
