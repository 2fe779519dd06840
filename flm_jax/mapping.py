"""Config dataclasses from nested mappings and back, their digests and differences."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from flm_jax.errors import UserError

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars.

    >>> from flm_jax.config import CheckpointConfig
    >>> to_dict(CheckpointConfig(every_steps=50))
    {'every_steps': 50, 'keep': 2}
    """
    return json.loads(json.dumps(dataclasses.asdict(config)))


def digest(values: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a `to_dict`: equal for equal configs, on every machine.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
    """The fields in which two `to_dict` results differ.

    >>> differences({"seed": 0, "data": {"task": "c4"}}, {"seed": 1, "data": {"task": "c4"}})
    ['config.seed: 0 -> 1']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for key in dict.fromkeys([*old, *new]):
            found += differences(old.get(key), new.get(key), f"{path}.{key}")
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, pair in enumerate(zip(old, new, strict=True))
                for d in differences(*pair, f"{path}[{i}]")]  # fmt: skip
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def from_mapping(cls: type[T], values: Mapping[str, Any], path: str = "config") -> T:
    """Builds a config dataclass from nested mappings, checking every name and type.

    Args:
      cls: a dataclass of this module.
      values: field -> value; nested dataclasses as mappings, tuples as sequences.
      path: what to call `values` in an error.

    Raises:
      UserError: an unknown, missing or mistyped field, with its full name.

    >>> from flm_jax.config import CheckpointConfig
    >>> from_mapping(CheckpointConfig, {"keep": 1})
    CheckpointConfig(every_steps=200, keep=1)
    >>> from_mapping(CheckpointConfig, {"kept": 1})
    Traceback (most recent call last):
    flm_jax.errors.UserError: config.kept: CheckpointConfig has no such field; did you mean 'keep'?
    """
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    for name in values:
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(hints)}"
            raise UserError(f"{path}.{name}: {cls.__name__} has no such field; {hint}")
    missing = [
        f.name
        for f in fields
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{path}: {cls.__name__} needs {', '.join(missing)}; add to the config")
    return cls(**{k: _convert(hints[k], v, f"{path}.{k}") for k, v in values.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{path} is {value!r}; it must be a group of {hint.__name__}'s fields")
        return from_mapping(hint, value, path)
    if typing.get_origin(hint) is types.UnionType:  # X | None
        return None if value is None else _convert(typing.get_args(hint)[0], value, path)
    if typing.get_origin(hint) is tuple:
        (item, _) = typing.get_args(hint)
        return tuple(_convert(item, v, f"{path}[{i}]") for i, v in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(
            f"{path} is {value!r} of type {type(value).__name__}; it must be {hint.__name__}"
        )
    return value
