"""Compares growths by training: one source, several recipes, the same FLOPs after the growth.

Every arm and seed has its own run folder, branched off the seed's source, with its lineage, receipt
and report. A run folder resumes by itself, so the probe keeps no other record of finished work.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from flm_jax import growth
from flm_jax.config import ExperimentConfig, StageConfig
from flm_jax.errors import UserError
from flm_jax.growth import ligo
from flm_jax.params import counts
from flm_jax.runs import chain
from flm_jax.runs.stage import plan_of
from flm_jax.runtime import paths
from flm_jax.runtime.figures import ACCENT, GUIDE, LINE, clean, counted, plt, save
from flm_jax.store.files import write_atomically, write_json, write_result
from flm_jax.store.lineage import RunFolder
from flm_jax.studies.config import ArmConfig, ProbeConfig
from flm_jax.studies.growth_study.analysis import LEVEL, holm, interval


def arm_experiment(config: ProbeConfig, arm: ArmConfig, seed: int) -> ExperimentConfig:
    """Builds the chain of an arm: the source's stage, then the arm's.

    Args:
      config: the probe.
      arm: one of its arms.
      seed: index of the seed, from 0.

    Raises:
      UserError: the recipe does not fit the models, as in `growth.plan`, or LiGO's fit costs more
        than the budget.
    """
    experiment = of_seed(config.experiment, seed)
    source, target = experiment.stages
    base, model = (source, arm.model) if arm.model else (target, target.model)
    stage = dataclasses.replace(
        base,
        name=target.name,
        model=growth.derived(source.model, model, arm.growth.recipe),
        growth=arm.growth,
    )
    budget = target.steps * _flops(experiment, target) - _fit_flops(experiment, source, stage)
    steps = round(budget / _flops(experiment, stage))
    if steps < 1:
        raise UserError(
            f"arm {arm.name}: LiGO's fit of {arm.growth.fit_steps} steps takes more FLOPs than the "
            f"{target.steps} steps of stage {target.name}; lower growth.fit_steps, or raise steps"
        )
    return dataclasses.replace(experiment, stages=(source, dataclasses.replace(stage, steps=steps)))


def _flops(experiment: ExperimentConfig, stage: StageConfig) -> int:
    """Returns the training FLOPs of one step."""
    length = stage.sequence_length or experiment.data.sequence_length
    return stage.batch_size * length * counts.flops_per_token_train(stage.model, length)


def _fit_flops(experiment: ExperimentConfig, source: StageConfig, stage: StageConfig) -> int:
    """Returns the FLOPs of LiGO's fit, which its arm pays; 0 for other recipes."""
    plan = plan_of(source.model, stage)
    if not any(e.learned for e in plan.expansions):
        return 0
    length = stage.sequence_length or experiment.data.sequence_length
    tokens = stage.batch_size * length
    return stage.growth.fit_steps * ligo.fit_flops(plan, tokens, length)


def of_seed(experiment: ExperimentConfig, seed: int) -> ExperimentConfig:
    """Returns the experiment with the given seed's parameters and data order."""
    # All arms read the same stream, also those whose context does not grow.
    window = experiment.data_of(0).window_length
    data = dataclasses.replace(
        experiment.data, seed=experiment.data.seed + seed, window_length=window
    )
    # Arms differ in their number of steps, but must have the same learning rate schedule.
    schedule = dataclasses.replace(experiment.schedule, total_steps=experiment.total_steps)
    return dataclasses.replace(
        experiment, seed=experiment.seed + seed, data=data, schedule=schedule
    )


def run(config: ProbeConfig, workdir: str) -> list[dict[str, Any]]:
    """Runs the unfinished part of the probe.

    Args:
      config: the probe.
      workdir: its folder.

    Returns:
      The arms, best first. Each has name, recipe, bpb_start (right after the growth) and bpb_end
      (both one per seed), their means, the standard deviation of bpb_end, behind (mean, half width
      of the 95% interval and corrected p of the paired difference to the best arm; None: it is the
      best, or has one seed), and curves: for each seed, (FLOPs, bits per byte).

    Raises:
      UserError: a config does not fit; raised before anything runs.
      RunStopped: a signal stopped the run; the same call resumes it.
    """
    arms = [arm_experiment(config, arm, 0) for arm in config.arms]
    for experiment in arms:
        plan_of(experiment.stages[0].model, experiment.stages[1])
    root = paths.of(workdir)
    runs: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in config.arms}
    for seed in range(config.seeds):
        source = RunFolder(root / f"source-{seed}")
        first = of_seed(config.experiment, seed)
        chain.run(dataclasses.replace(first, stages=first.stages[:1]), str(source.path))
        for arm in config.arms:
            folder = RunFolder(_folder(root / "arms", arm.name, seed))
            source.branch(folder)
            write_json(folder.path / "arm.json", {"name": arm.name, "seed": seed})
            stages = chain.run(arm_experiment(config, arm, seed), str(folder.path))
            runs[arm.name].append({"stage": stages[1], "curve": _curve(folder, stages[1])})
    return ranked(config, runs)


def _folder(arms: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    """The folder of an arm; earlier versions put the name there as it is."""
    before = arms / f"{name}-{seed}"
    return before if before.exists() else arms / f"{paths.slug(name)}-{seed}"


def _curve(folder: RunFolder, stage: dict[str, Any]) -> list[tuple[float, float]]:
    """Returns (FLOPs after the growth, bits per byte) of every evaluation."""
    rows = folder.stage(stage["index"], stage["name"]).metrics.rows("eval")
    per_step = stage["flops"] / stage["steps"]
    return [((row["step"] - rows[0]["step"]) * per_step, row["bpb"]) for row in rows]


def ranked(
    config: ProbeConfig, runs_by_arm: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Summarises the runs of each arm, best first.

    Args:
      config: the probe.
      runs_by_arm: arm -> its runs, one per seed, each with stage and curve.

    Returns:
      The arms, as `run` returns them.
    """
    results = []
    source = config.experiment.stages[0]
    for arm in config.arms:
        runs = runs_by_arm[arm.name]
        starts, ends = ([r["stage"]["eval"][key] for r in runs] for key in ("bpb_start", "bpb_end"))
        results.append(
            {
                "name": arm.name,
                "recipe": None if arm.model == source.model else arm.growth.recipe,
                "exactness": runs[0]["stage"]["receipt"]["exactness"],
                "bpb_start": starts,
                "bpb_end": ends,
                "mean_start": statistics.fmean(starts),
                "mean_end": statistics.fmean(ends),
                "std_end": statistics.stdev(ends) if len(ends) > 1 else None,
                "flops": [r["stage"]["flops"] for r in runs],
                "curves": [r["curve"] for r in runs],
            }
        )
    results.sort(key=lambda arm: arm["mean_end"])
    return _with_pairs(results)


def _with_pairs(arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds `behind`: how far each arm is behind the best one, in pairs of the same seed.

    The arms of a seed share source and data, so most of the spread over seeds cancels in a pair.
    The p-values are corrected together; choosing the best arm after the fact is not.
    """
    best = arms[0]["bpb_end"]
    pairs = {
        arm["name"]: interval([x - y for x, y in zip(arm["bpb_end"], best, strict=True)])
        for arm in arms[1:]
    }
    adjusted = holm({name: pair.p for name, pair in pairs.items()})
    behind = {
        name: {"mean": pair.mean, "half": pair.mean - pair.low, "p": adjusted[name]}
        for name, pair in pairs.items()
        if math.isfinite(pair.low)
    }
    return [arm | {"behind": behind.get(arm["name"])} for arm in arms]


def which(arms: Sequence[dict[str, Any]]) -> str:
    """Answers "which one?" as far as the seeds do.

    Args:
      arms: the ranked arms, from `run`.
    """
    best, others = arms[0]["name"], arms[1:]
    if any(arm["behind"] is None for arm in others):
        return f"One seed ranks no arms. The lowest loss here has {best}."
    equal = [arm["name"] for arm in others if arm["behind"]["p"] >= 1 - LEVEL]
    if not equal:
        return f"{best} is better than every other arm (corrected p < {1 - LEVEL:.2f})."
    return (
        f"The lowest mean has {best}. These seeds do not separate it from {', '.join(equal)} "
        f"(corrected p of {1 - LEVEL:.2f} or more)."
    )


def markdown(arms: Sequence[dict[str, Any]]) -> str:
    """Writes the ranking as a Markdown table."""
    rows = [
        "| arm | recipe | claim | right after | after equal FLOPs | std | behind the best |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        std = "" if arm["std_end"] is None else f"{arm['std_end']:.4f}"
        pair = arm["behind"]
        behind = f"{pair['mean']:.4f} ± {pair['half']:.4f}" if pair else ""
        recipe = f"`{arm['recipe']}`" if arm["recipe"] else "not grown"
        rows.append(
            f"| {arm['name']} | {recipe} | {arm['exactness']} | {arm['mean_start']:.4f} | "
            f"{arm['mean_end']:.4f} | {std} | {behind} |"
        )
    return "\n".join(rows)


def _probe_curves(arms: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws a panel for each arm: bits per byte against the FLOPs after the growth.

    Thin lines are seeds, the thick one is their mean; grey is the mean of the best other arm.
    """
    columns = min(4, len(arms))
    rows = -(-len(arms) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(2.9 * columns, 2.5 * rows), sharex=True, sharey=True, squeeze=False
    )
    for panel in panels.flat[len(arms) :]:
        panel.set_axis_off()
    means = [np.array(arm["curves"]).mean(0) for arm in arms]  # [evaluation, (FLOPs, bpb)]
    for n, (panel, arm) in enumerate(zip(panels.flat, arms, strict=False)):
        if len(arms) > 1:
            other = 1 if n == 0 else 0
            panel.plot(*means[other].T, color=GUIDE, linewidth=1.5, label=arms[other]["name"])
        color = ACCENT if arm["recipe"] is None else LINE
        for seed, curve in enumerate(arm["curves"]):
            panel.plot(*np.array(curve).T, color=color, linewidth=0.6, label=f"seed {seed}")
        panel.plot(*means[n].T, color=color, linewidth=1.8, label="mean")
        panel.set_title(f"{n + 1}  {arm['name']}", fontsize=9)
        panel.tick_params(labelbottom=n + columns >= len(arms))  # nothing is below it
        counted(panel.xaxis)
        clean(panel)
    lowest = min(arm["mean_end"] for arm in arms)
    highest = max(bpb for arm in arms for curve in arm["curves"] for _, bpb in curve)
    # Cuts off extreme starts.
    panels[0][0].set(xlim=(0, None), ylim=(0.97 * lowest, min(1.35 * lowest, 1.02 * highest)))
    figure.supxlabel("training FLOPs after the growth", fontsize=9)
    figure.supylabel("validation bits per byte", fontsize=9)
    save(figure, path)


def write_report(arms: Sequence[dict[str, Any]], workdir: str) -> pathlib.Path:
    """Writes report/probe.md, report/probe.json and report/probe.png.

    Args:
      arms: the ranked arms, from `run`.
      workdir: the probe's folder.

    Returns:
      The path of probe.md.
    """
    folder = paths.of(workdir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    _probe_curves(arms, folder / "probe.png")
    write_result(folder / "probe.json", arms)
    path = folder / "probe.md"
    seeds = len(arms[0]["bpb_end"])
    write_atomically(
        path,
        f"""# Growths of one source, ranked

Validation bits per byte, mean of {seeds} seed(s); {arms[0]["flops"][0]:.2e} training FLOPs each
after the growth, with LiGO's fit. Behind the best: pairs of the same seed, 95% interval (t).
In the figure: thin lines are seeds, grey is the best arm (in its own panel, the second one).

{which(arms)}

{markdown(arms)}

![curves](probe.png)
""",
    )
    return path
