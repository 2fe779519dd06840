"""Rebuilds files of a run from the other files (`flm inspect --repair`).

A rebuilt file is certain: it has the digest that lineage.json recorded, or it is a pure function of
files that are intact. What nothing determines is not guessed, and stays missing. A damaged file is
renamed to NAME.damaged before another takes its place.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from flm_jax import growth, mapping
from flm_jax.errors import UserError
from flm_jax.growth.receipt import measured
from flm_jax.interop.converter import digest_on_disk
from flm_jax.runs.entry import entry_of
from flm_jax.runs.stage import plan_of
from flm_jax.runs.verify import MEMORY, verify
from flm_jax.store import entries
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.store.chunked import CheckpointReader
from flm_jax.store.files import write_atomically, write_json
from flm_jax.store.lineage import RunFolder, StageFolder


@dataclasses.dataclass(frozen=True)
class Repair:
    """What became of a file.

    Attributes:
      file: relative to the run's folder.
      rebuilt: whether it is there again.
      detail: what it was rebuilt from, or why it could not be.
    """

    file: str
    rebuilt: bool
    detail: str


def repair(run: RunFolder) -> list[Repair]:
    """Rebuilds the missing and damaged small files of a run; never touches a checkpoint.

    Raises:
      UserError: the folder holds no run, or another run is writing to it.
    """
    bad = {finding.file for finding in verify(run) if finding.bad}
    with run.writing():
        done = []
        lineage = run.lineage.name in bad
        recorded = {} if lineage else {entry["index"]: entry for entry in run.stages()}
        # In the order in which one needs the other.
        for folder in run.folders():
            for path, rebuild in (
                (folder.config, _config),
                (folder.plan, _plan),
                (folder.receipt, _receipt),
            ):
                if _in_run(run, path) in bad:
                    entry = recorded.get(folder.index)
                    done.append(_attempt(run, path, functools.partial(rebuild, folder, entry)))
        if lineage:
            done.append(_attempt(run, run.lineage, lambda: _lineage(run)))
        rebuilt = {each.file for each in done}
        for file in sorted(bad - rebuilt):
            detail = "arrays cannot be rebuilt; restore them from a copy, or resume the run, which "
            done.append(Repair(file, False, f"{detail}uses an earlier checkpoint"))
    return done


def _attempt(run: RunFolder, path: pathlib.Path, rebuild: Callable[[], str]) -> Repair:
    """Rebuilds one file: `rebuild` writes it, and says from what. Keeps the damaged one."""
    kept = path.with_name(path.name + ".damaged")
    if path.exists():
        path.replace(kept)
    try:
        return Repair(_in_run(run, path), True, rebuild())
    except (UserError, _Unknown) as error:
        if kept.exists() and not path.exists():
            kept.replace(path)
        return Repair(_in_run(run, path), False, str(error))


class _Unknown(Exception):
    """No file says what was in the missing one."""


def _config(folder: StageFolder, entry: dict[str, Any] | None) -> str:
    """config.json: another stage's, with what lineage.json and the plans say of this one."""
    if entry is None:
        raise _Unknown("lineage.json has no digest of it; give the same config to a new workdir")
    for saved, source in _candidates(folder, entry):
        if mapping.digest(saved) == entry["config_digest"]:
            write_json(folder.config, saved)
            return f"from {source}; it has the digest in lineage.json"
    raise _Unknown("no other stage's config has its settings; restore it from a copy")


def _candidates(folder: StageFolder, entry: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Configs that this stage may have had, and from where."""
    for other in folder.run.folders():
        if other.index == folder.index or not other.config.exists():
            continue
        saved = other.saved()
        known = {"name": folder.name, "steps": entry["steps"]}
        for model, where in _models(folder):
            stage = saved["stage"] | known | {"model": model}
            config = saved | {"stage": stage, "data_fingerprint": entry["data_fingerprint"]}
            yield config, f"{_in_run(folder.run, other.config)} and the model in {where}"


def _models(folder: StageFolder) -> Iterator[tuple[Any, str]]:
    """The stage's model, where a plan says it: its own, or that of the next stage."""
    for other in folder.run.folders():
        side = {folder.index: "target", folder.index + 1: "source"}.get(other.index)
        if side and other.plan.exists():
            plan = growth.Plan.from_json(other.plan_text())
            yield mapping.to_dict(getattr(plan, side)), _in_run(folder.run, other.plan)


def _plan(folder: StageFolder, entry: dict[str, Any] | None) -> str:
    """plan.json: planned again from the configs and the distances in the receipt."""
    receipt = entry["receipt"] if entry else folder.saved_receipt()
    parent = next(f for f in folder.run.folders() if f.index == folder.index - 1)
    small, stage = parent.experiment().stages[0].model, folder.experiment().stages[0]
    plan = plan_of(small, stage, receipt.get("layer_distances"))
    if entry and plan.digest() != entry["plan_digest"]:
        raise _Unknown("planned again it has another digest (a learned growth?); restore it")
    if any(expansion.learned for expansion in plan.expansions):
        raise _Unknown("its growth was learned; restore the file, or start the stage again")
    write_atomically(folder.plan, plan.to_json() + "\n")
    why = "it has the digest in lineage.json" if entry else "no digest of it is recorded"
    return f"from the configs of both stages and the receipt; {why}"


def _receipt(folder: StageFolder, entry: dict[str, Any] | None) -> str:
    if entry is None or not measured(entry["receipt"]):
        raise _Unknown("the stage is not finished; delete its checkpoints to grow it again")
    write_json(folder.receipt, entry["receipt"])
    return "from lineage.json"


def _lineage(run: RunFolder) -> str:
    """lineage.json: one entry for each stage with a checkpoint at its end."""
    found: list[dict[str, Any]] = []
    for folder in run.folders():
        end = folder.experiment().stages[0].steps + sum(entry["steps"] for entry in found)
        if folder.index != len(found) or end not in folder.steps():
            break
        found.append(_entry(folder, found))
    if not found:
        raise _Unknown("no stage is finished; the same command resumes it")
    write_json(run.lineage, {"version": entries.VERSION, "stages": found})
    entries.read_lineage(run.lineage)
    return f"{len(found)} stages, from their folders; without the flags and times that only it had"


def _entry(folder: StageFolder, before: list[dict[str, Any]]) -> dict[str, Any]:
    checkpoints = Checkpoints(folder.checkpoints)
    step = checkpoints.best
    checkpoints.close()
    assert step is not None
    plan = growth.Plan.from_json(folder.plan_text()) if folder.plan.exists() else None
    reader = CheckpointReader(folder.checkpoints / str(step))
    model = folder.experiment().stages[0].model
    start = sum(entry["steps"] for entry in before)
    return entry_of(folder, before[-1]["name"] if plan else None, plan, start, step) | {
        "wall_s": reader.progress.get("wall_s", 0.0),
        "params_digest": digest_on_disk(reader, model, MEMORY),
        "checkpoint": _in_run(folder.run, reader.path),
    }


def _in_run(run: RunFolder, path: pathlib.Path) -> str:
    return os.fspath(path.relative_to(run.path))
