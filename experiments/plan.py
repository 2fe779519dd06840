"""The same as `flm plan`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("plan")
