"""The same as `flm doctor`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("doctor")
