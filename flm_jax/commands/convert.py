"""Converts weights between runs and Hugging Face's Llama, TeleFLM and Granite.

  flm convert --source=llama/ --target=runs/llama --format=flm
  flm convert --source=runs/demo --target=demo_hf --format=granite --dtype=bfloat16

--source is a folder of Hugging Face files, a run's folder, or a checkpoint inside one
(runs/demo/stages/1-medium/checkpoints/1300). --target must not exist: it appears when all is
written. "flm" makes a run's folder of one finished stage, `imported`. "llama" has no multipliers:
they are multiplied into embedding and head; "teleflm" and "granite" keep them.

--verify compares logits afterwards, on random sequences of different lengths: transformers' with
ours for the same files (at most 1e-4 of the logits' scale), and ours before and after the
conversion (1e-4 in float32; rounding may change them by 0.05 in float16 and 0.5 in bfloat16). Exit
status 1 if they differ more. It needs the extra flm_jax[hf], and memory for the whole model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flm_jax import interop
from flm_jax.commands.command import Call, Command, Gate, flag
from flm_jax.interop import verify
from flm_jax.runtime import host


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    source: str = flag(
        "",
        "Run, checkpoint, or folder of Hugging Face files to read.",
        required="give a run, a checkpoint or a folder of Hugging Face files",
    )
    target: str = flag("", "The folder to write.", required="give a folder that does not exist")
    format: str = flag(
        "", "Format to write.", choices=interop.FORMATS,
        required=f"choose {', '.join(interop.FORMATS)}",
    )  # fmt: skip
    stage: str = flag("", "Index or name of a run's stage; empty: the last one.")
    step: int | None = flag(None, "Step of the stage's checkpoint; the last one if not given.")
    dtype: str = flag(
        "", "Type of the written parameters; empty: the source's.", choices=("", *interop.DTYPES)
    )
    vocab_size: int = flag(
        0, "Rows of embedding and head: pads with zeros or cuts padding; 0: as they are.", lower=0
    )
    verify: bool = flag(False, "Compare the written model's logits with transformers'.")
    memory: int = flag(interop.MEMORY, "Bytes of memory to work in.", lower=1 << 20)


def main(call: Call[Flags]) -> dict[str, Any]:
    flags = call.flags
    host.keep_freed()
    if flags.verify:
        verify.check_possible(flags.source, flags.format)
    done = interop.convert(
        flags.source, flags.target, flags.format, stage=flags.stage, step=flags.step,
        dtype=flags.dtype, vocab_size=flags.vocab_size, memory=flags.memory,
    )  # fmt: skip
    if not call.json:
        print(
            f"{done['target']}: {done['params']:,} parameters as {done['format']} in "
            f"{done['dtype']}, {done['bytes_written'] / 1e9:.2f} GB in {done['seconds']:.1f} s "
            f"({done['gb_per_s']:.2f} GB/s read and written)",
            *done["notes"], sep="\n",
        )  # fmt: skip
    if flags.verify:
        done["verify"] = verify.verify(flags.source, flags.target, flags.stage, flags.step)
        if not call.json:
            print(verify.summary(done["verify"]))
    return done


def _unlike(done: Mapping[str, Any]) -> str:
    return verify.failure(done["verify"]) if "verify" in done else ""


COMMAND = Command(main, Flags, config="none", gate=Gate(1, _unlike))
