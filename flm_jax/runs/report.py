"""The report of a run: a table on screen, `report/report.md` and its figures."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, TypeVar

import rich.box
import rich.table

from flm_jax import mapping
from flm_jax.config import GrowthConfig, ScheduleConfig
from flm_jax.errors import UserError
from flm_jax.runs import findings
from flm_jax.runtime.display import short
from flm_jax.runtime.figures import ACCENT, GUIDE, LINE, clean, counted, plt, save, whole
from flm_jax.runtime.ledger import KINDS, LOST
from flm_jax.store import entries
from flm_jax.store.files import write_atomically
from flm_jax.store.lineage import RunFolder, StageFolder, bits_per_byte

T = TypeVar("T")
_COLUMNS = (
    "stage",
    "params",
    "steps",
    "tokens",
    "FLOPs",
    "time",
    "bits per byte",
    "logit change",
    "loss change",
    "dead",
    "locked",
)
_TIMES = tuple(kind for kind in (*KINDS, *LOST) if kind != "steps")
_ON_SCREEN = ("stage", "params", "tokens", "time", "bits per byte", "logit change")


def _row(stage: dict[str, Any]) -> list[str]:
    """Returns the text of a stage's cells, in the order of `_COLUMNS`."""
    receipt = stage["receipt"]
    growth = ["", "", "", ""]
    if receipt:
        growth = [
            f"{entries.logit_change(receipt):.1e}",
            f"{receipt['loss_after'] - receipt['loss_before']:+.1e}",
            str(receipt["dead_slots"]),
            str(receipt["locked_copies"]),
        ]
    return [
        stage["name"],
        short(stage["params"]),
        f"{stage['steps']:,}",
        f"{stage['tokens']:,}",
        f"{stage['flops']:.2e}",
        f"{stage['wall_s']:.0f} s",
        bits_per_byte(stage["eval"]),
        *growth,
    ]


def table(stages: Sequence[dict[str, Any]]) -> rich.table.Table:
    """Draws a table of a run's stages: the main columns, within 80 characters.

    Args:
      stages: the stages' entries in lineage.json.
    """
    drawn = rich.table.Table(box=rich.box.SIMPLE)
    for name in _ON_SCREEN:
        drawn.add_column(name, no_wrap=True)
    for stage in stages:
        row = dict(zip(_COLUMNS, _row(stage), strict=True))
        drawn.add_row(*(row[name] for name in _ON_SCREEN))
    return drawn


def _markdown(stages: Sequence[dict[str, Any]]) -> str:
    """Returns all columns of the table in Markdown."""
    rows = [_COLUMNS, ["---"] * len(_COLUMNS), *(_row(s) for s in stages)]
    return "\n".join("| " + " | ".join(r) + " |" for r in rows)


def _times(stages: Sequence[dict[str, Any]]) -> str:
    """Returns the account of each stage's time in Markdown; "" if no stage has one."""
    timed = [s for s in stages if s.get("goodput")]  # none in a run of an earlier version
    if not timed:
        return ""
    rows = [["stage", "wall time", "in steps", *_TIMES], ["---"] * (3 + len(_TIMES))]
    for stage in timed:
        seconds, share = stage["goodput"]["seconds"], stage["goodput"]["share"]
        wall = sum(seconds.values())
        parts = [f"{seconds[kind] / max(wall, 1e-9):.1%}" for kind in _TIMES]
        rows.append([stage["name"], f"{wall:.0f} s", f"{share:.1%}", *parts])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"""
## Where the time went

{table}

"Redone" are steps, with all that belongs to them, that a restart repeated; "down" is the time from
the last sign of a process to the next start. See docs/clusters.md.
"""


def _folders(folder: RunFolder, stages: Sequence[dict[str, Any]]) -> list[StageFolder]:
    return [folder.stage(s["index"], s["name"]) for s in stages]


def _grown(stages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the stages that were grown: neither the first one nor the fine-tuned ones."""
    return [s for s in stages if s["receipt"] and s["receipt"]["operator"] != "none"]


def _curves(folder: RunFolder, stages: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws validation bits per byte against tokens and FLOPs, and marks each growth."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for panel, unit, name in zip(
        panels, ("tokens", "flops"), ("training tokens", "training FLOPs"), strict=True
    ):
        done, first_step = 0.0, 0
        for stage, stage_folder in zip(stages, _folders(folder, stages), strict=True):
            per_step = stage[unit] / max(stage["steps"], 1)
            rows = stage_folder.metrics.rows("eval")
            # The untrained model's first point would flatten all others.
            rows = [r for r in rows if r["step"] > 0]
            xs = [done + (r["step"] - first_step) * per_step for r in rows]
            ys = [r["bpb"] for r in rows]
            panel.plot(xs, ys, color=LINE, marker="o", markersize=3, label=stage["name"])
            if stage["index"] > 0:
                panel.axvline(done, color=ACCENT, linestyle="--", linewidth=1)
                grew = stage in _grown(stages)
                panel.annotate(
                    f"grow to {short(stage['params'])}" if grew else stage["name"],
                    (done, 1),
                    (3, -4),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    color=ACCENT,
                    fontsize=8,
                    rotation=90,
                    va="top",
                )
            done += stage[unit]
            first_step += stage["steps"]
        panel.set_xlabel(name)
        panel.set_xlim(left=0)
        counted(panel.xaxis)
        clean(panel)
    panels[0].set_ylabel("validation bits per byte")
    save(figure, path)


def _read(cls: type[T], saved: dict[str, Any], name: str, folder: StageFolder) -> T:
    """A part of a stage's config.json. Raises UserError if it is not what it must be."""
    values = saved.get(name)
    if not isinstance(values, dict):
        raise UserError(f"{folder.config}: {name} is {values!r}; restore the file")
    return mapping.from_mapping(cls, values, name)


def _ramps(folder: RunFolder, stages: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws training loss and mask value over the first steps of each grown stage."""
    grown = _grown(stages)
    figure, panels = plt.subplots(1, len(grown), figsize=(4.5 * len(grown), 3.4), squeeze=False)
    for panel, stage in zip(panels[0], grown, strict=True):
        stage_folder = folder.stage(stage["index"], stage["name"])
        rows = stage_folder.metrics.rows("train")
        settings = _read(GrowthConfig, stage_folder.saved()["stage"], "growth", stage_folder)
        start = sum(s["steps"] for s in stages if s["index"] < stage["index"])
        masked = any(row["mask"] < 1 for row in rows)
        ramp = settings.ramp_steps if masked else 0
        end = start + min(max(2 * ramp, ramp + 20), stage["steps"])
        shown = [row for row in rows if start < row["step"] <= end]
        panel.plot(
            [row["step"] for row in shown], [row["loss"] for row in shown], color=LINE, marker=".",
            markersize=3, linewidth=1, label="training loss",
        )  # fmt: skip
        panel.set(title=f"{stage['name']}: the ramp", xlabel="step")
        panel.set_ylabel("training loss (nats per token)", color=LINE)
        whole(panel.xaxis)
        right = panel.twinx()
        steps = range(start, end + 1)
        values = [settings.mask_at(step - start) if masked else None for step in steps]
        masks = [1.0 if value is None else value for value in values]
        right.plot(steps, masks, color=GUIDE, label="mask")
        right.set_ylim(0, 1.05)
        right.set_ylabel("mask of the added slots (0 to 1)", color=GUIDE)
        right.spines["top"].set_visible(False)
        panel.spines["top"].set_visible(False)
    save(figure, path)


def _distances(folder: RunFolder, stages: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws each layer's distance from the identity; copied layers have another color."""
    grown = _grown(stages)
    figure, panels = plt.subplots(1, len(grown), figsize=(4.5 * len(grown), 3.2), squeeze=False)
    for panel, stage in zip(panels[0], grown, strict=True):
        distances = stage["receipt"]["layer_distances"]
        copied = [stage["receipt"]["layer_map"].count(i) > 1 for i in range(len(distances))]
        colors = [ACCENT if c else GUIDE for c in copied]
        panel.bar(range(len(distances)), distances, color=colors)
        panel.set_yscale("log")
        panel.set(title=f"before {stage['name']} (orange: copied)", xlabel="layer (index from 0)")
        panel.set_ylabel("distance ||out - in|| / ||in|| (ratio)")
        whole(panel.xaxis)
        clean(panel)
    save(figure, path)


def write(folder: RunFolder) -> pathlib.Path:
    """Writes the report of a run's finished stages.

    Args:
      folder: the run's folder; it has one finished stage or more.

    Returns:
      The path of report.md.
    """
    stages = folder.stages()
    folder.report.mkdir(parents=True, exist_ok=True)
    figures = [("curve.png", "Validation bits per byte; dashed: growth.", _curves)]
    if _grown(stages):
        figures += [
            ("ramp.png", "The run-time masks' ramps.", _ramps),
            ("distances.png", "Layer distances on the calibration batch.", _distances),
        ]
    for name, _, draw in figures:
        draw(folder, stages, folder.report / name)
    folders = _folders(folder, stages)
    configs = [f.saved() for f in folders]
    config = configs[0]
    pictures = "\n".join(
        f"![{caption}]({name})\n\n{caption} [SVG]({stem}.svg), [data]({stem}.csv)\n"
        for name, caption, _ in figures
        for stem in [name.removesuffix(".png")]
    )
    models = [c["stage"].get("model") for c in configs]
    dtypes = [m.get("dtype", "float32") if isinstance(m, dict) else "float32" for m in models]
    schedule = _read(ScheduleConfig, configs[-1], "schedule", folders[-1])
    evals = [f.metrics.rows("eval") for f in folders]
    said = findings.sentences(stages, evals, dtypes, schedule)
    measured = "\n".join(f"- {sentence}" for sentence in said)
    text = f"""# {" -> ".join(s["name"] for s in stages)}

Data: `{config["data"]["task"]}`, vocabulary `{config["data"]["vocabulary"]}`, fingerprint
`{config["data_fingerprint"][:16]}`. Validation: always the same sequences of the validation split.

{_markdown(stages)}

"Logit change" is the largest change of a logit at the growth, divided by the root mean square of
the logits. "Loss change" is in nats per token. Both are measured on the calibration batch.

{pictures}{_times(stages)}
## What this run measured

{measured}

It has no control that was never grown, so it does not show whether growth saved compute.
`flm study` tests that.
"""
    path = folder.report / "report.md"
    write_atomically(path, text)
    return path
