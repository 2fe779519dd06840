"""The same as `flm extend`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("extend")
