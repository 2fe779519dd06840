"""The same as `flm sft`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("sft")
