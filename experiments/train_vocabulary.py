"""The old name of `flm vocabulary`; it stays."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("vocabulary")
