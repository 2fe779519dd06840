"""Says whether to grow a model: from which size, when and by which recipe, as far as it was tested.

  flm plan --target=490000 --budget=2.4e13
  flm plan --target=configs/demo.py --budget=1e14

The target is a number of parameters, or a config whose last stage is the target. The answer comes
from the studies in docs/study (`flm study`), with a 95% interval; outside the range of target and
budget that they tested, it says so and recommends nothing.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

from flm_jax.commands import config_files
from flm_jax.commands.command import Call, Command, flag
from flm_jax.errors import UserError
from flm_jax.params import counts
from flm_jax.studies.growth_study import planner


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    target: str = flag(
        "", "Parameters of the model to end with, or a config file.",
        required="give a number of parameters, or configs/FILE.py",
    )  # fmt: skip
    budget: str = flag("", "Training FLOPs, as 2.4e13.", required="give training FLOPs, as 2.4e13")
    plans: str = flag("docs/study/plans.json", "What studies know; `flm study --report` writes it.")


def main(call: Call[Flags]) -> dict[str, Any]:
    flags = call.flags
    found = planner.plan(
        planner.read(pathlib.Path(flags.plans)), _params(flags.target), _number(flags.budget)
    )
    console = call.console()
    console.print(f"{found['answer']}: {found['why']}", highlight=False)
    for line in found["outside"]:
        console.print(f"  never tested: {line}", highlight=False)
    if "study" in found:
        low, high = found["interval"]
        between = "one seed" if low is None else f"95% interval {low:.2f} to {high:.2f}"
        console.print(
            f"  study {found['study']!r}: recipe {found['recipe']!r}, chain "
            f"{' > '.join(found['chain'])}, source {found['source_share']:.0%} of the target's "
            f"FLOPs per token, growth at {', '.join(f'{s:.0%}' for s in found['grow_at'])} of the "
            f"budget: compute multiplier {found['multiplier']:.2f} ({between}, "
            f"{found['seeds']} seeds); best fixed size {found['best_fixed']}",
            highlight=False,
        )
    return found


def _params(target: str) -> int:
    """Parameters: the number itself, or those of a config's last stage."""
    if ".py" in target:
        config = config_files.experiment(config_files.load_config(target))
        return counts.params(config.stages[-1].model)
    value = _number(target, "target")
    return round(value)


def _number(text: str, name: str = "budget") -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 1):
        raise UserError(f"{name} is {text!r}; give a number above 1, as 2.4e13", argument=name)
    return value


COMMAND = Command(main, Flags, config="none")
