"""Fits a power law to runs, and predicts the loss of a larger one.

  flm mup predict --data=runs.csv --predict=1e9,1e10
  flm mup predict --data=runs.csv --predict=1e9:2e10
  flm mup predict --config=configs/mup_study.py --workdir=runs/mup

The law is L = a x^b + c, of runs of equal steps; predictions have intervals, and beside them what a
straight line through the logarithms predicts (a x^b), as a baseline. A CSV file has columns
`params,loss` or `flops,loss`; with `params,tokens,loss` it fits L(N, D) = E + A / N^alpha + B /
D^beta, and --predict takes pairs N:D. With --config, the narrow models of the config's family are
trained, the widest is predicted, then trained and compared.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from typing import Any

from flm_jax.commands import config_files
from flm_jax.commands.command import Call, Command, flag
from flm_jax.errors import UserError
from flm_jax.params import counts
from flm_jax.runtime import display, paths
from flm_jax.store.files import write_result
from flm_jax.studies import predict, study
from flm_jax.studies.config import MupStudyConfig


@dataclasses.dataclass(frozen=True)
class Flags:
    """The command's own flags."""

    data: str = flag("", "CSV file with the runs.")
    predict: tuple[str, ...] = flag(
        (), "Sizes to predict, as 1e9,1e10; pairs as 1e9:2e10.", comma=True
    )
    figure: str = flag("", "With --data: file for the figure.")


def _numbers(text: str, count: int) -> list[float]:
    try:
        values = [float(part) for part in text.split(":")]
    except ValueError:
        values = []
    if len(values) != count or any(not v > 0 for v in values):
        wanted = "a number above 0" if count == 1 else "params:tokens, both above 0"
        raise UserError(f"--predict={text}: give {wanted}")
    return values


def _columns(path: str) -> dict[str, list[float]]:
    try:
        with io.StringIO(paths.of(path).read_text(encoding="utf-8"), newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"--data={path}: {error.strerror}; give a CSV file") from error
    if not rows or "loss" not in rows[0] or not {"params", "flops"} & set(rows[0]):
        raise UserError(
            f"{path}: needs a header with params,loss or flops,loss or params,tokens,loss, and rows"
        )
    try:
        return {name: [float(row[name]) for row in rows] for name in rows[0]}
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: a value is not a number ({error}); fix the file") from error


def _from_file(flags: Flags) -> dict[str, Any]:
    columns = _columns(flags.data)
    if "tokens" in columns and "params" in columns:
        two = predict.fit_two(columns["params"], columns["tokens"], columns["loss"])
        pairs = [_numbers(text, 2) for text in flags.predict]
        values = [
            {"params": n, "tokens": d, "predicted": float(two(n, d))}  # type: ignore[arg-type]
            for n, d in pairs
        ]
        return {**dataclasses.asdict(two), "predictions": values}
    x = columns["params" if "params" in columns else "flops"]
    sizes = [_numbers(text, 1)[0] for text in flags.predict]
    law = predict.fit(x, columns["loss"])
    values = predict.predictions(x, columns["loss"], sizes) if sizes else []
    if flags.figure:
        figure = paths.of(flags.figure)
        predict.draw(x, columns["loss"], law, values, [], figure)
    return {**dataclasses.asdict(law), "predictions": values}


def _from_family(call: Call[Flags]) -> dict[str, Any]:
    if not call.config:
        raise UserError("--config is missing; give --config=configs/FILE.py, or --data=FILE.csv")
    settings = config_files.dataclass_of(MupStudyConfig, call.config)
    if not settings.family:
        raise UserError("config.family is empty; give the stages of several widths, narrow first")
    if not call.workdir:
        raise UserError("--workdir is missing; give the run's folder, as --workdir=runs/NAME")
    folder = paths.of(call.workdir, "workdir")
    console = display.open_console(stderr=True)
    trials = study.Study(settings.experiment, folder / "trials.jsonl")

    def trained(index: int) -> tuple[float, float]:
        stage = settings.family[index]
        losses = []
        for seed in range(settings.seeds):
            loss = trials.trial(stage, seed)["bpb"]
            if loss is None:
                raise UserError(f"family member {stage.name} diverged; lower its learning rates")
            losses.append(loss)
        size = counts.params(stage.model)
        mean = sum(losses) / len(losses)
        console.print(f"{stage.name}: {size:,} parameters, {mean:.4f} bits per byte")
        return float(size), mean

    narrow = [trained(index) for index in range(len(settings.family) - 1)]
    x, losses = [p[0] for p in narrow], [p[1] for p in narrow]
    wide = float(counts.params(settings.family[-1].model))
    law, values = predict.fit(x, losses), predict.predictions(x, losses, [wide])
    result = {**dataclasses.asdict(law), "points": narrow, "predictions": values}
    # Written before the predicted model is trained.
    write_result(folder / "report" / "prediction.json", result)
    console.print(f"predicted at {wide:,.0f} parameters: {values[0]['predicted']:.4f}")
    _, measured = trained(len(settings.family) - 1)
    result |= {
        "measured": measured,
        "error": values[0]["predicted"] - measured,
        "error_of_drop": predict.share_of_drop(values[0]["predicted"], measured, losses[-1]),
        "line_error_of_drop": predict.share_of_drop(values[0]["line"], measured, losses[-1]),
    }
    write_result(folder / "report" / "prediction.json", result)
    path = folder / "report" / "prediction.png"
    predict.draw(x, losses, law, values, [measured], path)
    return {**result, "figure": str(path)}


def main(call: Call[Flags]) -> dict[str, Any]:
    result = _from_file(call.flags) if call.flags.data else _from_family(call)
    console = call.console()
    fitted = {k: v for k, v in result.items() if isinstance(v, float)}
    console.print("  ".join(f"{name} {value:.5g}" for name, value in fitted.items()))
    for p in result["predictions"]:
        console.print("  ".join(f"{name} {value:.5g}" for name, value in p.items()))
    return result


COMMAND = Command(main, Flags, config="optional", workdir="optional")
