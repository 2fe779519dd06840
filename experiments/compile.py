"""The same as `flm compile`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("compile")
