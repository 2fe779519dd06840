"""Typed access to the keys of a config.json, with errors that name file, key and value."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from flm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of a JSON object.

    Attributes:
      values: the object, with the defaults of its architecture filled in. A null is as a missing
        key.
      path: what errors call it: the file, or the file and an outer key.
    """

    values: Mapping[str, Any]
    path: str

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; the default if it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def _wrong(self, key: str, must: str) -> UserError:
        value = "missing" if self.values.get(key) is None else repr(self.values[key])
        return UserError(f"{self.path}: {key} is {value}; it must be {must}")

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number")
        if not abs(value) <= sys.float_info.max:  # NaN, or an integer that is too large
            raise self._wrong(key, "a finite number")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.number(key, default)
        if value <= 0:
            raise self._wrong(key, "a number above 0")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """An integer above 0."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise self._wrong(key, "an integer above 0 and below 2^31")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def text(self, key: str, choices: Mapping[str, str]) -> str:
        """The choice that a text stands for."""
        value = self.get(key)
        if not isinstance(value, str) or value not in choices:
            raise self._wrong(key, f"one of {', '.join(choices)} for flm_jax to import the model")
        return choices[value]

    def per_layer(self, key: str, layers: int) -> list[Any] | None:
        """A list with one entry for each layer; None if the key is missing."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != layers:
            raise self._wrong(key, f"a list of {layers} entries, one for each layer")
        return value

    def bits(self, key: str, at_least: int) -> list[int] | None:
        """A list of 0 and 1, which may be longer than needed; None if the key is missing."""
        value = self.get(key)
        if value is None:
            return None
        if (
            not isinstance(value, list)
            or len(value) < at_least
            or any(x not in (0, 1) for x in value)
        ):
            raise self._wrong(key, f"a list of at least {at_least} entries, each 0 or 1")
        return [int(x) for x in value[:at_least]]

    def group(self, key: str) -> Keys | None:
        """A nested object; None if it is missing or empty."""
        value = self.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong(key, "a JSON object")
        return Keys(value, f"{self.path}: {key}")
