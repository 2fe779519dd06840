"""The same as `flm mup SUBCOMMAND`."""

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("mup")
