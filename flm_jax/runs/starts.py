"""Every start of a stage, with what it computes with: starts.jsonl."""

from __future__ import annotations

import sys

from flm_jax.runtime import environment
from flm_jax.store.lineage import StageFolder


def note(folder: StageFolder, step: int) -> None:
    """Adds a row for this start, and prints what differs from the last one and may change bits.

    Only the first process calls it.

    Args:
      folder: the stage's folder.
      step: the global step from which the stage trains.
    """
    now = environment.at_start()
    # It also removes a row that a killed process did not write whole.
    earlier = folder.starts.rewind(sys.maxsize)
    changed = environment.changes(earlier[-1], now) if earlier else []
    for line in changed:
        print(
            f"{folder.path.name}: {line} since the last start; results may differ in rounding",
            file=sys.stderr,
        )
    folder.starts.append("start", step, **now, **({"changed": changed} if changed else {}))
    folder.starts.publish()
