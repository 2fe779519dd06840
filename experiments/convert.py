"""Converts weights: Hugging Face's Llama, TeleFLM and Granite, and runs of this library.

python -m experiments.convert --source=llama/ --target=runs/llama --format=flm
python -m experiments.convert --source=runs/demo --target=demo_hf --format=granite --dtype=bfloat16

--source is a folder of Hugging Face files, a run's folder, or a checkpoint inside one
(runs/demo/stages/1-medium/checkpoints/1300). --target must not exist: it appears when all is
written. "flm" makes a run's folder of one finished stage, `imported`. "llama" has no multipliers:
they are multiplied into embedding and head; "teleflm" and "granite" keep them.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from experiments import cli
from flm_jax import interop
from flm_jax.errors import UserError
from flm_jax.runtime import host

SOURCE = flags.DEFINE_string("source", "", "What to read.")
TARGET = flags.DEFINE_string("target", "", "The folder to write.")
FORMAT = flags.DEFINE_enum("format", None, interop.FORMATS, "What to write.")
STAGE = flags.DEFINE_string("stage", "", "Index or name of a run's stage; the last one if empty.")
STEP = flags.DEFINE_integer("step", None, "Of the stage's checkpoints; its last one if not given.")
DTYPE = flags.DEFINE_enum(
    "dtype", "", ("", *interop.DTYPES), "Of the written parameters; the source's if empty."
)
VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size",
    0,
    "Rows of embedding and head: padded with zeros, or padding cut off.",
    lower_bound=0,
)
MEMORY = flags.DEFINE_integer("memory", interop.MEMORY, "Bytes to work in.", lower_bound=1 << 20)


def main(arguments: list[str]) -> dict[str, Any]:
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; options begin with --")
    given = {flag.name: flag.value or "" for flag in (SOURCE, TARGET, FORMAT)}
    if missing := [name for name, value in given.items() if not value]:
        raise UserError(f"--{missing[0]} is missing; see --help")
    host.keep_freed()
    done = interop.convert(
        *given.values(), stage=STAGE.value, step=STEP.value,
        dtype=DTYPE.value, vocab_size=VOCAB_SIZE.value, memory=MEMORY.value,
    )  # fmt: skip
    if not cli.json_wanted():
        print(
            f"{done['target']}: {done['params']:,} parameters as {done['format']} in "
            f"{done['dtype']}, {done['bytes_written'] / 1e9:.2f} GB in {done['seconds']:.1f} s "
            f"({done['gb_per_s']:.2f} GB/s read and written)",
            *done["notes"], sep="\n",
        )  # fmt: skip
    return done


if __name__ == "__main__":
    cli.run(main, needs_config=False)
