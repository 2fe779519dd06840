"""Extension of a finished run: its last stage gets more steps, in the same folder.

An extension is exact: it ends with the bits of the run that was configured longer from the start.
So it continues from the latest checkpoint up to which both runs have the same learning rates. Under
`constant` this is the end; under `wsd` the last checkpoint before the decay that was kept.
"""

from __future__ import annotations

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax import mapping
from flm_jax.config import ExperimentConfig
from flm_jax.errors import UserError
from flm_jax.runs import branch, chain
from flm_jax.runs.branch import Point
from flm_jax.runs.stage import optimizer_of
from flm_jax.runtime import paths, processes
from flm_jax.store import entries, experiment_file
from flm_jax.store.experiment_file import Experiment, Extension
from flm_jax.store.files import write_json
from flm_jax.store.lineage import RunFolder, identity


def prepare(workdir: str | os.PathLike[str], stage: str, steps: int) -> Experiment:
    """Makes a run's last stage longer, so that `chain.run` continues it.

    Called again after a stop, it changes nothing more. All processes call it. If the extension
    continues from before the stage's end, the run as it was stays in `RUN/ended/STEP`, a run of its
    own.

    Args:
      workdir: the run's folder.
      stage: the stage's index or name; "": the last finished one.
      steps: number of steps to add.

    Returns:
      The longer config to train, and the extension.

    Raises:
      UserError: the stage is not the last one, or the extension cannot be exact; nothing changes.
    """
    run = RunFolder(workdir)
    config = experiment_file.config_of(run)
    chain.set_up(config)
    with run.writing():
        processes.once(lambda: _prepare(run, stage, steps))
    experiment = experiment_file.read(run)
    assert experiment is not None  # written above
    return experiment


def _prepare(run: RunFolder, stage: str, steps: int) -> None:
    if begun := _begun(run):
        _check_same(run, begun, stage, steps)
        entry = next((s for s in run.stages() if s["name"] == begun.stage), None)
        if entry is None:
            return  # prepared: it is being trained
        experiment = experiment_file.read(run)
        assert experiment is not None
    else:
        experiment = _longer(run, stage, steps)
        experiment_file.write(run, experiment)
    _rewrite(run, experiment)


def _begun(run: RunFolder) -> Extension | None:
    """Returns the extension that has begun and is not finished."""
    experiment = experiment_file.read(run)
    if experiment is None or experiment.extension is None:
        return None
    wanted = {stage.name: stage.steps for stage in experiment.config.stages}
    done = {entry["name"]: entry["steps"] for entry in run.stages()}
    name = experiment.extension.stage
    return None if done.get(name) == wanted[name] else experiment.extension


def _check_same(run: RunFolder, begun: Extension, stage: str, steps: int) -> None:
    """Raises UserError unless a call asks for the extension that has begun."""
    index = next(folder.index for folder in run.begun() if folder.name == begun.stage)
    if steps != begun.steps or stage not in ("", begun.stage, str(index)):
        raise UserError(
            f"{run.path}: an extension of stage {begun.stage} by {begun.steps} steps has begun; "
            f"finish it first: --stage={begun.stage} --steps=+{begun.steps}"
        )


def _longer(run: RunFolder, stage: str, steps: int) -> Experiment:
    """Returns the longer config and the extension. Raises UserError if it cannot be exact."""
    before = experiment_file.read(run) or Experiment(experiment_file.config_of(run))
    finished = run.finished_stage(stage)
    index, name = finished["index"], finished["name"]
    later = [f.name for f in run.begun() if f.index > index]
    if later:
        raise UserError(
            f"{run.path}: stage {name} is not the last one: stage {later[0]} grew out of it; give "
            f"--stage={later[-1]}, or begin a new run with flm branch {run.path}:{name}"
        )
    point = branch.find(f"{run.path}:{index}")
    longer = _with_more_steps(before.config, index, steps)
    step = _continues_from(point, before, longer, steps)
    return dataclasses.replace(before, config=longer, extension=Extension(name, step, steps))


def _with_more_steps(config: ExperimentConfig, index: int, added: int) -> ExperimentConfig:
    """The config with a number of steps added to one stage's."""
    stages = list(config.stages)
    stages[index] = dataclasses.replace(stages[index], steps=stages[index].steps + added)
    return dataclasses.replace(config, stages=tuple(stages))


def _continues_from(point: Point, before: Experiment, longer: ExperimentConfig, added: int) -> int:
    """The latest kept step of this run up to which two configs have the same learning rates."""
    config, origin = before.config, before.origin
    index, name = point.stage.index, config.stages[point.stage.index].name
    kept, kind = point.stage.steps(), config.schedule.kind
    same = _same_rates(config, longer, index, point.step)
    first = origin.step if origin and origin.index == index else 0
    usable = [step for step in kept if first <= step <= same]
    # A cosine changes from its first step on: what is left of the run is hardly anything.
    if usable and (kind != "cosine" or same == point.step):
        return usable[-1]
    if kind == "cosine":
        why = f"a cosine falls over all steps, so that more of them change the rates from {same} on"
    else:
        why = f"the decay begins at step {same}, and no checkpoint from before it was kept"
    total = config.schedule.total_steps or config.total_steps
    new_steps = longer.stages[index].steps
    new = f"flm branch {point.run.path}:{name}:{point.step} --workdir=NEW"
    new += f" --config.stages[{index}].steps={new_steps}"
    raise UserError(
        f"{point.run.path}: {added} more steps of stage {name} would not make a longer run: "
        f"{why} (checkpoints: {', '.join(map(str, kept))}). Possible instead: "
        f"{new} --config.schedule.total_steps={total} (the added steps train at the last rate), "
        f"or {new} (the rate jumps to that of the longer schedule)"
    )


def _same_rates(one: ExperimentConfig, other: ExperimentConfig, index: int, end: int) -> int:
    """The number of first steps, at most `end`, in which the stages' rates have the same bits."""
    steps = jnp.arange(end, dtype=jnp.int32)
    rates = [np.asarray(jax.vmap(optimizer_of(c, index)[1])(steps)) for c in (one, other)]
    differing = np.flatnonzero(rates[0] != rates[1])
    return int(differing[0]) if len(differing) else end


def _rewrite(run: RunFolder, experiment: Experiment) -> None:
    """Makes the stage unfinished, at the step that it continues from.

    lineage.json is written last: until it lacks the stage, a second call repeats all of this.
    """
    extension = experiment.extension
    assert extension is not None
    done = run.stages()
    entry = next(s for s in done if s["name"] == extension.stage)
    stage = run.stage(entry["index"], entry["name"])
    end = int(entry["checkpoint"].rpartition("/")[2])
    if extension.step < end:
        ended = RunFolder(run.path / "ended" / str(end))
        before = _with_more_steps(experiment.config, entry["index"], -extension.steps)
        experiment_file.write(ended, Experiment(before, experiment.origin))
        run.branch(ended)
    config, _ = chain.on_devices(experiment.config, jax.devices())
    start, origin = 0, experiment.origin
    for s in done[: entry["index"] + 1]:
        start += s["steps"]
        if origin and origin.covers(s["index"], start) and s is not entry:
            continue  # it was trained in another run
        # Their steps had the same rates in the longer run, so this is how they were trained.
        folder = run.stage(s["index"], s["name"])
        write_json(folder.config, identity(config, s["index"], s["data_fingerprint"]))
        s["config_digest"] = mapping.digest(folder.saved())
    stage.metrics.rewind(extension.step)
    for step in stage.steps():
        if step > extension.step:
            paths.remove(stage.checkpoints / str(step))
    write_json(run.lineage, {"version": entries.VERSION, "stages": done[: entry["index"]]})
