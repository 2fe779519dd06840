"""Writes docs/study from the raw results: one page, figures and a CSV for each study."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import pathlib
from typing import Any

from flm_jax.store.files import write_atomically, write_result
from flm_jax.studies.growth_study import analysis, figures, growths, planner, results
from flm_jax.studies.growth_study.analysis import Interval, Result
from flm_jax.studies.growth_study.results import Results


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the results of a study say.

    Attributes:
      name: the study's name.
      verdict: on the primary arm; "not reached" before all its trials are there.
      results: on every arm, the primary one first.
      page: the written page.
    """

    name: str
    verdict: str
    results: list[Result]
    page: pathlib.Path


def write(docs: pathlib.Path) -> list[Summary]:
    """Writes the report of every file docs/results/*.jsonl, and plans.json for `flm plan`."""
    found = [results.read(path) for path in sorted((docs / "results").glob("*.jsonl"))]
    summaries = [_write_one(one, docs) for one in found]
    plans = [fit for one in found if (fit := planner.fitted(one)) is not None]
    write_result(docs / "plans.json", [dataclasses.asdict(p) for p in plans])
    return summaries


def _write_one(found: Results, docs: pathlib.Path) -> Summary:
    losses, frozen = found.losses(), found.frozen
    judged: list[Result] = []
    secondary: dict[str, tuple[Interval, float]] = {}
    if losses and frozen:
        order = sorted(losses.arms, key=lambda arm: arm != frozen["primary"])
        judged = [analysis.judge(losses, arm) for arm in order]
        if frozen["primary"] in losses.arms:
            secondary = analysis.secondary(losses, frozen["primary"], found.ablations())
    names = figures.draw(found, judged, docs)
    write_atomically(docs / f"{found.name}.csv", _csv(found))
    primary = next((r for r in judged if frozen and r.arm == frozen["primary"]), None)
    verdict = primary.verdict if primary else "not reached"
    text = _page(found, judged, secondary, names, verdict)
    page = docs / f"{found.name}.md"
    write_atomically(page, text)
    return Summary(found.name, verdict, judged, page)


def _csv(found: Results) -> str:
    """One row for each trial."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = ["phase", "arm", "seed", "share", "rate"]
    measured = ["flops", "tokens", "end", "bpb", "seconds", "params_digest"]
    writer.writerow([*columns, *measured])
    for trial in found.trials:
        row = trial["result"] or {}
        writer.writerow([*(trial[c] for c in columns), *(row.get(m, "") for m in measured)])
    return file.getvalue()


def _of(value: Interval, digits: int = 3) -> str:
    if not math.isfinite(value.low):
        return f"{value.mean:.{digits}f} (one seed)"
    bound = f", {value.bounds} bounds" if value.bounds else ""
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]{bound}"


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines)


def _page(
    found: Results,
    judged: list[Result],
    secondary: dict[str, tuple[Interval, float]],
    names: list[str],
    verdict: str,
) -> str:
    frozen = found.frozen
    parts = [
        f"# Does growth pay? Results of study {found.name!r}",
        "Made from the raw results (`results/"
        f"{found.name}.jsonl`) by `flm study --report`. Do not edit. The design and how to repeat "
        "it: `configs/study.py`.",
    ]
    gaps = [f"{len(found.missing)} of {len(found.trials)} known trials have no result yet"] * bool(
        found.missing
    ) + [f"{len(found.diverged)} trials diverged"] * bool(found.diverged)
    if gaps:
        parts.append(f"**Incomplete**: {'; '.join(gaps)}.")
    parts += ["## Verdict", _verdict(found, judged, verdict)]
    parts += ["## Setup", _setup(found)]
    if frozen:
        parts += ["## Tuning", _tuning(found)]
    if gate := found.of("gate"):
        rows = [[t["arm"], f"{t['budget']:.3g}", f"{t['result']['bpb']:.4f}"] for t in gate]
        parts += ["## Gate", _table(["model", "FLOPs", "bits per byte, decayed"], rows)]
    if judged:
        parts += ["## Arms", _arms(found, judged)]
    if secondary:
        rows = [[name, _of(value, 4), f"{p:.3g}"] for name, (value, p) in secondary.items()]
        parts += [
            "## All other comparisons",
            "Differences are bits per byte; negative is better. p-values are corrected together "
            "(Holm).",
            _table(["comparison", "mean [95% interval]", "p, corrected"], rows),
        ]
    if measured := growths.measured(found):
        parts += ["## Growths", _growths(measured), _packages(found)]
    parts += [f"![{name}]({name}.svg)" for name in names]
    return "\n\n".join(part for part in parts if part) + "\n"


def _verdict(found: Results, judged: list[Result], verdict: str) -> str:
    frozen = found.frozen
    if not frozen or not judged or verdict == "not reached":
        return "Not reached: the arms are not finished."
    first = judged[0]
    kept = "still matches" if frozen["analysis"] == analysis.digest() else "**no longer matches**"
    return (
        f"**{verdict}**: {analysis.MEANING[verdict]}.\n\n"
        f"Primary arm {first.arm}, C = {frozen['budget']:.3g} FLOPs: compute multiplier "
        f"{_of(first.multiplier)}; against the best fixed size ({first.best}) "
        f"{_of(first.versus[first.best], 4)} bits per byte at C. Intervals: 95%, "
        f"{first.multiplier.seeds} seeds.\n\nThe digest of the analysis, frozen with tuning, "
        f"{kept} the code ({frozen['analysis'][:12]})."
    )


def _setup(found: Results) -> str:
    header, config = found.header, found.config
    corpus = header["corpus"]
    models = [
        [name, m["params"], f"{m['flops_per_token'] / 1e6:.2f}"]
        for name, m in header["models"].items()
    ]
    packages = ", ".join(f"{n} {p['version']}" for n, p in corpus["packages"].items())
    machines = ", ".join(
        f"{json.dumps(e['machine'])} (jax {e['jax']}, Python {e['python']})"
        for e in header["environments"]
    )
    seconds = sum(p["seconds"] for p in found.pieces.values())
    return "\n\n".join(
        [
            _table(["model", "parameters", "MFLOP per token"], models),
            f"Corpus: {corpus['train']['bytes'] / 1e6:.1f} MB for training, read at most "
            f"{config.corpus.passes} time(s); {corpus['validation']['bytes'] / 1e3:.0f} kB held "
            f"out in {corpus['validation']['documents']} files; {corpus['removed']['duplicates']} "
            f"copies and {corpus['removed']['near_duplicates']} near duplicates of held-out files "
            f"left out. Digest {corpus['digest'][:16]}. Packages: {packages}.",
            f"Machines: {machines}. {len(found.pieces)} pieces of training, {seconds / 3600:.2f} "
            "core hours.",
        ]
    )


def _tuning(found: Results) -> str:
    frozen = found.frozen
    assert frozen is not None
    rows = [
        [t["arm"], f"x{t['rate']:g}", f"{t['result']['bpb']:.4f}"]
        for phase in ("tuning", "growth tuning")
        for t in found.of(phase)
    ]
    edges = ", ".join(frozen["edges"])
    note = f" The best rate is at the edge of those tried for: {edges}." if edges else ""
    return (
        f"One seed, at {found.config.tuning_share:g} C. Gate and tuning cost "
        f"{frozen['tuning_flops']:.3g} FLOPs. Primary arm, frozen: **{frozen['primary']}**.{note}"
        "\n\n" + _table(["model or arm", "learning rate", "bits per byte"], rows)
    )


def _arms(found: Results, judged: list[Result]) -> str:
    losses = found.losses()
    assert losses is not None
    fixed = [
        [f"{name}, never grown", _of(analysis.interval(list(values.values())), 4), "", "", ""]
        for name, values in losses.fixed.items()
    ]
    rows = [
        [
            r.arm,
            _of(analysis.interval(list(losses.arms[r.arm].values())), 4),
            _of(r.multiplier),
            _of(r.versus[r.best], 4),
            r.verdict,
        ]
        for r in judged
    ]
    header = [
        "arm",
        "bits per byte at C",
        "compute multiplier",
        f"minus {judged[0].best}",
        "verdict",
    ]
    return _table(header, fixed + rows) + (
        "\n\nOnly the first arm is tested; the others' verdicts are not corrected for their number."
    )


def _growths(measured: list[growths.Growths]) -> str:
    def text(value: float | None, digits: int = 3) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    rows = [
        [
            g.arm, text(g.before, 4), text(g.after, 4), text(g.recovered), text(g.slope_before),
            text(g.slope_after), f"{g.dead:g} / {g.dead_end:g}", f"{g.locked:g} / {g.locked_end:g}",
            text(g.tokens, 2),
        ]
        for g in measured
    ]  # fmt: skip
    header = [
        "arm", "before", "right after", "recovered after, of C", "slope before", "slope after",
        "dead slots, at mask 0 / end", "locked copies, at mask 0 / end", "tokens over T's",
    ]  # fmt: skip
    return _table(header, rows)


def _packages(found: Results) -> str:
    """Bits per byte by package: the source at the growth, and everything at C. Seed 0."""
    frozen, config = found.frozen, found.config
    assert frozen is not None
    at_end = {
        t["arm"]: t["result"]["packages"]
        for t in found.of("arms")
        if t["seed"] == 0 and t["share"] == 1
    }
    primary = [t for t in found.of("arms") if t["arm"] == frozen["primary"] and t["seed"] == 0]
    columns: dict[str, Any] = {}
    if primary:
        chain = found.chain(primary[0])
        grown = next(p for p in chain if p.get("growth"))
        columns["source at the growth"] = found.pieces[grown["started_from"]]["packages"]
        columns[frozen["primary"]] = at_end[frozen["primary"]]
    for name in (config.source, config.between, config.target):
        if name in at_end:
            columns[name] = at_end[name]
    if not columns:
        return ""
    packages = sorted(next(iter(columns.values())))
    rows = [[p, *(f"{column[p]:.3f}" for column in columns.values())] for p in packages]
    return "Bits per byte by package, seed 0:\n\n" + _table(["package", *columns], rows)
