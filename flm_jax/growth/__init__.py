"""Growth: plans as data, and pure functions from old trees to expanded ones."""

from flm_jax.growth.apply import grow
from flm_jax.growth.fold import fold
from flm_jax.growth.on_mesh import grow_on_mesh, growth_program
from flm_jax.growth.plan import LockedCopiesWarning, Plan, norm_eps, plan

__all__ = [
    "LockedCopiesWarning",
    "Plan",
    "fold",
    "grow",
    "grow_on_mesh",
    "growth_program",
    "norm_eps",
    "plan",
]
