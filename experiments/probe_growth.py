"""The old name of `flm growth probe`; it stays."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("growth", "probe")
