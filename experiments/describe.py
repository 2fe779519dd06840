"""The same as `flm describe`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("describe")
