"""Two models' scores side by side, with the difference's interval, and gates on them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flm_jax.errors import UserError
from flm_jax.sft import scoring
from flm_jax.sft.scoring import ALL, Scored

METRICS = ("accuracy", "bpb", "loss")
RISES = ("accuracy",)  # better if higher; the others if lower
RETENTION = "retention"  # category of the base text's bits per byte

Comparison = dict[str, dict[str, dict[str, float | None]]]  # category -> metric -> numbers


def compare(a: Sequence[Scored], b: Sequence[Scored], seed: int = 0) -> Comparison:
    """Per category and for "all": a, b and b - a of each metric, with the difference's interval.

    The interval is of a bootstrap over samples, with the same samples drawn for both models: what
    makes a sample hard for both cancels.
    """
    assert [s.sample for s in a] == [s.sample for s in b]
    found: Comparison = {}
    for category in [*sorted({s.sample.category for s in a}), ALL]:
        pairs = [p for p in zip(a, b, strict=True) if category in (ALL, p[0].sample.category)]
        found[category] = {}
        for metric in METRICS:
            parts = [scoring.parts(side, metric) for side in zip(*pairs, strict=True)]
            count = len(parts[0][0])
            if count:
                found[category][metric] = _difference(parts, count, seed)
    return found


def _difference(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], count: int, seed: int
) -> dict[str, float | None]:
    def difference(*arrays: np.ndarray, axis: int) -> np.ndarray:
        above_a, below_a, above_b, below_b = (x.sum(axis) for x in arrays)
        return np.asarray(above_b / below_b - above_a / below_a)

    one, two = (float(above.sum() / below.sum()) for above, below in parts)
    low, high = scoring.bootstrap(difference, [x for pair in parts for x in pair], seed)
    return {"a": one, "b": two, "difference": two - one, "low": low, "high": high, "n": count}


def retained(a: float, b: float) -> dict[str, float | None]:
    """The base text's bits per byte, in the form of `compare`; measured once, so no interval."""
    return {"a": a, "b": b, "difference": b - a, "low": None, "high": None, "n": 1}


@dataclasses.dataclass(frozen=True)
class Gate:
    """Fails where the metric of the category gets worse by more than the margin, from a to b."""

    category: str
    metric: str
    margin: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """category/metric:margin."""
        name, _, margin = text.rpartition(":")
        category, _, metric = name.rpartition("/")
        try:
            value = float(margin)
        except ValueError:
            value = math.nan
        if metric not in METRICS or not value >= 0 or not category:
            raise UserError(
                f"fail_if={text}: write category/metric:margin, as lists/accuracy:0.05, the "
                f"metric one of {', '.join(METRICS)}, the margin 0 or above",
                argument="fail_if",
            )
        return cls(category, metric, value)

    def check(self, available: Mapping[str, Sequence[str]]) -> None:
        """Raises UserError if it is not measured.

        A gate on an unmeasured metric would always pass.
        """
        if self.metric not in available.get(self.category, ()):
            known = ", ".join(f"{c}/{m}" for c, metrics in available.items() for m in metrics)
            raise UserError(
                f"fail_if={self.category}/{self.metric}:{self.margin:g}: not measured here; "
                f"there are {known}",
                argument="fail_if",
            )

    def failure(self, comparison: Comparison) -> str:
        """One line that says what got worse, with both values; "" if it holds."""
        row: Mapping[str, Any] = comparison[self.category][self.metric]
        worse = -row["difference"] if self.metric in RISES else row["difference"]
        # Not `worse > margin`: what is no number does not pass.
        if worse <= self.margin:
            return ""
        return (
            f"{self.category}/{self.metric} went from {row['a']:.4f} to {row['b']:.4f}, worse by "
            f"{worse:.4f}, and the margin is {self.margin:g}"
        )


def metrics_of(scored_categories: Mapping[str, bool]) -> dict[str, list[str]]:
    """Lists the metrics of `compare`. Args: category -> whether it has a sample with a check."""
    every = {**scored_categories, ALL: any(scored_categories.values())}
    metrics = {
        c: [m for m in METRICS if m != "accuracy" or checked] for c, checked in every.items()
    }
    return {**metrics, RETENTION: ["bpb"]}
