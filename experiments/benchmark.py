"""The same as `flm benchmark SUBCOMMAND`. Without a subcommand it is `step`, its old meaning."""

import sys

from flm_jax.commands import front

if __name__ == "__main__":
    front.main("benchmark", *([] if sys.argv[1:2] in (["step"], ["generate"]) else ["step"]))
