"""The same as `flm generate`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("generate")
