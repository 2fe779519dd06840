"""Checks of values, with one-line errors that name the field and what it must be."""

from __future__ import annotations

from typing import Any

from flm_jax.errors import UserError
from flm_jax.version import __version__


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


def require_version(what: str, data: dict[str, Any], known: int, first: int = 1) -> None:
    """Takes the version of a file's format out of its content, and checks it.

    Readers bring older versions forward: a new field has a default with the old behaviour
    (`mapping.added`), and states are converted by `store/earlier.py`. A file of a later version
    also says, as `flm_jax`, the version of the package that wrote it.

    Args:
      what: the file, for the error.
      data: its content; `version` and `flm_jax` are removed.
      known: the version that is written today, and the latest one that is read.
      first: the version of a file that states none; 0: it must state one.

    Raises:
      UserError: the version is later, or is no version.
    """
    version, writer = data.pop("version", first), data.pop("flm_jax", None)
    if isinstance(version, int) and version > known:
        newer = f"flm_jax {writer}" if isinstance(writer, str) else "a later flm_jax"
        raise UserError(
            f"{what}: version {version} of its format, but flm_jax {__version__} reads up to "
            f"{known}; install {newer} (pip install --upgrade flm_jax)"
        )
    require(
        isinstance(version, int) and not isinstance(version, bool) and version >= 1,
        f"{what}: version {version}, but it must be a number from 1 to {known}; restore the file",
    )


def require_seed(config: Any) -> None:
    """Raises UserError unless the field `seed` fits into 32 bits, as random keys need."""
    require(
        0 <= config.seed < 2**32,
        f"{type(config).__name__}.seed is {config.seed}; it must be in [0, 2^32)",
    )
