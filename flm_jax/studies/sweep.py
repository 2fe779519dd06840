"""The transfer sweep: where is the best value of a hyper-parameter at each width?"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from flm_jax.config import StageConfig
from flm_jax.errors import UserError
from flm_jax.studies.config import MupStudyConfig
from flm_jax.studies.study import Study, widened

HYPER_PARAMETERS = ("learning_rate", "init_std", "input_mult", "output_mult")


@dataclasses.dataclass(frozen=True)
class Point:
    """One trial: a hyper-parameter at a factor times the proxy's value, at a width."""

    parametrisation: str
    hyper_parameter: str
    width_factor: int
    value: float
    seed: int


def points(config: MupStudyConfig) -> Iterator[Point]:
    """All trials. The standard parametrisation is swept in the learning rate alone."""
    grids = {
        "learning_rate": config.learning_rates,
        "init_std": config.init_stds,
        "input_mult": config.input_mults,
        "output_mult": config.output_mults,
    }
    for name, values in grids.items():
        for parametrisation in ("mup", "sp") if name == "learning_rate" else ("mup",):
            for factor in config.width_factors:
                for seed in range(config.seeds):
                    for value in values:
                        yield Point(parametrisation, name, factor, value, seed)


def stage_of(proxy: StageConfig, point: Point) -> tuple[StageConfig, float]:
    """The stage to train, and what its learning rates are multiplied by."""
    model = widened(proxy.model, point.width_factor, point.parametrisation)
    name, value = point.hyper_parameter, point.value
    if name == "init_std":
        model = dataclasses.replace(
            model,
            matrix_init_std=model.matrix_init_std * value,
            vector_init_std=model.vector_init_std * value,
        )
    elif name != "learning_rate":
        model = dataclasses.replace(model, **{name: getattr(model, name) * value})
    rate = value if name == "learning_rate" else 1.0
    return dataclasses.replace(proxy, model=model), rate


def run(study: Study, config: MupStudyConfig, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Runs what is left of the sweep; returns a row for every trial."""
    proxy, all_points = study.experiment.stages[0], list(points(config))
    rows = []
    for number, point in enumerate(all_points, 1):
        stage, rate = stage_of(proxy, point)
        row = study.trial(stage, point.seed, rate)
        rows.append({**dataclasses.asdict(point), "width": stage.model.d_model,
                     "train_loss": row["train_loss"], "bpb": row["bpb"]})  # fmt: skip
        shown = "diverged" if row["bpb"] is None else f"{row['bpb']:.4f} bits per byte"
        note(
            f"{number}/{len(all_points)}  {point.parametrisation}  width {stage.model.d_model}  "
            f"{point.hyper_parameter} x{point.value:g}  {shown}"
        )
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For each parametrisation and hyper-parameter: the best value at each width, and how many
    grid steps it moves over the widths.

    Raises UserError if no trial of a width finished.
    """
    found: dict[str, Any] = {}
    for parametrisation, name in dict.fromkeys(
        (row["parametrisation"], row["hyper_parameter"]) for row in rows
    ):
        mine = [r for r in rows if (r["parametrisation"], r["hyper_parameter"]) == (
            parametrisation, name)]  # fmt: skip
        grid = sorted({r["value"] for r in mine})
        best, losses = {}, {}
        for width in sorted({r["width"] for r in mine}):
            curve = []
            for value in grid:
                bpbs = [r["bpb"] for r in mine if (r["width"], r["value"]) == (width, value)]
                whole = bpbs and all(b is not None for b in bpbs)
                curve.append(statistics.fmean(bpbs) if whole else math.inf)
            if not any(map(math.isfinite, curve)):
                raise UserError(
                    f"sweep of {name} at width {width} ({parametrisation}): no trial finished "
                    "with a finite loss; lower the grid or the learning rate"
                )
            best[width] = grid[curve.index(min(curve))]
            losses[width] = [c if math.isfinite(c) else None for c in curve]
        indices = [grid.index(value) for value in best.values()]
        found.setdefault(parametrisation, {})[name] = {
            "grid": grid,
            "best": best,
            "bpb": losses,
            "shift": max(indices) - min(indices),
        }
    return found
