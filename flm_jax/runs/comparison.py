"""Compares any number of runs: one table, and their curves over each other.

A run's numbers are those of its whole lineage. So a branch also counts what was trained before it.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.table

from flm_jax import mapping
from flm_jax.errors import UserError
from flm_jax.runtime import paths
from flm_jax.runtime.display import short
from flm_jax.runtime.figures import clean, counted, plt, save
from flm_jax.store import experiment_file
from flm_jax.store.lineage import RunFolder

# The axes of the curves: field of `Measured`, label.
_AXES = (
    ("tokens", "training tokens"),
    ("flops", "training FLOPs"),
    ("wall_s", "wall time (seconds)"),
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One validation of a run.

    Attributes:
      stage: name of the stage.
      step: global step.
      tokens, flops, wall_s: spent up to it, over all stages; wall time is spread evenly over a
        stage's steps.
      bpb: validation bits per byte.
    """

    stage: str
    step: int
    tokens: float
    flops: float
    wall_s: float
    bpb: float


@dataclasses.dataclass(frozen=True)
class Run:
    """The finished stages of a run.

    Attributes:
      name: what it is called in table and figure.
      stages: the entries in lineage.json.
      config: the whole config, as JSON values.
      curve: its validations.
      growths: tokens, FLOPs and wall time at which each later stage began.
      validation: what the bits per byte were measured on; None: not known.
    """

    name: str
    stages: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]
    curve: Sequence[Measured]
    growths: Sequence[Mapping[str, float]]
    validation: Mapping[str, Any]

    def row(self) -> dict[str, Any]:
        """Returns the run's row of the table, as JSON values."""
        spent = {unit: sum(s[unit] for s in self.stages) for unit in ("tokens", "flops", "wall_s")}
        grown = [s["receipt"]["operator"] for s in self.stages if s["receipt"]]
        return {
            "run": self.name,
            "stages": [s["name"] for s in self.stages],
            "params": self.stages[-1]["params"],
            **spent,
            "bpb_final": self.stages[-1]["eval"]["bpb_end"],
            "bpb_best": min((m.bpb for m in self.curve), default=None),
            "growths": [operator for operator in grown if operator != "none"],
        }


def read(path: str, name: str = "") -> Run:
    """Reads a run's finished stages.

    Args:
      path: the run's folder.
      name: what to call it; "": its path.

    Raises:
      UserError: no stage is finished, or a file is damaged.
    """
    folder = RunFolder(path)
    stages = folder.stages()
    if not stages:
        folder.finished_stage()  # raises
    curve: list[Measured] = []
    growths: list[dict[str, float]] = []
    done, first = dict.fromkeys((unit for unit, _ in _AXES), 0.0), 0
    for entry in stages:
        if entry["index"]:
            growths.append(dict(done))
        steps = max(entry["steps"], 1)
        for row in folder.stage(entry["index"], entry["name"]).metrics.rows("eval"):
            part = (row["step"] - first) / steps
            spent = {unit: done[unit] + part * entry[unit] for unit in done}
            curve.append(Measured(entry["name"], row["step"], **spent, bpb=row["bpb"]))
        done = {unit: done[unit] + entry[unit] for unit in done}
        first += entry["steps"]
    config = mapping.to_dict(experiment_file.config_of(folder))
    known = folder.experiment.exists()
    validation = {
        "data_fingerprint": stages[-1]["data_fingerprint"],
        "sequences": config["eval"]["sequences"] if known else None,
        "sequence_length": config["data"]["sequence_length"],
    }
    return Run(name or path, stages, config, curve, growths, validation)


def read_all(given: Sequence[str]) -> list[Run]:
    """Reads runs; their names are their paths without the folders that all have in common.

    Raises:
      UserError: as `read`.
    """
    parts = [pathlib.PurePath(path).parts for path in dict.fromkeys(given)]
    level = zip(*(p[:-1] for p in parts), strict=False)
    shared = len([*itertools.takewhile(lambda names: len(set(names)) == 1, level)])
    shared = shared if len(parts) > 1 else 0
    names = ["/".join(p[shared:]) for p in parts]
    return [read(path, name) for path, name in zip(dict.fromkeys(given), names, strict=True)]


def notes(runs: Sequence[Run]) -> list[str]:
    """Says where runs differ from the first one: in what was measured, and in their configs."""
    found = []
    first = runs[0]
    for run in runs[1:]:
        known = [n for n, x in run.validation.items() if None not in (x, first.validation[n])]
        one, two = ({n: r.validation[n] for n in known} for r in (first, run))
        other = mapping.differences(one, two, "validation")
        if other:
            found.append(
                f"{run.name} was measured on other text than {first.name} ({'; '.join(other)}): "
                "their bits per byte cannot be compared"
            )
        found += [f"{run.name}: {line}" for line in mapping.differences(first.config, run.config)]
    return found


def table(runs: Sequence[Run]) -> rich.table.Table:
    """Draws the table of runs."""
    drawn = rich.table.Table(box=rich.box.SIMPLE)
    drawn.add_column("run", overflow="fold")
    for name in ("params", "tokens", "FLOPs", "time", "final", "best"):
        drawn.add_column(name, no_wrap=True, justify="right")
    drawn.add_column("growths", overflow="fold")
    for row in (run.row() for run in runs):
        scores = (
            "" if score is None else f"{score:.4f}" for score in (row["bpb_final"], row["bpb_best"])
        )
        drawn.add_row(
            row["run"], short(row["params"]), short(row["tokens"]), f"{row['flops']:.2e}",
            f"{row['wall_s']:.0f} s", *scores, ", ".join(row["growths"]),
        )  # fmt: skip
    drawn.caption = "final, best: validation bits per byte; all columns count earlier stages too"
    return drawn


def write(runs: Sequence[Run], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the curves of runs as a figure (PNG and SVG), and their points (CSV).

    Args:
      runs: one or more; no name twice.
      folder: gets `compared.png`, `compared.svg` and `compared.csv`.

    Returns:
      The files' paths.

    Raises:
      UserError: the folder cannot be written.
    """
    files = [folder / f"compared.{kind}" for kind in ("png", "svg", "csv")]
    try:
        save(_figure(runs), files[0])
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({paths.reason_of(error)}); give another folder",
            argument="output",
        ) from error
    return files


def _figure(runs: Sequence[Run]) -> Any:
    """Draws bits per byte against tokens, FLOPs and wall time; a growth is a ring."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.2), sharey=True)
    colors = plt.get_cmap("tab10" if len(runs) <= 10 else "turbo")
    styles = itertools.cycle(("-", "--", ":", "-."))
    lines = []
    for number, (run, style) in enumerate(zip(runs, styles, strict=False)):
        color = colors(number if len(runs) <= 10 else number / (len(runs) - 1))
        # The untrained model's first point would flatten all others.
        points = [m for m in run.curve if m.step > 0] or list(run.curve)
        for panel, (unit, _) in zip(panels, _AXES, strict=True):
            (line,) = panel.plot(
                [getattr(m, unit) for m in points],
                [m.bpb for m in points],
                style, label=run.name, color=color, marker="o", markersize=2.5, linewidth=1.4,
            )  # fmt: skip
            for growth in run.growths:
                near = [m.bpb for m in points if getattr(m, unit) >= growth[unit]]
                panel.plot(
                    growth[unit], near[0] if near else None, "o", color=color, markersize=8,
                    fillstyle="none", gid="guide",
                )  # fmt: skip
        lines.append(line)
    for panel, (_, label) in zip(panels, _AXES, strict=True):
        panel.set_xlabel(label)
        panel.set_xlim(left=0)
        counted(panel.xaxis)
        clean(panel)
    panels[0].set_ylabel("validation bits per byte")
    names = [run.name if len(run.name) <= 60 else f"...{run.name[-57:]}" for run in runs]
    figure.legend(
        lines, names, loc="lower center", ncols=min(len(runs), 3), frameon=False, fontsize=8,
        bbox_to_anchor=(0.5, 1.0),
        title="rings: growths" if any(run.growths for run in runs) else None, title_fontsize=8,
    )  # fmt: skip
    return figure
