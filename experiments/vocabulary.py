"""The same as `flm vocabulary`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("vocabulary")
