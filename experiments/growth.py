"""The same as `flm growth SUBCOMMAND`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("growth")
