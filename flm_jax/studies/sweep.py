"""A sweep: one run for each combination of values of some config fields.

Each run has a folder of its own, with what the values say as its name. What is finished is not run
again. A run that fails is reported, and does not stop the others.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from flm_jax import mapping
from flm_jax.config import ExperimentConfig
from flm_jax.errors import UserError
from flm_jax.runs import chain, comparison, report
from flm_jax.store.files import write_result
from flm_jax.store.lineage import RunFolder
from flm_jax.store.trials import Trials

_LONGEST = 60  # letters of a folder's name


@dataclasses.dataclass(frozen=True)
class Trial:
    """One combination of values.

    Attributes:
      values: the values, as given, by field.
      name: what it is called: the values by the shortest names of their fields.
      folder: the name of its run's folder.
      config: makes its config, or raises UserError.
    """

    values: Mapping[str, str]
    name: str
    folder: str
    config: Callable[[], ExperimentConfig]


def parse(given: Sequence[str]) -> dict[str, list[str]]:
    """Parses the fields of a sweep.

    Args:
      given: FIELD=VALUE,VALUE,... for each field. With a ";" among them, values are separated by
        it, and may have commas.

    Returns:
      The values of each field, as text.

    Raises:
      UserError: a text has another form, or a field or a value comes twice.

    >>> parse(["seed=0,1", "stages[1].growth.recipe=msg;tile,identity"])
    {'seed': ['0', '1'], 'stages[1].growth.recipe': ['msg', 'tile,identity']}
    """
    fields: dict[str, list[str]] = {}
    for text in given:
        field, equals, values = text.partition("=")
        field = field.strip().removeprefix("config.")
        listed = [value.strip() for value in values.split(";" if ";" in values else ",")]
        if not (field and equals and all(listed)):
            raise UserError(
                f"sweep={text}: give FIELD=VALUE,VALUE,... (or VALUE;VALUE where a value has "
                "commas), as seed=0,1",
                argument="sweep",
            )
        twice = [value for value, count in Counter(listed).items() if count > 1]
        if twice or field in fields:
            what = f"value {twice[0]!r} of {field}" if twice else f"field {field}"
            raise UserError(f"sweep={text}: {what} is given twice; give it once", argument="sweep")
        fields[field] = listed
    if not fields:
        raise UserError("sweep is missing; give FIELD=VALUE,VALUE,...", argument="sweep")
    return fields


def trials(
    fields: Mapping[str, Sequence[str]],
    config_of: Callable[[Mapping[str, str]], Callable[[], ExperimentConfig]],
) -> list[Trial]:
    """Returns all combinations of values, the last field changing fastest.

    Args:
      fields: the values of each field; see `parse`.
      config_of: values by field -> the trial's `config`.
    """
    short = _short_names(list(fields))
    points = [dict(zip(fields, p, strict=True)) for p in itertools.product(*fields.values())]
    names = [" ".join(f"{short[f]}={v}" for f, v in point.items()) for point in points]
    counts = Counter(_slug(name) for name in names)
    folders = [
        _slug(name) if counts[_slug(name)] == 1 else _slug(name, mapping.digest({"": name})[:8])
        for name in names
    ]
    return [
        Trial(point, name, folder, config_of(point))
        for point, name, folder in zip(points, names, folders, strict=True)
    ]


def _short_names(fields: Sequence[str]) -> dict[str, str]:
    """The shortest last part of each field that tells it from the others.

    >>> _short_names(["stages[0].steps", "stages[1].steps", "seed"])
    {'stages[0].steps': 'stages[0].steps', 'stages[1].steps': 'stages[1].steps', 'seed': 'seed'}
    """
    names = {}
    for field in fields:
        parts = field.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        others = [f".{other}" for other in fields if other != field]
        names[field] = next(
            (end for end in ends if not any(o.endswith(f".{end}") for o in others)), field
        )
    return names


def _slug(name: str, suffix: str = "") -> str:
    """A folder's name: letters, digits and `._+-` of a trial's name, and its digest if it is long.

    >>> _slug("recipe=tile,identity seed=0")
    'recipe-tile-identity_seed-0'
    """
    slug = "_".join(re.sub(r"[^\w.+-]+", "-", word).strip("-.") for word in name.split())
    if len(slug) > _LONGEST:
        slug, suffix = slug[: _LONGEST - 9], suffix or mapping.digest({"": name})[:8]
    return f"{slug}-{suffix}" if suffix else slug


def run(
    listed: Sequence[Trial], root: pathlib.Path, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Runs the trials that are not finished.

    Args:
      listed: the trials.
      root: the sweep's folder: `runs/FOLDER` of each trial, `trials.jsonl`, and `sweep.json`, the
        result.
      note: shows one line.

    Returns:
      The rows of `rows`, finished ones first, by their final bits per byte.

    Raises:
      RunStopped: a signal stopped it; the same call continues.
    """
    stored = Trials(root / "trials.jsonl")
    for number, trial in enumerate(listed, start=1):
        if stored.find(_identity(trial)) is None:
            note(f"run {number} of {len(listed)}: {trial.name}")
        row = stored.result(_identity(trial), lambda trial=trial: _result(trial, root))  # type: ignore[misc]
        if "failure" in row:
            note(f"{trial.name} failed: {row['failure']}")
    result = rows(listed, root)
    write_result(root / "sweep.json", {"runs": result})
    return result


def rows(listed: Sequence[Trial], root: pathlib.Path) -> list[dict[str, Any]]:
    """Returns what is known of each trial, in JSON values; trains nothing.

    Each row has `name`, `values`, `folder` and `status`: "finished", "failed", "begun" or "not
    begun". A finished one also has the numbers of `comparison.Run.row`, a failed one `failure`.
    """
    stored = Trials(root / "trials.jsonl")
    found = []
    for trial in listed:
        folder = folder_of(trial, root)
        row = {"name": trial.name, "values": dict(trial.values), "folder": str(folder.path)}
        if stored.find(_identity(trial)) is not None:
            numbers = comparison.read(str(folder.path), trial.name).row()
            found.append({**row, "status": "finished", **numbers})
        elif failure := stored.failure(_identity(trial)):
            found.append({**row, "status": "failed", "failure": failure})
        else:
            begun = "begun" if folder.begun() else "not begun"
            found.append({**row, "status": begun})
    return sorted(found, key=lambda row: (row["status"] != "finished", row.get("bpb_final") or 0.0))


def folder_of(trial: Trial, root: pathlib.Path) -> RunFolder:
    """The folder of a trial's run."""
    return RunFolder(root / "runs" / trial.folder)


def _identity(trial: Trial) -> dict[str, str]:
    """What a trial's result belongs to: its config, or its values if they make none."""
    try:
        values = mapping.to_dict(trial.config())
    except UserError:
        values = dict(trial.values)
    return {"key": mapping.digest(values), "folder": trial.folder}


def _result(trial: Trial, root: pathlib.Path) -> dict[str, Any]:
    """Runs a trial; the row of its result, or of its failure."""
    folder = folder_of(trial, root)
    try:
        # Trials that differ in a seed or a rate share their programs.
        stages = chain.run(trial.config(), str(folder.path), root / "compiled")
        report.write(folder)
    except UserError as error:
        return {"name": trial.name, "failure": str(error)}
    finally:
        jax.clear_caches()
    return {"name": trial.name, "bpb": stages[-1]["eval"]["bpb_end"]}
