"""The old name of `flm preflight`; it stays."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("preflight")
