"""Checks all files of a run against what was recorded of them (`flm inspect --verify`)."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

from flm_jax import growth, mapping
from flm_jax.errors import UserError
from flm_jax.interop.converter import digest_on_disk
from flm_jax.params.digest import SCHEME
from flm_jax.runtime import paths
from flm_jax.store import audit
from flm_jax.store.chunked import CheckpointReader
from flm_jax.store.lineage import RunFolder, StageFolder

MEMORY = 256 << 20  # bytes of arrays that are held at once

Verdict = Literal["intact", "damaged", "missing", "not verifiable", "set aside"]
BAD: tuple[Verdict, ...] = ("damaged", "missing")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
      file: the file or checkpoint, relative to the run's folder.
      what: what was checked: "digest", "arrays", or an array's name.
      verdict: the result. "not verifiable": nothing recorded says what it should be.
      detail: why.
    """

    file: str
    what: str
    verdict: Verdict
    detail: str = ""

    @property
    def bad(self) -> bool:
        """Whether the run needs repair."""
        return self.verdict in BAD


def verify(run: RunFolder) -> list[Finding]:
    """Checks a run: lineage, configs, plans, receipts, metrics and all checkpoints.

    Memory stays bounded; all arrays are read once, those of each stage's result twice.

    Args:
      run: the run's folder.

    Raises:
      UserError: the folder holds no run.
    """
    folders = run.folders()
    if not folders:
        raise UserError(f"{run.path} holds no run (no stages/); give a run's folder")
    found = list(_lineage(run))
    entries = {}
    if not any(each.bad for each in found) and run.lineage.exists():
        entries = {entry["index"]: entry for entry in run.stages()}
    for folder in folders:
        found += _stage(folder, entries.get(folder.index))
    held = {folder.index for folder in folders}
    for index in sorted(set(entries) - held):
        found.append(Finding(f"stages/{index}-{entries[index]['name']}", "folder", "missing"))
    return found


def _lineage(run: RunFolder) -> Iterator[Finding]:
    """Whether lineage.json is there where it must be, and can be read."""
    try:
        finished = run.stages()
    except UserError as error:
        verdict: Verdict = "damaged" if run.lineage.exists() else "missing"
        yield Finding(run.lineage.name, "form", verdict, str(error))
        return
    if run.lineage.exists():
        yield Finding(run.lineage.name, "form", "intact", f"{len(finished)} finished stages")


def _stage(folder: StageFolder, entry: dict[str, Any] | None) -> Iterator[Finding]:
    """All findings of a stage; `entry`: of lineage.json, None if it has none."""
    started = bool(entry or folder.steps())
    grown = entry["plan_digest"] is not None if entry else folder.index > 0
    recorded = entry or {}
    yield from _file(folder, folder.config, started, recorded.get("config_digest"), _config_digest)
    if grown:
        receipt = mapping.digest(entry["receipt"]) if entry else None
        yield from _file(folder, folder.plan, started, recorded.get("plan_digest"), _plan_digest)
        yield from _file(folder, folder.receipt, started, receipt, _receipt_digest)
    if folder.metrics.path.exists():
        yield from _file(folder, folder.metrics.path, False, None, _rows)
    result = folder.run.path / entry["checkpoint"] if entry else None
    steps = folder.steps()
    for step in steps:
        path = folder.checkpoints / str(step)
        yield from _checkpoint(folder, path, entry if path == result else None)
    if result and int(result.name) not in steps:
        yield Finding(_in_run(folder, result), "arrays", "missing")
    for path in sorted(paths.listed(folder.path / "damaged")):
        yield Finding(_in_run(folder, path), "arrays", "set aside", "a run found it damaged")


def _config_digest(folder: StageFolder) -> str:
    folder.experiment()
    return mapping.digest(folder.saved())


def _plan_digest(folder: StageFolder) -> str:
    return growth.Plan.from_json(folder.plan_text()).digest()


def _receipt_digest(folder: StageFolder) -> str:
    return mapping.digest(folder.saved_receipt())


def _rows(folder: StageFolder) -> str:
    folder.metrics.rows()
    return ""


def _file(
    folder: StageFolder,
    path: pathlib.Path,
    required: bool,
    recorded: str | None,
    digest: Callable[[StageFolder], str],
) -> Iterator[Finding]:
    """The finding of a small file; `recorded`: the digest that it must have, if any is recorded."""
    file = _in_run(folder, path)
    if not path.exists():
        if required:
            yield Finding(file, "digest", "missing")
        return
    try:
        have = digest(folder)
    except UserError as error:
        yield Finding(file, "form", "damaged", str(error))
        return
    if not recorded:
        yield Finding(file, "form", "not verifiable", "readable; no digest of it is recorded")
    elif have != recorded:
        detail = f"{have[:12]}, lineage.json says {recorded[:12]}"
        yield Finding(file, "digest", "damaged", detail)
    else:
        yield Finding(file, "digest", "intact")


def _checkpoint(
    folder: StageFolder, path: pathlib.Path, entry: dict[str, Any] | None
) -> Iterator[Finding]:
    """The findings of a checkpoint; `entry`: of the stage whose result it is."""
    file, damage = _in_run(folder, path), audit.damage(path)
    for name, detail in damage.items():
        yield Finding(file, name or "all", "damaged", detail)
    if damage:
        return
    reader = CheckpointReader(path)
    if reader.verifiable:
        yield Finding(file, "arrays", "intact", f"{len(reader.leaves)} arrays")
    else:
        detail = "readable and finite; an earlier version wrote no checksums"
        yield Finding(file, "arrays", "not verifiable", detail)
    if entry is None or not entry["params_digest"].startswith(SCHEME):
        return
    have = digest_on_disk(reader, folder.experiment().stages[0].model, MEMORY)
    same = have == entry["params_digest"]
    detail = "" if same else f"{have[:15]}, lineage.json says {entry['params_digest'][:15]}"
    yield Finding(file, "params_digest", "intact" if same else "damaged", detail)


def _in_run(folder: StageFolder, path: pathlib.Path) -> str:
    return os.fspath(path.relative_to(folder.run.path))
