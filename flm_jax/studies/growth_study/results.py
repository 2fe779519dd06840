"""The raw results as one compact file, and what the analysis reads from it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from flm_jax import mapping
from flm_jax.errors import UserError
from flm_jax.params import counts
from flm_jax.store.files import write_atomically
from flm_jax.studies.growth_study import analysis, environment
from flm_jax.studies.growth_study.config import GrowthStudyConfig
from flm_jax.studies.growth_study.histories import closure
from flm_jax.studies.growth_study.pool import Opened

Row = dict[str, Any]
VERSION = 1
# What the analysis and the curves need of a piece's result.
_KEPT = (
    "start", "started_from", "end", "flops", "tokens", "seconds", "bpb", "packages", "losses",
    "evals", "growth", "stuck", "params_digest",
)  # fmt: skip


def collect(study: Opened, path: pathlib.Path) -> None:
    """Writes all finished results of a study into one JSONL file.

    The first row is the study's: config, corpus, environments, decisions, models. A row of kind
    "trial" names the piece that it ends with; one of kind "piece" is a finished piece of training.

    Args:
      study: the study.
      path: the file.
    """
    frozen, config = study.frozen(), study.config
    trials = study.known()
    nodes = closure(t.history for t in trials)
    done = {n: row for n in nodes if (row := study.pieces.result(n)) is not None}
    manifest = {k: v for k, v in study.corpus.manifest.items() if k != "validation"}
    validation = study.corpus.manifest["validation"]
    rows: list[Row] = [
        {
            "kind": "study",
            "version": VERSION,
            "config": mapping.to_dict(config),
            "corpus": {
                **manifest,
                "validation": {k: v for k, v in validation.items() if k != "packages"},
            },
            "environments": list(study.pieces.environments),
            "frozen": dataclasses.asdict(frozen) if frozen else None,
            "models": {
                m.name: {
                    "params": counts.params(m.model),
                    "flops_per_token": counts.flops_per_token_train(
                        m.model, config.sequence_length
                    ),
                }
                for m in config.models
            },
            "pieces_missing": len(nodes) - len(done),
        }
    ]
    for trial in trials:
        rows.append(
            {
                "kind": "trial",
                "phase": trial.phase,
                "arm": trial.arm,
                "seed": trial.seed,
                "share": trial.share,
                "rate": trial.rate,
                "budget": trial.flops,
                "piece": study.lab.identity(trial.history),
                "name": trial.history.name(),
            }
        )
    for node, result in done.items():
        row = {"kind": "piece", "id": result["id"], "name": node.name(), "seed": node.seed}
        row["environment"] = environment.digest(result["environment"])
        rows.append(row | {k: result[k] for k in _KEPT if k in result})
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    write_atomically(path, text)


@dataclasses.dataclass(frozen=True)
class Results:
    """The raw results of a study.

    Attributes:
      header: the study's row.
      trials: trials, each with the `result` of its last piece (None: missing).
      pieces: results by identity.
    """

    header: Row
    trials: Sequence[Row]
    pieces: dict[str, Row]

    @property
    def config(self) -> GrowthStudyConfig:
        """The study's config."""
        return mapping.from_mapping(GrowthStudyConfig, self.header["config"])

    @property
    def name(self) -> str:
        """The study's name."""
        return str(self.header["config"]["name"])

    @property
    def frozen(self) -> Row | None:
        """The decisions of tuning."""
        found: Row | None = self.header["frozen"]
        return found

    def of(self, phase: str) -> list[Row]:
        """The trials of a phase that have a finite result."""
        return [
            t
            for t in self.trials
            if t["phase"] == phase and t["result"] is not None and t["result"]["bpb"] is not None
        ]

    @property
    def missing(self) -> list[Row]:
        """Trials without a result."""
        return [t for t in self.trials if t["result"] is None]

    @property
    def diverged(self) -> list[Row]:
        """Trials whose loss is not finite."""
        return [t for t in self.trials if t["result"] and t["result"]["bpb"] is None]

    def losses(self) -> analysis.Losses | None:
        """What the analysis reads; None before there are arms with the target's whole curve."""
        config, frozen = self.config, self.frozen
        if frozen is None:
            return None
        target: dict[float, dict[int, float]] = {}
        fixed: dict[str, dict[int, float]] = {name: {} for name in config.controls}
        arms: dict[str, dict[int, float]] = {}
        share: dict[str, float] = {}
        for trial in self.of("arms"):
            name, seed, bits = trial["arm"], trial["seed"], trial["result"]["bpb"]
            spent = trial["result"]["flops"] / frozen["budget"]
            if name == config.target:
                target.setdefault(spent, {})[seed] = bits
            if name in fixed:
                if trial["share"] == 1:
                    fixed[name][seed] = bits
            else:
                arms.setdefault(name, {})[seed] = bits
                share[name] = spent
        named = {config.source, config.between, config.target}
        complete = len(target) == len(config.multiples) and all(fixed.get(n) for n in named)
        if not complete:
            return None
        return analysis.Losses(
            target, fixed, arms, share, config.source, config.between, config.target
        )

    def ablations(self) -> dict[str, dict[int, float]]:
        """Ablation -> seed -> bits per byte."""
        found: dict[str, dict[int, float]] = {}
        for trial in self.of("ablations"):
            found.setdefault(trial["arm"], {})[trial["seed"]] = trial["result"]["bpb"]
        return found

    def chain(self, trial: Row) -> list[Row]:
        """The pieces that lead to a trial's end, the first one first."""
        rows: list[Row] = []
        row = trial["result"]
        while row is not None:
            rows.append(row)
            row = self.pieces.get(row["started_from"] or "")
        return rows[::-1]

    def machines(self) -> Counter[str]:
        """Pieces by environment."""
        return Counter(row["environment"] for row in self.pieces.values())


def read(path: pathlib.Path) -> Results:
    """Reads a file that `collect` wrote.

    Raises:
      UserError: it does not exist, or is not such a file; names the line.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a file of a study's results")
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not a JSON object; collect the results again"
            ) from error
    if not rows or rows[0].get("kind") != "study" or rows[0].get("version") != VERSION:
        raise UserError(
            f"{path}: it does not begin with a study of version {VERSION}; collect the results "
            "again"
        )
    pieces = {row["id"]: row for row in rows if row["kind"] == "piece"}
    known = {environment.digest(e) for e in rows[0]["environments"]}
    for row in pieces.values():
        if row["environment"] not in known:
            raise UserError(
                f"{path}: piece {row['id']} was made in an environment that the study does not "
                "list; collect the results again"
            )
    trials = [{**r, "result": pieces.get(r["piece"])} for r in rows if r["kind"] == "trial"]
    return Results(rows[0], trials, pieces)
