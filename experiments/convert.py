"""The same as `flm convert`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("convert")
