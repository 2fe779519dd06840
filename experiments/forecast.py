"""The same as `flm forecast`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("forecast")
