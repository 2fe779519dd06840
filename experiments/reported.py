"""The same as `flm reported`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("reported")
