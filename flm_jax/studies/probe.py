"""Compares growths by trying them: one source, several recipes, the same further FLOPs.

A run of its own for every arm and seed, branched off its seed's source, so that all is resumable
and each has its lineage, receipt and report.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from flm_jax import chain, counts, growth, runner
from flm_jax.config import ArmConfig, ExperimentConfig, ProbeConfig, StageConfig
from flm_jax.lineage import RunFolder


def arm_experiment(config: ProbeConfig, arm: ArmConfig, seed: int) -> ExperimentConfig:
    """The chain of an arm: the source's stage, then the arm's. Raises UserError as `plan` does."""
    experiment = of_seed(config.experiment, seed)
    source, target = experiment.stages
    base, model = (source, arm.model) if arm.model else (target, target.model)
    eps = growth.norm_eps(source.model, model, arm.growth.recipe)
    stage = dataclasses.replace(
        base,
        name=target.name,
        model=dataclasses.replace(model, rms_norm_eps=eps),
        growth=arm.growth,
    )
    steps = round(target.steps * _flops(experiment, target) / _flops(experiment, stage))
    return dataclasses.replace(experiment, stages=(source, dataclasses.replace(stage, steps=steps)))


def _flops(experiment: ExperimentConfig, stage: StageConfig) -> int:
    """Of one step."""
    length = stage.sequence_length or experiment.data.sequence_length
    return stage.batch_size * length * counts.flops_per_token_train(stage.model, length)


def of_seed(experiment: ExperimentConfig, seed: int) -> ExperimentConfig:
    # All arms read one stream, also those whose context does not grow.
    window = experiment.data_of(0).window_length
    data = dataclasses.replace(
        experiment.data, seed=experiment.data.seed + seed, window_length=window
    )
    # Arms have different numbers of steps; the learning rate must not tell them apart.
    schedule = dataclasses.replace(experiment.schedule, total_steps=experiment.total_steps)
    return dataclasses.replace(
        experiment, seed=experiment.seed + seed, data=data, schedule=schedule
    )


def run(config: ProbeConfig, workdir: str) -> list[dict[str, Any]]:
    """Runs what is left of the probe; returns the arms, best first.

    Each arm has name, recipe, bpb_start (right after the growth) and bpb_end (both one per seed),
    their means, the standard deviation of bpb_end, and curves: per seed, (FLOPs, bits per byte).

    Raises:
      UserError: a config does not fit, before anything runs.
      RunStopped: a signal came; the same call goes on from there.
    """
    arms = [arm_experiment(config, arm, 0) for arm in config.arms]
    for experiment in arms:
        runner.plan_of(experiment.stages[0].model, experiment.stages[1])
    root = pathlib.Path(workdir)
    found: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in config.arms}
    for seed in range(config.seeds):
        source = RunFolder(root / f"source-{seed}")
        first = of_seed(config.experiment, seed)
        chain.run(dataclasses.replace(first, stages=first.stages[:1]), str(source.path))
        for arm in config.arms:
            folder = RunFolder(root / "arms" / f"{arm.name}-{seed}")
            source.branch(folder)
            stages = chain.run(arm_experiment(config, arm, seed), str(folder.path))
            found[arm.name].append({"stage": stages[1], "curve": _curve(folder, stages[1])})
    return ranked(config, found)


def _curve(folder: RunFolder, stage: dict[str, Any]) -> list[tuple[float, float]]:
    """Further FLOPs and bits per byte at every evaluation."""
    rows = folder.stage(stage["index"], stage["name"]).metrics.rows("eval")
    per_step = stage["flops"] / stage["steps"]
    return [((row["step"] - rows[0]["step"]) * per_step, row["bpb"]) for row in rows]


def ranked(config: ProbeConfig, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    results = []
    source = config.experiment.stages[0]
    for arm in config.arms:
        runs = found[arm.name]
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
    return sorted(results, key=lambda arm: arm["mean_end"])


def markdown(arms: Sequence[dict[str, Any]]) -> str:
    """The ranking as a table."""
    rows = [
        "| arm | recipe | claim | right after | after equal FLOPs | std |",
        "|---|---|---|---|---|---|",
    ]
    for arm in arms:
        std = "" if arm["std_end"] is None else f"{arm['std_end']:.4f}"
        recipe = f"`{arm['recipe']}`" if arm["recipe"] else "not grown"
        rows.append(
            f"| {arm['name']} | {recipe} | {arm['exactness']} | {arm['mean_start']:.4f} | "
            f"{arm['mean_end']:.4f} | {std} |"
        )
    return "\n".join(rows)
