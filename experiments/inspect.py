"""The same as `flm inspect`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("inspect")
