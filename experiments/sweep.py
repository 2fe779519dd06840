"""The same as `flm sweep`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("sweep")
