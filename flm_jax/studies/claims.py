"""Decides the claims of "less is more" from paired differences, and writes the study's report.

The two arms of a claim are compared seed by seed, with the same pool in the same order, by
Student's t over seeds. The p-values of all claims are corrected together (Holm). Below 0.05, a
claim is supported if the mean difference is on the claimed side, and not supported if it is on the
other side. Otherwise it is undecided. The 95% intervals are those of single claims.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from flm_jax.runtime import paths
from flm_jax.runtime.figures import ACCENT, GUIDE, LINE, clean, plt, save
from flm_jax.store.files import write_atomically, write_result
from flm_jax.studies.growth_study.analysis import LEVEL, holm, interval
from flm_jax.studies.less_is_more import BUDGETS, LessIsMoreConfig, MixConfig

Row = dict[str, Any]
Setting = tuple[int, str, str, str]  # size, selection, mix, budget


@dataclasses.dataclass(frozen=True)
class Side:
    """The arms of one setting with all seeds, and the categories in which they are measured."""

    setting: Setting
    categories: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Claim:
    """The claim that `better` has a lower loss, or a higher accuracy, than `worse`.

    Attributes:
      text: the claim in words.
      better: the side that is claimed to be better.
      worse: the other side.
      metric: "loss" (nats per token) or "accuracy" (share of right answers).
    """

    text: str
    better: Side
    worse: Side
    metric: str = "loss"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the seeds say about a claim.

    Attributes:
      claim: the claim.
      gain: the advantage of `claim.better`, mean over seeds, in the metric's unit.
      low: lower end of the gain's 95% interval.
      high: upper end.
      seeds: number of seeds that have both arms.
      p: two-sided p-value of no difference; of several claims corrected (`corrected`).
    """

    claim: Claim
    gain: float
    low: float
    high: float
    seeds: int
    p: float

    @property
    def word(self) -> str:
        """The verdict: "supported", "not supported" or "undecided"."""
        if self.p >= 1 - LEVEL:
            return "undecided"
        return "supported" if self.gain > 0 else "not supported"

    def __str__(self) -> str:
        unit = "nats per token" if self.claim.metric == "loss" else "of the answers"
        return (
            f"{self.word.capitalize()} at this size: {self.claim.text} (ahead by {self.gain:+.3f} "
            f"{unit}, 95% interval {self.low:+.3f} to {self.high:+.3f}, {self.seeds} seeds, "
            f"corrected p = {self.p:.3f})."
        )


class Rows:
    """The base's row, and the rows of the finished arms by setting and seed."""

    def __init__(self, config: LessIsMoreConfig, rows: Iterable[Row]):
        """Sorts the rows from `less_is_more.run`."""
        self.base: Row = {}
        self.arms: dict[Setting, dict[int, Row]] = {}
        for row in rows:
            if row["name"] == "base":
                self.base = row
                continue
            # The largest arms are the same under both budgets, and are run once.
            budgets = BUDGETS if row["size"] == config.sizes[-1] else (row["budget"],)
            for budget in budgets:
                setting = (row["size"], row["selection"], row["mix"], budget)
                self.arms.setdefault(setting, {})[row["seed"]] = row

    def values(self, side: Side, metric: str) -> dict[int, float]:
        """Returns, for each seed, the mean over the side's categories that have the metric."""
        return {
            seed: value(row, side.categories, metric)
            for seed, row in self.arms.get(side.setting, {}).items()
        }


def value(row: Row, categories: Iterable[str], metric: str) -> float:
    """Averages a metric over the categories that have it.

    Args:
      row: a stored row of the study.
      categories: the categories to average over.
      metric: "loss" or "accuracy".

    Returns:
      The mean; nan if no category has the metric.
    """
    values = [row["scores"][c].get(metric) for c in categories]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else math.nan


def decide(claim: Claim, rows: Rows) -> Verdict | None:
    """Decides a claim by the rule above; None if no seed has both arms."""
    better, worse = (rows.values(side, claim.metric) for side in (claim.better, claim.worse))
    sign = -1 if claim.metric == "loss" else 1
    gains = [sign * (better[s] - worse[s]) for s in sorted(better.keys() & worse.keys())]
    if not gains or math.isnan(gains[0]):
        return None
    found = interval(gains)
    return Verdict(claim, found.mean, found.low, found.high, found.seeds, found.p)


def corrected(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Returns verdicts whose p-values are corrected for their number, by Holm's method."""
    by_text = {v.claim.text: v for v in verdicts}
    adjusted = holm({text: v.p for text, v in by_text.items()})
    return [dataclasses.replace(v, p=adjusted[text]) for text, v in by_text.items()]


def groups(config: LessIsMoreConfig, categories: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Splits categories into those whose text the base has seen, and those that are new to it."""
    known = tuple(c for c in categories if c in config.known)
    new = tuple(c for c in categories if c not in config.known)
    return {name: cs for name, cs in (("known", known), ("new", new)) if cs}


def claims(config: LessIsMoreConfig, categories: Sequence[str]) -> list[Claim]:
    """Returns the paper's claims (arXiv 2407.02783) in terms of the grid."""
    small, large, even = config.sizes[0], config.sizes[-1], config.mixes[0].name
    made: list[Claim] = []

    def add(text: str, better: Setting, worse: Setting, over: Iterable[str]) -> None:
        made.append(Claim(text, Side(better, tuple(over)), Side(worse, tuple(over))))

    for budget in BUDGETS:
        for name, over in groups(config, categories).items():
            add(
                f"{small} chosen conversations beat {large} taken at random in {name} categories, "
                f"at equal {budget}",
                (small, "chosen", even, budget), (large, "random", even, budget), over,
            )  # fmt: skip
        for size in config.sizes:
            if size < large or budget == "steps":
                add(
                    f"{size} chosen conversations beat {size} taken at random"
                    + (f", at equal {budget}" if size < large else ""),
                    (size, "chosen", even, budget), (size, "random", even, budget), categories,
                )  # fmt: skip
        add(
            f"{large} conversations taken at random beat {small}, at equal {budget}",
            (large, "random", even, budget), (small, "random", even, budget), categories,
        )  # fmt: skip
    for mix in config.mixes[1:]:
        add(
            f"half of the conversations being {_names(mix.more)} helps there",
            (large, "chosen", mix.name, "steps"), (large, "chosen", even, "steps"), mix.more,
        )  # fmt: skip
    made += _worked_steps(config.mixes, large)
    return made


def _worked_steps(mixes: Sequence[MixConfig], size: int) -> list[Claim]:
    """Claims about pairs of mixes where each mix leaves out the categories that the other favours.

    Each mix is measured by the accuracy in its own categories.
    """
    return [
        Claim(
            f"{_names(one.more)} in place of {_names(other.more)} gives more right answers",
            Side((size, "chosen", one.name, "steps"), one.more),
            Side((size, "chosen", other.name, "steps"), other.more),
            "accuracy",
        )
        for n, one in enumerate(mixes)
        for other in mixes[:n]
        if one.more and one.more == other.without and other.more == one.without
    ]


def _names(categories: Iterable[str]) -> str:
    """Joins category names into a phrase."""
    return " and ".join(c.replace("_", " ") for c in categories)


def write(config: LessIsMoreConfig, results: Sequence[Row], workdir: str) -> list[Verdict]:
    """Writes report/less_is_more.md, report/less_is_more.json and two figures.

    Args:
      config: the study.
      results: the rows from `less_is_more.run`.
      workdir: the study's folder.

    Returns:
      The verdicts of the claims that can be decided.
    """
    folder = paths.of(workdir) / "report"
    rows = Rows(config, results)
    categories = [c for c in rows.base["scores"] if c != "all"]
    decided = [decide(claim, rows) for claim in claims(config, categories)]
    verdicts = corrected(v for v in decided if v)
    _sizes_figure(config, rows, groups(config, categories), folder / "less_is_more_sizes.png")
    _mixes_figure(config, rows, categories, folder / "less_is_more_mixes.png")
    write_result(
        folder / "less_is_more.json", {"rows": list(results), "verdicts": verdict_rows(verdicts)}
    )
    write_atomically(folder / "less_is_more.md", _markdown(config, rows, categories, verdicts))
    return verdicts


def verdict_rows(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """Turns verdicts into JSON values; an infinite end of an interval becomes None."""
    return [
        {
            "claim": v.claim.text, "verdict": v.word, "gain": v.gain, "low": finite(v.low),
            "high": finite(v.high), "p": v.p, "seeds": v.seeds, "metric": v.claim.metric,
        }
        for v in verdicts
    ]  # fmt: skip


def finite(x: float) -> float | None:
    """Returns None for infinity and nan, which JSON does not have."""
    return x if math.isfinite(x) else None


def _markdown(
    config: LessIsMoreConfig, rows: Rows, categories: Sequence[str], verdicts: Sequence[Verdict]
) -> str:
    parts = groups(config, categories)
    heads = ["size", "selection", "mix", "equal", "seeds", "steps"]
    heads += [f"loss, {name}" for name in parts] + ["right", "base data, bits per byte"]
    lines = [heads, ["---"] * len(heads), _table_row("base", [rows.base], parts, {})]
    for (size, selection, mix, budget), by_seed in rows.arms.items():
        if size < config.sizes[-1] or budget == "steps":
            label = {"size": size, "selection": selection, "mix": mix, "budget": budget}
            if size == config.sizes[-1]:
                label["budget"] = "both"
            lines.append(_table_row("", list(by_seed.values()), parts, label))
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    sentences = "\n".join(f"- {v}" for v in verdicts)
    named = "; ".join(f"{name}: {', '.join(cs)}" for name, cs in parts.items())
    return f"""{sentences}

{table}

Mean over seeds, plus or minus the half width of the 95% interval (Student's t). Loss: nats per
token of held-out responses, mean over categories ({named}). Right: answers that a program can
check, mean over the categories that have them.

![loss against size](less_is_more_sizes.png)

![loss by mix](less_is_more_mixes.png)
"""


def _table_row(
    name: str, seeds: Sequence[Row], parts: dict[str, tuple[str, ...]], label: dict[str, Any]
) -> list[str]:
    """Writes the table's cells for one setting, from the rows of its seeds.

    The base has a `name` and no `label`; an arm has the fields of its setting as `label`.
    """

    def cell(measure: Callable[[Row], float], form: str) -> str:
        found = interval([measure(row) for row in seeds])
        half = found.mean - found.low
        return format(found.mean, form) + (
            f" ± {format(half, form)}" if math.isfinite(half) else ""
        )

    cells = [str(label.get("size", name))]
    cells += [str(label.get(key, "")) for key in ("selection", "mix", "budget")]
    cells += [str(len(seeds)) if label else "", str(seeds[0].get("steps", 0))]
    cells += [cell(lambda r, cs=cs: value(r, cs, "loss"), ".3f") for cs in parts.values()]  # type: ignore[misc]
    every = [c for cs in parts.values() for c in cs]
    cells.append(cell(lambda r: value(r, every, "accuracy"), ".1%"))
    cells.append(cell(lambda r: r["bpb"]["bpb_end"], ".4f") if label else "")
    return cells


def _sizes_figure(
    config: LessIsMoreConfig, rows: Rows, parts: dict[str, tuple[str, ...]], path: pathlib.Path
) -> None:
    """Draws loss against the number of conversations, for both selections and both budgets."""
    figure, panels = plt.subplots(1, len(parts), figsize=(4.6 * len(parts), 3.6), squeeze=False)
    even = config.mixes[0].name
    kinds = [("random", "steps"), ("random", "epochs"), ("chosen", "steps"), ("chosen", "epochs")]
    for panel, (name, over) in zip(panels[0], parts.items(), strict=True):
        for n, (selection, budget) in enumerate(kinds):
            sides = {size: Side((size, selection, even, budget), over) for size in config.sizes}
            losses = {size: rows.values(side, "loss") for size, side in sides.items()}
            means = {
                size: interval([*by_seed.values()]) for size, by_seed in losses.items() if by_seed
            }
            panel.errorbar(
                [size * 1.05**n for size in means],  # a small shift, so that bars do not overlap
                [i.mean for i in means.values()],
                [i.mean - i.low if math.isfinite(i.low) else 0.0 for i in means.values()],
                color=GUIDE if selection == "random" else LINE,
                linestyle="-" if budget == "steps" else "--",
                marker="o", markersize=4, capsize=3, label=f"{selection}, equal {budget}",
            )  # fmt: skip
        panel.axhline(value(rows.base, over, "loss"), color=ACCENT, linewidth=1, linestyle=":")
        panel.set_xscale("log", base=2)
        panel.set_xticks(config.sizes, [str(size) for size in config.sizes])
        panel.set(title=f"{name} categories (dotted: base)", xlabel="conversations (count)")
        clean(panel)
    panels[0][0].set_ylabel("held-out response loss (nats per token)")
    panels[0][-1].legend(fontsize=8, frameon=False)
    save(figure, path)


def _mixes_figure(
    config: LessIsMoreConfig, rows: Rows, categories: Sequence[str], path: pathlib.Path
) -> None:
    """Draws each category's loss and accuracy, by mix, at the largest size."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6))
    width = 0.8 / len(config.mixes)
    colors = plt.get_cmap("viridis")
    for panel, metric in zip(panels, ("loss", "accuracy"), strict=True):
        shown = [c for c in categories if rows.base["scores"][c].get(metric) is not None]
        for n, mix in enumerate(config.mixes):
            setting = (config.sizes[-1], "chosen", mix.name, "steps")
            by_seed = rows.arms.get(setting, {}).values()
            if not by_seed:
                continue
            found = [interval([r["scores"][c][metric] for r in by_seed]) for c in shown]
            errors = [i.mean - i.low if math.isfinite(i.low) else 0.0 for i in found]
            panel.bar(
                np.arange(len(shown)) + (n - (len(config.mixes) - 1) / 2) * width,
                [i.mean for i in found], width, yerr=errors, capsize=2, label=mix.name,
                color=colors(0.85 * n / max(len(config.mixes) - 1, 1)),
            )  # fmt: skip
        panel.set_xticks(range(len(shown)), shown, rotation=35, ha="right", fontsize=8)
        panel.set_ylim(0, 1 if metric == "accuracy" else None)
        panel.set_ylabel(
            "response loss (nats per token)" if metric == "loss" else "share right (0 to 1)"
        )
        clean(panel)
    panels[0].legend(title="mix", fontsize=8, frameon=False)
    save(figure, path)
