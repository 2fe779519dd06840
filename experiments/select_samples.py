"""The old name of `flm samples select`; it stays."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("samples", "select")
