"""Growth: plans as data, and pure functions that apply them to parameters and train states."""

from flm_jax.growth._plan import (
    LockedCopiesWarning,
    Plan,
    UnfinishedRampWarning,
    UselessNoiseWarning,
    derived,
    norm_eps,
    plan,
)
from flm_jax.growth.apply import grow
from flm_jax.growth.folding import fold
from flm_jax.growth.mesh import grow_on_mesh, growth_program, parts
from flm_jax.growth.moments import added_slots, register_moments

__all__ = [
    "LockedCopiesWarning",
    "Plan",
    "UnfinishedRampWarning",
    "UselessNoiseWarning",
    "added_slots",
    "derived",
    "fold",
    "grow",
    "grow_on_mesh",
    "growth_program",
    "norm_eps",
    "parts",
    "plan",
    "register_moments",
]
