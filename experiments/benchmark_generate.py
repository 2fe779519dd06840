"""The old name of `flm benchmark generate`; it stays."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("benchmark", "generate")
