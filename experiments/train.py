"""The same as `flm train`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("train")
