"""Compares random chains of growths with an independent model, and prints the smallest failure.

  flm growth fuzz --chains=500 --seed=0
  flm growth fuzz --chain='{"seed": 3, ...}'

Each chain trains a tiny decoder in float64, grows it up to four times, and trains after each
growth; some also grow on eight fake devices. Parameters, moments, ages, logits, gradients and steps
must equal those of an implementation in plain numpy. 500 chains take 25 minutes on one core. A
failing chain is made smaller and printed as JSON, for --chain. Exit status 1 if a chain fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from flm_jax.commands.command import Call, Command, Gate, flag
from flm_jax.runtime import host


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    chains: int = flag(100, "Number of random chains.", lower=1)
    seed: int = flag(0, "Seed of the first chain; the others have the next numbers.", lower=0)
    chain: str = flag("", "One chain to run instead, as JSON that this command printed.")


def _failed(result: Mapping[str, Any]) -> str:
    wrong = result["mismatches"]
    return f"{len(wrong)} of {result['chains']} chains fail: {wrong[0]['detail']}" if wrong else ""


def _text(result: Mapping[str, Any]) -> list[str]:
    """The result as lines for a person."""
    checks = ", ".join(f"{kind} {count:,}" for kind, count in result["checks"].items())
    lines = [
        f"{result['chains']} chains, {result['growths']} growths ({result['exact_growths']} EXACT, "
        f"{result['mesh_growths']} also on meshes), {sum(result['checks'].values()):,} arrays "
        f"compared: {checks}",
        "operators: " + ", ".join(f"{name} {n}" for name, n in result["operators"].items()),
        f"mismatches: {len(result['mismatches'])}",
    ]
    lines += [f"  seed {m['seed']}: {m['kind']}: {m['detail']}" for m in result["mismatches"]]
    for small in result["shrunk"]:
        lines += [f"made smaller, {small['mismatch']}:", f"  {json.dumps(small['chain'])}"]
    return lines


def main(call: Call[Flags]) -> dict[str, Any]:
    host.compile_quickly()
    # XLA warns that some moves between tiny meshes are slow.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    from flm_jax.runtime.display import Progress
    from flm_jax.studies import random_chains
    from flm_jax.studies.chain_check import DEVICES, Chain

    # float64 on CPUs, whatever else the machine has. Once JAX has started, it keeps its devices.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", DEVICES)
    if call.flags.chain:
        given = [Chain.from_json(call.flags.chain)]
    else:
        given = [random_chains.draw(call.flags.seed + n) for n in range(call.flags.chains)]
    with Progress("random chains", total=len(given), unit="chains") as progress:
        result = random_chains.fuzz(given, progress.update)
    console = call.console(soft_wrap=True)
    for line in _text(result):
        console.print(line, highlight=False, markup=False)
    return result


COMMAND = Command(main, Flags, config="none", gate=Gate(1, _failed))
