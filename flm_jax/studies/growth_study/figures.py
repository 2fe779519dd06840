"""The study's figures, as SVG and PNG, from the raw results alone."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from flm_jax.runtime.figures import ACCENT, GUIDE, LINE, clean, plt, save
from flm_jax.studies.growth_study.analysis import Interval, Result
from flm_jax.studies.growth_study.results import Results, Row

STYLES = ("-", "--", ":", "-.")


def draw(results: Results, judged: Sequence[Result], folder: pathlib.Path) -> list[str]:
    """Draws all figures; returns their names without suffix."""
    names = []
    if any(t["result"] for t in results.trials):
        _decayed(results, folder / f"{results.name}_decayed")
        names.append(f"{results.name}_decayed")
    if judged:
        _multipliers(judged, folder / f"{results.name}_multipliers")
        _curves(results, folder / f"{results.name}_curves")
        names += [f"{results.name}_multipliers", f"{results.name}_curves"]
    return names


def _decayed(results: Results, path: pathlib.Path) -> None:
    """Decayed losses against FLOPs: fixed models as lines, arms as points."""
    figure, panel = plt.subplots(figsize=(7.2, 4.4))
    config = results.config
    fixed = [m.name for m in config.models]
    points: dict[str, dict[float, list[float]]] = {}
    for phase in ("gate", "arms"):
        for trial in results.of(phase):
            flops = trial["result"]["flops"]
            points.setdefault(trial["arm"], {}).setdefault(flops, []).append(trial["result"]["bpb"])
    colours = {config.target: ACCENT, config.source: LINE}
    arm = 0
    for name, by_flops in points.items():
        xs = sorted(by_flops)
        ys = [np.mean(by_flops[x]) for x in xs]
        errors = [np.std(by_flops[x]) for x in xs]
        if name in fixed:
            style = STYLES[fixed.index(name) % len(STYLES)]
            colour = colours.get(name, GUIDE)
            panel.errorbar(
                xs, ys, errors, fmt="o", ls=style, ms=3, color=colour, label=f"{name}, never grown"
            )
        else:
            marker = "sD^vP*XH"[arm % 8]
            panel.errorbar(xs, ys, errors, fmt=marker, ms=6, color="black", mfc="none", label=name)
            arm += 1
    panel.set(xscale="log", xlabel="training FLOPs", ylabel="validation bits per byte")
    panel.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    clean(panel)
    save(figure, path.with_suffix(".png"))


def _forest(panel: Any, rows: Sequence[tuple[str, Interval]], null: float) -> None:
    """One row for each name: mean and interval, and a line at no effect."""
    for y, (_, value) in enumerate(rows):
        low, high = (v if np.isfinite(v) else value.mean for v in (value.low, value.high))
        panel.plot([low, high], [y, y], "-", color=LINE)
        panel.plot([value.mean], [y], "o", color=LINE, mfc="white" if value.bounds else LINE)
    panel.axvline(null, color=GUIDE, lw=1)
    panel.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    panel.invert_yaxis()
    clean(panel)


def _multipliers(judged: Sequence[Result], path: pathlib.Path) -> None:
    """Both metrics of every arm, with 95% intervals."""
    height = 1.2 + 0.35 * len(judged)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, height), sharey=True)
    _forest(left, [(r.arm, r.multiplier) for r in judged], 1.0)
    left.set(xscale="log", xlabel="compute multiplier against T from scratch")
    _forest(right, [(r.arm, r.versus[r.best]) for r in judged], 0.0)
    right.set(xlabel=f"bits per byte minus the best fixed size ({judged[0].best})")
    right.invert_yaxis()
    save(figure, path.with_suffix(".png"))


def _curves(results: Results, path: pathlib.Path) -> None:
    """Training loss against FLOPs, of one seed: the fixed models at C, and the primary arm."""
    figure, panel = plt.subplots(figsize=(7.2, 4.2))
    frozen, config = results.frozen, results.config
    assert frozen is not None
    shown = dict.fromkeys((config.source, config.between, config.target, frozen["primary"]))
    colours = (LINE, GUIDE, "black", ACCENT)
    for name, colour in zip(shown, colours, strict=False):
        trial = next(
            (t for t in results.of("arms") if (t["arm"], t["seed"], t["share"]) == (name, 0, 1)),
            None,
        )
        if trial:
            xs, ys = loss_curve(results, trial)
            panel.plot(xs, ys, color=colour, lw=1.2, label=name)
    panel.set(xlabel="training FLOPs", ylabel="training loss, nats per token", xlim=(0, None))
    low, high = panel.get_ylim()
    panel.set_ylim(low, min(high, 1.6 * max(low, 0.1)))
    panel.legend(frameon=False, fontsize=8)
    clean(panel)
    save(figure, path.with_suffix(".png"))


def loss_curve(results: Results, trial: Row) -> tuple[list[float], list[float]]:
    """FLOPs and training losses of a trial, over all pieces that lead to it."""
    xs: list[float] = []
    ys: list[float] = []
    spent = 0.0
    for piece in results.chain(trial):
        steps = piece["end"] - piece["start"]
        per_step = (piece["flops"] - spent) / steps
        for step, loss in piece["losses"]:
            xs.append(spent + (step - piece["start"]) * per_step)
            ys.append(loss)
        spent = piece["flops"]
    return xs, ys
