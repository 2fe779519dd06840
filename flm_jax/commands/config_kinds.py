"""Which config each command takes, and for which command a config is meant."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable

# Class of a config -> the commands that take it. The first one is named in errors.
KINDS = {
    "flm_jax.config:ExperimentConfig": ("train",),
    "flm_jax.sft.config:SftConfig": ("sft",),
    "flm_jax.studies.config:ProbeConfig": ("growth probe",),
    "flm_jax.studies.config:MupStudyConfig": (
        "mup check",
        "mup sweep",
        "mup growth",
        "mup predict",
    ),
    "flm_jax.studies.less_is_more:LessIsMoreConfig": ("less_is_more",),
    "flm_jax.studies.growth_study.config:GrowthStudyConfig": ("study",),
}


def class_of(command: str) -> type:
    """The class of a command's config; a command that is not listed takes a chain."""
    listed = (path for path, commands in KINDS.items() if command in commands)
    return _load(next(listed, next(iter(KINDS))))


def command_for(fields: Iterable[str], cls: type) -> str:
    """The command that takes a config with these fields, if it is of another kind than `cls`.

    Args:
      fields: names at the top of the config.
      cls: the class that the called command takes.

    Returns:
      The command's name; "" if the fields fit `cls`, or fit none.

    >>> from flm_jax.config import ExperimentConfig
    >>> command_for(["experiment", "arms", "seeds"], ExperimentConfig)
    'growth probe'
    """
    # A chain of one stage may be written flat.
    names = {"stages" if name in ("model", "stage") else name for name in fields}
    fitting = [path for path in KINDS if _fits(names, _load(path))]
    if not fitting or cls in map(_load, fitting):
        return ""
    return KINDS[fitting[0]][0]


def _fits(names: set[str], cls: type) -> bool:
    fields = dataclasses.fields(cls)
    needed = {
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    return needed <= names <= {field.name for field in fields}


def _load(path: str) -> type:
    module, _, name = path.partition(":")
    cls: type = getattr(importlib.import_module(module), name)
    return cls
