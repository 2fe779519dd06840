"""Config files: helpers for those who write one, and how a command finds and opens one.

A config file defines `get_config(variant)` and returns a ConfigDict. It may use the configs that
come with the package, from any folder:

  from flm_jax.commands import config_files

  demo = config_files.shipped("demo")
  config = config_files.to_config_dict(...)
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.machinery
import importlib.util
import pathlib
import re
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_flags import config_path

from flm_jax import config as config_lib
from flm_jax import mapping
from flm_jax.commands import config_kinds
from flm_jax.errors import UserError
from flm_jax.interop.stage_source import resolved

T = TypeVar("T")


# For config files.


def to_config_dict(config: Any) -> ConfigDict:
    """Converts a config dataclass to a ConfigDict, which knows the type of every field.

    Overrides on the command line are checked against these types. Stages become a tuple of
    ConfigDicts: `--config.stages[0].steps=5`.
    """

    def with_types(value: Any) -> Any:
        if isinstance(value, dict):
            return ConfigDict({k: with_types(v) for k, v in value.items()})
        return tuple(with_types(v) for v in value) if isinstance(value, list) else value

    return with_types(mapping.to_full_dict(config))


def single(config: config_lib.ExperimentConfig) -> ConfigDict:
    """Converts a chain of one stage to `model` and `stage`: `--config.model.vocab_size=80384`."""
    values = mapping.to_full_dict(config)
    (stage,) = values.pop("stages")
    model = stage.pop("model")
    return ConfigDict({**values, "model": model, "stage": stage})


def unknown_variant(variant: str, known: tuple[str, ...]) -> UserError:
    """The error for a variant that a config file does not have."""
    return UserError(f"config variant {variant!r} is unknown; choose {', '.join(known)} or none")


def no_variant(variant: str) -> None:
    """Raises UserError if `variant` is given; for a config file without variants."""
    if variant:
        raise UserError(f"config variant {variant!r} is unknown; this config has none")


def shipped(name: str) -> types.ModuleType:
    """The module of a config file that comes with the package, as `shipped("tele_flm_52b")`."""
    return load(shipped_folder() / f"{name}.py")


def load(path: pathlib.Path) -> types.ModuleType:
    """Runs a config file, from any folder, and returns its module."""
    name = f"config file {path}"
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec  # None only if the loader refuses
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up annotations there
    loader.exec_module(module)
    return module


# For commands.


def experiment(config: ConfigDict) -> config_lib.ExperimentConfig:
    """The config as a validated dataclass, with what it takes from its source (`resolved`)."""
    _check_kind(config_lib.ExperimentConfig, config)
    return resolved(config_lib.experiment(plain(config)))


def stage_index(config: config_lib.ExperimentConfig, given: int) -> int:
    """Resolves a stage's index; a negative one counts from the end.

    Raises:
      UserError: the chain has no such stage.
    """
    count = len(config.stages)
    if not -count <= given < count:
        raise UserError(
            f"stage={given}: the config has stages 0 to {count - 1}; give one", argument="stage"
        )
    return given % count


def dataclass_of(cls: type[T], config: ConfigDict) -> T:
    """A config of another kind than an experiment, as a validated dataclass."""
    _check_kind(cls, config)
    return mapping.from_mapping(cls, plain(config))


def _check_kind(cls: type, config: ConfigDict) -> None:
    """Raises UserError if the config is meant for a command that takes another kind of config."""
    if other := config_kinds.command_for(config, cls):
        raise UserError(
            f"--config has {', '.join(config)}: it is a config for flm {other}, and this command "
            f"takes a {cls.__name__}; call flm {other}, or give another config"
        )


def plain(value: Any) -> Any:
    """ConfigDicts as dicts, tuples as lists, at any depth."""
    if isinstance(value, ConfigDict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def shipped_folder() -> pathlib.Path:
    """The folder of the shipped config files: in the package, or beside it in a checkout."""
    package = pathlib.Path(mapping.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find(given: str) -> pathlib.Path:
    """The file that --config names.

    A file at that path comes first. Otherwise `configs/NAME.py`, `NAME.py` and `NAME` name one
    that comes with the package.
    """
    path = pathlib.Path(given)
    if path.is_file():
        return path
    folder = shipped_folder()
    if path.parent in (pathlib.Path(), pathlib.Path("configs")) and path.suffix in ("", ".py"):
        known = folder / f"{path.stem}.py"
        if known.is_file() and not known.stem.startswith("_"):
            return known
    names = ", ".join(sorted(p.stem for p in folder.glob("[!_]*.py") if p.stem != "common"))
    with_suffix = path.with_name(f"{path.name}.py")
    hint = f"did you mean {with_suffix}? " if with_suffix.is_file() else ""
    raise UserError(
        f"--config={given}: no such file; {hint}give one, or one of those shipped: {names}"
    )


def split(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The last value of --config ("" if there is none), and the other arguments."""
    config, items = "", iter(argv)
    rest: list[str] = []
    for item in items:
        if item == "--":
            return config, [*rest, item, *items]
        if item in ("--config", "-config"):
            config = next(items, "")
        elif item.startswith(("--config=", "-config=")):
            config = item.partition("=")[2]
        else:
            rest.append(item)
    return config, rest


def load_config(given: str) -> ConfigDict:
    """The config of FILE.py or FILE.py:variant, before overrides.

    Raises:
      UserError: the file does not exist, or has an error; the message says in which line.
    """
    name, colon, variant = given.partition(":")
    path = find(name)
    try:
        get_config = load(path).get_config
        config = get_config(variant) if colon else get_config()
    except UserError:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        where = f"{path}:{frames[-1].lineno}" if frames else path
        if wrong := _WRONG_TYPE.fullmatch(str(error)):
            raise UserError(f"{where}: {_said_plainly(**wrong.groupdict())}") from error
        raise UserError(f"{where}: {type(error).__name__}: {error}; fix the file") from error
    if not isinstance(config, ConfigDict):
        helper = (
            "; return config_files.to_config_dict(config), with from flm_jax.commands import "
            "config_files"
            if dataclasses.is_dataclass(config)
            else ""
        )
        raise UserError(
            f"{path}: get_config must return a ConfigDict, not {type(config).__name__}{helper}"
        )
    stages = config.get("stages", ()) if "stage" not in config else (config,)
    for stage in stages:
        relative = mapping.base_of(plain(stage.get("model")))
        if relative:
            with stage.ignore_type(), stage.unlocked():
                stage.model = _fields_to_override(config_lib.TransformerConfig, *relative)
    return config


# What ml_collections says of a value of another type than its field's.
_WRONG_TYPE = re.compile(
    r"Could not override field '(?P<field>.*?)' \(reference\)\. (?P<value>.*) is of original type "
    r"<class '(?P<have>[\w.]+)'> and cannot be casted to type <class '(?P<want>[\w.]+)'>",
    re.DOTALL,
)
_FORMS = {
    "ConfigDict": "a group of fields, as config_files.to_config_dict makes it",
    "tuple": "a tuple: write one entry as (entry,), with the comma",
}


def _said_plainly(field: str, value: str, have: str, want: str) -> str:
    """The error for a value of another type than its field's, with the expected form."""
    have, want = (name.rpartition(".")[2] for name in (have, want))
    given = "a group of fields" if have == "ConfigDict" else f"{value!r} of type {have}"
    forms = {f.name: f.metadata.get("form") for f in dataclasses.fields(config_lib.GrowthConfig)}
    form = f"{want}, as {forms[field]}" if forms.get(field) else _FORMS.get(want, want)
    return f"field {field!r} is {given}; it must be {form}"


def _fields_to_override(cls: type, base: str, changes: Mapping[str, Any]) -> ConfigDict:
    """A group of all fields of a config that is relative to another one.

    A field that does not change is None, so that it follows the base; it has its type all the same,
    against which overrides on the command line are checked.
    """

    def group(cls: type) -> dict[str, Any]:
        hints = typing.get_type_hints(cls)
        return {name: field(hints[name]) for name in hints}

    def field(hint: Any) -> Any:
        if dataclasses.is_dataclass(hint):
            return group(typing.cast(type, hint))
        return FieldReference(None, field_type=typing.get_origin(hint) or hint)

    fields = ConfigDict({"base": base, **group(cls)})
    with fields.ignore_type(), fields.unlocked():  # a wrong field is reported by `experiment`
        fields.update(changes)
    return fields


def check_field(config: ConfigDict, flag: str) -> None:
    """Raises UserError if `flag`, as config.stages[0].steps, is not one value of the config."""
    try:
        parts = config_path.split(flag)[1:]
    except ValueError:
        raise UserError(f"--{flag}: not a field; write it as --config.stages[0].steps") from None
    node: Any = config
    where = "config"
    for part in parts:
        if isinstance(node, ConfigDict):
            if part not in node:
                close = difflib.get_close_matches(str(part), node, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(node)}"
                raise UserError(f"--{flag}: {where} has no field {part!r}; {hint}")
            where += f".{part}"
        elif isinstance(node, tuple):
            if part not in range(len(node)):
                raise UserError(f"--{flag}: {where} has entries 0 to {len(node) - 1}, not {part!r}")
            where += f"[{part}]"
        else:
            raise UserError(f"--{flag}: {where} is {node!r} and has no fields")
        node = node[part]
    first = node[0] if isinstance(node, tuple) and node else node
    if isinstance(first, ConfigDict):
        raise UserError(f"--{flag}: {where} is a group; set its fields one by one")
