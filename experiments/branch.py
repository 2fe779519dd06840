"""The same as `flm branch`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("branch")
