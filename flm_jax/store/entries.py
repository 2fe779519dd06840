"""Checks of what a run's files say, for readers of runs that they did not write.

lineage.json and metrics.jsonl stay plain JSON values: later versions add fields, which are kept.
What readers rely on is checked here, once, when a file is read.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from flm_jax import mapping
from flm_jax.checks import require, require_version
from flm_jax.data import json_text
from flm_jax.errors import UserError
from flm_jax.mapping import Checked
from flm_jax.runtime import regular

VERSION = 1  # of lineage.json, config.json, receipt.json and a checkpoint's position
_NAME = re.compile(r"[\w-]{1,60}")
_MEASURED = (
    "max_abs_logit_diff", "logit_scale", "loss_before", "loss_after", "dead_slots", "locked_copies",
)  # fmt: skip
_NUMBERS = {"eval": ("bpb",), "train": ("loss", "mask")}  # of rows of metrics.jsonl, by kind


@dataclasses.dataclass(frozen=True)
class Entry(Checked):
    """The fields of a finished stage in lineage.json that every reader may rely on."""

    index: int
    name: str
    parent: str | None
    config_digest: str
    plan_digest: str | None
    params: int
    tokens: int
    flops: float
    wall_s: float
    steps: int
    params_digest: str
    checkpoint: str  # relative to the run's folder, and inside the stage's
    data_fingerprint: str

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(_NAME.fullmatch(self.name)),
            f"Entry.name is {self.name!r}; it names a folder: up to 60 letters, digits, - and _",
        )
        place = f"stages/{self.index}-{self.name}/checkpoints/"
        require(
            bool(re.fullmatch(rf"{re.escape(place)}[0-9]+", self.checkpoint)),
            f"Entry.checkpoint is {self.checkpoint!r}; it must be {place}STEP",
        )


@dataclasses.dataclass(frozen=True)
class Growth(Checked):
    """The fields of an entry's receipt that every reader may rely on."""

    operator: str
    exactness: str


def read_lineage(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the entries of lineage.json.

    Raises:
      UserError: the file is damaged, has another version, or an entry has a wrong value; names it.
    """
    advice = "restore the file"
    data = json_text.read_object(path, advice)
    require_version(str(path), data, VERSION, first=0)
    entries = data.get("stages")
    if not isinstance(entries, list):
        raise UserError(f"{path}: stages is no list; {advice}")
    for place, entry in enumerate(entries):
        try:
            _check_entry(entry, place)
        except UserError as error:
            raise UserError(f"{path}: {error}; {advice}") from None
    return entries


def _check_entry(entry: Any, place: int) -> None:
    """Raises UserError if an entry is not what readers rely on."""
    path = f"stages[{place}]"
    checked = _fields(Entry, entry, path)
    require(checked.index == place, f"{path}.index is {checked.index}; it must be {place}")
    scores = entry.get("eval")
    require(isinstance(scores, dict), f"{path}.eval is no group of named values")
    for name in dict.fromkeys(("bpb_start", "bpb_end", *scores)):
        _check_number(scores, name, f"{path}.eval", null=True)
    require(isinstance(entry.get("origin", {}), dict), f"{path}.origin is no group of values")
    require("receipt" in entry, f"{path}.receipt is missing; it is null or a group of values")
    receipt = entry["receipt"]
    if receipt is not None:
        has_plan = isinstance(checked.plan_digest, str)
        require(has_plan, f"{path} has a receipt, and plan_digest is null")
        _check_receipt(receipt, f"{path}.receipt", measured=True)


def _check_receipt(receipt: Any, path: str, measured: bool) -> None:
    """Raises UserError unless it is a growth's receipt; `measured`: and has its measurements."""
    _fields(Growth, receipt, path)
    for name in _MEASURED:
        _check_number(receipt, name, path, null=not measured)
    for name in ("layer_distances", "layer_map"):
        values = receipt.get(name)
        require(isinstance(values, list | None), f"{path}.{name} is no list")
        for value in values or ():
            _check_number({name: value}, name, path, null=False)


def _fields(cls: type[mapping.T], values: Any, path: str) -> mapping.T:
    """Checks the fields that readers rely on; leaves out the others."""
    if not isinstance(values, Mapping):
        raise UserError(f"{path} is no group of named values")
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    named = {name: value for name, value in values.items() if name in known}
    return mapping.from_mapping(cls, named, path)


def _check_number(values: Mapping[str, Any], name: str, path: str, null: bool) -> None:
    """Raises UserError unless a value is a number; one that diverged may be NaN or infinite."""
    value = values.get(name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = not isinstance(value, int) or abs(value) < 2**63
    require(
        (number and fits) or (null and value is None and name in values),
        f"{path}.{name} is {value!r}; it must be a number{' or null' if null else ''}",
    )


def logit_change(receipt: Mapping[str, Any]) -> float:
    """The largest change of a logit over the root mean square of the logits; NaN if that is 0."""
    change, scale = receipt["max_abs_logit_diff"], receipt["logit_scale"]
    return float(change / scale) if scale else math.nan


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the rows of metrics.jsonl, without an incomplete last line.

    Raises:
      UserError: another line is damaged; names it.
    """
    if not path.exists():
        return []
    lines = regular.read(path, regular.DATA_BYTES).split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json_text.parse(line)
            _check_row(row)
        except ValueError as error:
            if number == len(lines):  # its end was not written
                break
            raise UserError(
                f"{path}, line {number}: {error}; restore the file, or remove the line"
            ) from None
        rows.append(row)
    return rows


def _check_row(row: Any) -> None:
    """Raises ValueError if a row is not what readers rely on."""
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        raise ValueError("no row with a kind")
    _check_number(row, "step", "the row", null=False)
    for name in _NUMBERS.get(row["kind"], ()):
        _check_number(row, name, "the row", null=False)


def saved_config(path: pathlib.Path) -> dict[str, Any]:
    """Reads config.json of a stage.

    Raises:
      UserError: it is not the config of a stage.
    """
    try:
        saved = json_text.read_object(path, "restore the file")
    except UserError as error:
        raise UserError(f"{path}: not the config of a stage ({error})") from None
    require_version(str(path), saved, VERSION)
    stage, sft = saved.get("stage"), saved.get("sft", {})
    if not isinstance(stage, dict) or not isinstance(stage.get("source", ""), str):
        raise UserError(f"{path}: not the config of a stage; restore the file")
    if not isinstance(sft, dict) or not isinstance(sft.get("template", {}), dict):
        raise UserError(f"{path}: sft is not the config of a fine-tuning; restore the file")
    return saved


def saved_receipt(path: pathlib.Path) -> dict[str, Any]:
    """Reads receipt.json of a stage, whose measurements may be missing (null).

    Raises:
      UserError: it is not a growth's receipt.
    """
    receipt = json_text.read_object(path, "restore the file")
    require_version(str(path), receipt, VERSION)
    try:
        receipt = {**dict.fromkeys(_MEASURED), **receipt}
        _check_receipt(receipt, "receipt", measured=False)
    except UserError as error:
        raise UserError(f"{path}: {error}; restore the file") from None
    return receipt
