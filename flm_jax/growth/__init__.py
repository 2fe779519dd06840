"""Growth: plans as data, and pure functions from old trees to expanded ones."""

from flm_jax.growth.plan import Plan, grow, plan

__all__ = ["Plan", "grow", "plan"]
