"""The same as `flm harness`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("harness")
