"""What the config files share: dataclasses in, ConfigDict out."""

from __future__ import annotations

from typing import Any

import ml_collections

from flm_jax.config import ExperimentConfig
from flm_jax.errors import UserError
from flm_jax.mapping import to_dict


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """Every field with its type, so that overrides on the command line are checked.

    Stages are a tuple of ConfigDicts: `--config.stages[0].steps=5`.
    """

    def with_types(value: Any) -> Any:
        if isinstance(value, dict):
            return ml_collections.ConfigDict({k: with_types(v) for k, v in value.items()})
        return tuple(with_types(v) for v in value) if isinstance(value, list) else value

    return with_types(to_dict(config))


def single(config: ExperimentConfig) -> ml_collections.ConfigDict:
    """A chain of one stage, laid out as `model` and `stage`: `--config.model.vocab_size=80384`."""
    values = to_dict(config)
    (stage,) = values.pop("stages")
    model = stage.pop("model")
    return ml_collections.ConfigDict({**values, "model": model, "stage": stage})


def unknown_variant(variant: str, known: tuple[str, ...]) -> UserError:
    return UserError(f"config variant {variant!r} is unknown; choose {', '.join(known)} or none")


def no_variant(variant: str) -> None:
    """Raises UserError if a variant is asked of a config that has none."""
    if variant:
        raise UserError(f"config variant {variant!r} is unknown; this config has none")
