"""Checks of values, with one-line errors that name the field and what it must be."""

from __future__ import annotations

from typing import Any

from flm_jax.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_type(value: object, kind: type, name: str) -> None:
    """Raises UserError unless a config passed as `name` ("function: argument") is of this type."""
    require(
        isinstance(value, kind),
        f"{name} is of type {type(value).__name__}; give a {kind.__module__}.{kind.__name__}",
    )


def require_positive(config: Any, *names: str) -> None:
    """Raises UserError unless the named fields are above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{type(config).__name__}.{name} is {value}; it must be above 0")


def require_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raises UserError unless the named field is one of the choices."""
    value = getattr(config, name)
    require(
        value in choices,
        f"{type(config).__name__}.{name} is {value!r}; choose one of {', '.join(choices)}",
    )


def require_seed(config: Any) -> None:
    """Raises UserError unless the field `seed` fits into 32 bits, as random keys need."""
    require(
        0 <= config.seed < 2**32,
        f"{type(config).__name__}.seed is {config.seed}; it must be in [0, 2^32)",
    )
