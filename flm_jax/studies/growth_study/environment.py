"""What a result depends on besides its config, and its digest."""

from __future__ import annotations

from flm_jax import mapping
from flm_jax.runtime.environment import environment as environment


def digest(values: dict[str, str]) -> str:
    """A short digest of an environment."""
    return mapping.digest(values)[:12]
