"""The same as `flm study`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("study")
