"""Config dataclasses from nested mappings and back, their digests and differences."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import hashlib
import json
import numbers
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from flm_jax.errors import UserError, within

T = TypeVar("T")


class Checked:
    """Base of config dataclasses: checks that every field has its declared type.

    No setting is below 0; the fields' own rules are in the subclasses.

    Raises:
      UserError: a field does not, or is below 0; names class, field, value and both types.
    """

    @classmethod
    def place(cls, values: Mapping[str, Any]) -> str:
        """What errors of a config with these values begin with, as "stage large"; "": nothing."""
        del values
        return ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            path = f"{type(self).__name__}.{field.name}"
            value = _convert_field(field, hints[field.name], getattr(self, field.name), path)
            if isinstance(value, int | float) and value < 0:
                raise UserError(f"{path} is {value}; it must be 0 or above")
            object.__setattr__(self, field.name, value)


def added(default: T) -> T:
    """A field that a later version added; `to_dict` omits it while it has its default.

    A config that does not use the field is then stored as before, with the same digest.
    """
    field: T = dataclasses.field(default=default, metadata={"added": True})
    return field


def base_of(value: Any) -> tuple[str, Mapping[str, Any]] | None:
    """The base and the changed fields of a config that is given relative to another one.

    A field with `bases` in its metadata may hold one, until that is resolved: the name of a base,
    or a mapping with it as `base` and the fields that differ.

    Returns:
      The base and the fields; None if the value is a config itself.

    >>> base_of("source"), base_of({"base": "source", "num_layers": 4})
    (('source', {}), ('source', {'num_layers': 4}))
    """
    if isinstance(value, str):
        return value, {}
    if isinstance(value, Mapping) and "base" in value:
        return value["base"], {name: x for name, x in value.items() if name != "base"}
    return None


def replaced(config: T, values: Mapping[str, Any], path: str = "config") -> T:
    """A config with some fields changed, also those of nested configs; None keeps a field.

    Args:
      config: a config dataclass.
      values: the changed fields, as for `from_mapping`.
      path: the name of `values` in error messages.

    Raises:
      UserError: a field is unknown or of the wrong type; gives its full name.

    >>> from flm_jax.config import EvalConfig
    >>> replaced(EvalConfig(50, 3), {"batch_size": 1, "every_steps": None})
    EvalConfig(sequences=50, batch_size=1, every_steps=200, samples=0, sample_prompt='')
    """
    fields: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    for name, value in values.items():
        have = fields.get(name)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(have):
            fields[name] = replaced(have, value, f"{path}.{name}")
        elif value is not None:
            fields[name] = value
    return from_mapping(type(config), fields, path)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars, as it is stored and compared.

    >>> from flm_jax.config import CheckpointConfig
    >>> to_dict(CheckpointConfig(every_steps=50))
    {'every_steps': 50, 'keep': 2}
    """
    plain: dict[str, Any] = json.loads(json.dumps(_without_unused(config)))
    return plain


def to_full_dict(config: Any) -> dict[str, Any]:
    """The config as `to_dict` has it, but with every field, so that each can be overridden."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def _without_unused(value: Any) -> Any:
    """Nested dataclasses as dicts, without `added` fields that have their default."""
    if dataclasses.is_dataclass(value):
        values = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return {
            field.name: _without_unused(x)
            for field, x in values
            if not (field.metadata.get("added") and x == field.default)
        }
    if isinstance(value, Mapping):
        return {key: _without_unused(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_unused(x) for x in value]
    return value


def digest(values: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a `to_dict` result: the same on every machine.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
    """Lists the fields in which two `to_dict` results differ, with both values.

    >>> differences({"seed": 0, "data": {"task": "c4"}}, {"seed": 1, "data": {"task": "c4"}})
    ['config.seed: 0 -> 1']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [(old.get(k), new.get(k), f"{path}.{k}") for k in dict.fromkeys([*old, *new])]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = [(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
    return [line for part in parts for line in differences(*part)]


def from_mapping(cls: type[T], values: Mapping[str, Any], path: str = "config") -> T:
    """Builds a config dataclass from nested mappings; checks every name and type.

    Args:
      cls: the dataclass.
      values: value of each field; nested dataclasses as mappings, tuples as sequences.
      path: the name of `values` in error messages.

    Raises:
      UserError: a field is unknown, missing, or of the wrong type; gives its full name.

    >>> from flm_jax.config import CheckpointConfig, EvalConfig
    >>> from_mapping(EvalConfig, {"batch_size": 1})
    EvalConfig(sequences=96, batch_size=1, every_steps=200, samples=0, sample_prompt='')
    >>> from_mapping(CheckpointConfig, {"kept": 1})
    Traceback (most recent call last):
    flm_jax.errors.UserError: config.kept: CheckpointConfig has no such field; did you mean 'keep'?
    """
    place = cls.place(values) if issubclass(cls, Checked) else ""
    with within(place) if place else contextlib.nullcontext():
        return _from_mapping(cls, values, path)


def _from_mapping(cls: type[T], values: Mapping[str, Any], path: str) -> T:
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
    converted = {
        f.name: _convert_field(f, hints[f.name], values[f.name], f"{path}.{f.name}")
        for f in fields
        if f.name in values
    }
    try:
        return cls(**converted)
    except UserError as error:  # the class does not know where it is
        if str(error).startswith(f"{cls.__name__}."):
            error.args = (f"{path}.{str(error).removeprefix(f'{cls.__name__}.')}",)
        raise


def _convert_field(field: dataclasses.Field[Any], hint: Any, value: Any, path: str) -> Any:
    """The value of a field as its declared type, or relative to one of its bases."""
    bases, relative = field.metadata.get("bases", ()), base_of(value)
    if not bases or relative is None:
        return _convert(hint, value, path, field.metadata.get("form", ""))
    base, changes = relative
    if base not in bases:
        known = ", ".join(map(repr, bases))
        raise UserError(
            f"{path} is {base!r}; give a {hint.__name__}, a group of its fields, or one of {known}"
        )
    return {"base": base, **changes} if changes else base


def _convert(hint: Any, value: Any, path: str, form: str = "") -> Any:
    """The value as the declared type `hint`; raises UserError, with its `form`, if it does not fit.

    >>> _convert(tuple[int, ...], 3, "config.factors")
    Traceback (most recent call last):
    flm_jax.errors.UserError: config.factors is 3 of type int; it must be a list or tuple of int: \
write one entry as (entry,), with the comma
    """
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if hasattr(value, "items"):  # a ConfigDict is not a Mapping
            value = dict(value.items())
        if not isinstance(value, Mapping):
            raise UserError(
                f"{path} is of type {type(value).__name__}; it must be a {hint.__name__}, or a "
                "group of its fields"
            )
        return from_mapping(hint, value, path)
    origin, items = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return _convert_union(items, value, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(
                f"{path} is {_shown(value)}; it must be a list or tuple of "
                f"{getattr(items[0], '__name__', items[0])}: write one entry as (entry,), with the "
                "comma"
            )
        return tuple(_convert(items[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise UserError(f"{path} is {_shown(value)}; it must be a group of named values")
        return {k: _convert(items[1], v, f"{path}.{k}") for k, v in value.items()}
    if issubclass(hint, enum.Enum):
        return _convert_enum(hint, value, path)
    return _convert_scalar(hint, value, path, form)


def _shown(value: Any) -> str:
    """A wrong value and its type; a config is shown by its type alone."""
    kind = type(value).__name__
    known = isinstance(value, str | int | float | list | tuple | Mapping) or value is None
    return f"{value!r} of type {kind}" if known else f"of type {kind}"


def _convert_enum(hint: type[enum.Enum], value: Any, path: str) -> enum.Enum:
    """The member of an enum that has this value."""
    try:
        return hint(value)
    except ValueError:
        known = ", ".join(repr(member.value) for member in hint)
        raise UserError(f"{path} is {value!r}; choose one of {known}") from None


_LARGEST = {bool: 1, int: 2**63 - 1, float: sys.float_info.max}


def _convert_scalar(hint: type, value: Any, path: str, form: str = "") -> Any:
    """A bool, int, float or str; numpy's numbers become Python's, and an int may be a float."""
    accepted = {int: numbers.Integral, float: numbers.Real}.get(hint, hint)
    if isinstance(value, accepted) and (hint is bool or not isinstance(value, bool)):
        if isinstance(value, numbers.Real) and not abs(typing.cast(float, value)) <= _LARGEST[hint]:
            shown = "larger" if isinstance(value, int) else value  # it may have 4300 digits
            raise UserError(
                f"{path} is {shown}; it must be a finite {hint.__name__}, at most "
                f"{_LARGEST[hint]:g} in size"
            )
        return hint(value)
    example = f", as {form}" if form else ""
    raise UserError(f"{path} is {_shown(value)}; it must be {hint.__name__}{example}")


def _convert_union(hints: tuple[Any, ...], value: Any, path: str) -> Any:
    """Converts to `X | None`, or to the one of several dataclasses that has the value's fields."""
    if value is None and types.NoneType in hints:
        return None
    kinds = [hint for hint in hints if hint is not types.NoneType]
    fitting = [
        kind
        for kind in kinds
        if isinstance(value, Mapping)
        and dataclasses.is_dataclass(kind)
        and set(value) <= {field.name for field in dataclasses.fields(kind)}
    ]
    return _convert((fitting or kinds)[0], value, path)
