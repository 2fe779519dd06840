"""The same as `flm less_is_more`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("less_is_more")
