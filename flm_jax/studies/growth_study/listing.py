"""What a study has done and what is left, at the measured rate."""

from __future__ import annotations

from typing import Any

from flm_jax.studies.growth_study import phases
from flm_jax.studies.growth_study.histories import closure, parent
from flm_jax.studies.growth_study.pool import Opened


def listed(study: Opened) -> dict[str, Any]:
    """All pieces of the phases that are known so far.

    Returns:
      pieces (name, id, flops of its own, status, bpb, seconds); phases (FLOPs of each); done and
      left, in FLOPs; flops_per_second of one core and tokens_per_second by model, measured, None
      before; core_seconds_left.
    """
    lab = study.lab
    trials = study.known()
    nodes = closure(t.history for t in trials)
    rows, done, left, seconds = [], 0.0, 0.0, 0.0
    rates: dict[str, list[tuple[float, float]]] = {}
    for node in nodes:
        start, row = parent(node, nodes), study.pieces.result(node)
        flops = lab.flops(node) - (lab.flops(start) if start else 0)
        began = any((study.pieces.path(node) / "checkpoints").glob("*"))
        status = "done" if row else "begun" if began else "waiting"
        if row:
            done += flops
            seconds += row["seconds"]
            tokens = (node.end - (start.end if start else 0)) * study.config.tokens_per_step
            rates.setdefault(node.last.model, []).append((tokens, row["seconds"]))
        else:
            left += flops
        rows.append(
            {
                "name": node.name(),
                "id": lab.identity(node),
                "flops": flops,
                "status": status,
                "bpb": row["bpb"] if row else None,
                "seconds": row["seconds"] if row else None,
            }
        )
    rate = done / seconds if seconds else None
    return {
        "pieces": rows,
        "phases": {
            name: phases.cost(lab, [t.history for t in trials if t.phase == name])
            for name in dict.fromkeys(t.phase for t in trials)
        },
        "done": done,
        "left": left,
        "flops_per_second": rate,
        "tokens_per_second": {
            name: sum(t for t, _ in pairs) / max(sum(s for _, s in pairs), 1e-9)
            for name, pairs in rates.items()
        },
        "core_seconds_left": left / rate if rate else None,
        "frozen": study.folder.frozen.exists(),
    }


def line(found: dict[str, Any]) -> str:
    """What is done and left, in one line."""
    rate, seconds = found["flops_per_second"], found["core_seconds_left"]
    measured = "" if rate is None else f" at {rate / 1e9:.1f} GFLOP/s per core"
    left = "" if seconds is None else f", {seconds / 3600:.2f} core hours"
    later = "" if found["frozen"] else "; arms are not listed before tuning is frozen"
    return (
        f"done {found['done'] / 1e12:.3g} TFLOP{measured}; left {found['left'] / 1e12:.3g} TFLOP"
        f"{left}{later}"
    )


def summary(study: Opened) -> dict[str, Any]:
    """The same without the pieces, and the decisions of tuning."""
    found = listed(study)
    pieces = found.pop("pieces")
    return {**found, "finished": sum(p["status"] == "done" for p in pieces), "known": len(pieces)}
