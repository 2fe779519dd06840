"""The same as `flm families`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("families")
