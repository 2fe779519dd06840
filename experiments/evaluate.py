"""The same as `flm evaluate`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("evaluate")
