"""The same as `flm preflight`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("preflight")
