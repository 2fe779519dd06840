"""`python -m flm_jax.commands NAME` is `flm NAME`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main()
