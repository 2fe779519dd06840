"""The same as `flm compare`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("compare")
