"""What the faults did: one row for each kind of fault."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

COLUMNS = ("injected", "survived", "lost", "wrong", "traceback", "hang")
BAD = COLUMNS[2:]


@dataclasses.dataclass
class Row:
    """How the faults of one kind ended.

    Attributes:
      fault: the kind.
      injected: faults.
      survived: of them, those after which all was as promised.
      lost: a checkpoint or a finished stage was there before, and was not used again.
      wrong: another result than that of the undisturbed run, or another exit status than promised.
      traceback: one was printed.
      hang: no end within `lives.PATIENCE_S`.
      findings: what went wrong, with the fault's seed.
    """

    fault: str
    injected: int = 0
    survived: int = 0
    lost: int = 0
    wrong: int = 0
    traceback: int = 0
    hang: int = 0
    findings: list[str] = dataclasses.field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not any(getattr(self, name) for name in BAD)

    def add(self, other: Row) -> None:
        for name in COLUMNS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.findings += other.findings


def summed(rows: Iterable[Row]) -> dict[str, Row]:
    """Adds up the rows of each kind of fault, in order of their first ones."""
    total: dict[str, Row] = {}
    for row in rows:
        total.setdefault(row.fault, Row(row.fault)).add(row)
    return total


def text(rows: Iterable[Row]) -> str:
    """The table in Markdown."""
    rows = list(rows)
    everything = Row("all")
    for row in rows:
        everything.add(row)
    lines = [f"| fault | {' | '.join(COLUMNS)} |", "| --- |" + " --- |" * len(COLUMNS)]
    for row in (*rows, everything):
        lines.append(f"| {row.fault} | {' | '.join(str(getattr(row, c)) for c in COLUMNS)} |")
    return "\n".join(lines)
