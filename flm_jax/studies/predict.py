"""Predicts losses: L(x) = a x^b + c over parameters or FLOPs, with intervals, and L(N, D).

Mu-scaling (arXiv 2304.06875) fits the first form to the losses of narrow models at an equal step,
and predicts the losses of wide ones. The second is the Chinchilla form (arXiv 2203.15556),
E + A / N^alpha + B / D^beta, over parameters N and tokens D.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

from flm_jax.errors import UserError
from flm_jax.runtime.figures import ACCENT, GUIDE, LINE, clean, plt, save

Numbers = Sequence[float] | np.ndarray

BOOTSTRAPS = 1000
INTERVAL = (2.5, 97.5)  # percentiles
# Bounds of the exponents. Beyond them, a curve is almost a step or a straight line.
_LOWEST_B, _HIGHEST_B = -3.0, -0.01


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """The function a x^b + c, with b below 0."""

    a: float
    b: float
    c: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.a * np.asarray(x, float) ** self.b + self.c


def fit(x: Numbers, loss: Numbers) -> PowerLaw:
    """Fits a x^b + c by least squares.

    For a given b, a and c are linear, so only b is searched.

    Args:
      x: parameters or FLOPs, above 0 [points].
      loss: losses [points].

    Raises:
      UserError: there are fewer than four different sizes, or a value cannot be fitted.
    """
    xs, ys = np.asarray(x, float), np.asarray(loss, float)
    if len(xs) < 4:
        raise UserError(
            f"a x^b + c has 3 parameters and there are {len(xs)} points; give at least 4"
        )
    if not (np.isfinite(xs).all() and np.isfinite(ys).all() and (xs > 0).all()):
        raise UserError(
            "a size is not a finite number above 0, or a loss is not finite; leave out such points"
        )
    if len(set(xs)) < 4:
        raise UserError(f"the points have {len(set(xs))} different sizes; give at least 4")
    unit = np.exp(np.mean(np.log(xs)))  # so that x^b is near 1 for any b

    def linear(b: float) -> tuple[np.ndarray, float]:
        basis = np.stack([(xs / unit) ** b, np.ones_like(xs)], axis=1)
        coefficients, *_ = np.linalg.lstsq(basis, ys, rcond=None)
        return coefficients, float(np.sum((basis @ coefficients - ys) ** 2))

    grid = np.linspace(_LOWEST_B, _HIGHEST_B, 61)
    best = int(np.argmin([linear(b)[1] for b in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    result = optimize.minimize_scalar(
        lambda b: linear(b)[1], bounds=(low, high), method="bounded", options={"xatol": 1e-10}
    )
    (a, c), _ = linear(result.x)
    return PowerLaw(a=float(a * unit**-result.x), b=float(result.x), c=float(c))


def line(x: Numbers, loss: Numbers) -> PowerLaw:
    """Fits the baseline a x^b: a straight line through the logarithms, by least squares.

    A law with a constant is worth its third number only if it predicts better than this.

    Args:
      x: parameters or FLOPs, above 0 [points].
      loss: losses, above 0 [points].
    """
    found = stats.linregress(np.log(x), np.log(loss))
    return PowerLaw(a=float(np.exp(found.intercept)), b=float(found.slope), c=0.0)


def share_of_drop(predicted: float, measured: float, last: float) -> float:
    """Returns a prediction's error over the drop of the loss that was to be predicted.

    Losses of neighbouring sizes are close, so that a small error in the loss says little: who
    predicts no change at all has an error of 1 here.

    Args:
      predicted: the predicted loss.
      measured: the loss.
      last: the loss of the largest model that the prediction knew.

    >>> round(share_of_drop(2.25, 2.2, 2.3), 6)
    0.5
    """
    return abs(predicted - measured) / abs(last - measured)


def predictions(
    x: Numbers, loss: Numbers, at: Sequence[float], seed: int = 0, bootstraps: int = BOOTSTRAPS
) -> list[dict[str, float]]:
    """Predicts losses, with 95% intervals by a residual bootstrap.

    The residuals are scaled by sqrt(n / (n - 3)) to account for the three fitted numbers. Each
    bootstrap adds drawn residuals to the fit, fits again, and adds a drawn residual to each
    prediction.

    Args:
      x: parameters or FLOPs, above 0 [points].
      loss: losses [points].
      at: sizes to predict the loss at.
      seed: of the bootstrap.
      bootstraps: number of fits.

    Returns:
      For each size x, predicted, low and high, and line: what the baseline `line` predicts.

    Raises:
      UserError: as in `fit`.
    """
    law, baseline = fit(x, loss), line(x, loss)
    xs = np.asarray(x, float)
    residuals = (np.asarray(loss, float) - law(xs)) * np.sqrt(len(xs) / (len(xs) - 3))
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(bootstraps):
        again = fit(x, law(xs) + rng.choice(residuals, len(xs)))
        drawn.append(again(np.asarray(at)) + rng.choice(residuals, len(at)))
    low, high = np.percentile(drawn, INTERVAL, axis=0)
    return [
        {
            "x": float(v),
            "predicted": float(p),
            "low": float(lo),
            "high": float(hi),
            "line": float(b),
        }
        for v, p, lo, hi, b in zip(
            at, law(np.asarray(at)), low, high, baseline(np.asarray(at)), strict=True
        )
    ]


@dataclasses.dataclass(frozen=True)
class TwoLaw:
    """The function E + A / N^alpha + B / D^beta, of parameters N and tokens D."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def __call__(self, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        n, d = np.asarray(params, float), np.asarray(tokens, float)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta


def fit_two(params: Sequence[float], tokens: Sequence[float], loss: Sequence[float]) -> TwoLaw:
    """Fits E + A / N^alpha + B / D^beta by least squares.

    For given exponents, E, A and B are linear and not negative, so only the exponents are searched.

    Args:
      params: numbers of parameters [points].
      tokens: numbers of training tokens [points].
      loss: losses [points].

    Raises:
      UserError: there are fewer than six points, or too few different params or tokens.
    """
    n, d, ys = (np.asarray(v, float) for v in (params, tokens, loss))
    if len(ys) < 6:
        raise UserError(
            f"E + A / N^alpha + B / D^beta has 5 parameters and there are {len(ys)} points; give "
            "at least 6"
        )
    if len(set(n)) < 3 or len(set(d)) < 3:
        raise UserError(
            f"L(N, D) has {len(set(n))} different params and {len(set(d))} different tokens; give "
            "at least 3 of each"
        )
    units = [np.exp(np.mean(np.log(v))) for v in (n, d)]

    def linear(exponents: np.ndarray) -> tuple[np.ndarray, float]:
        powers = [(v / u) ** -e for v, u, e in zip((n, d), units, exponents, strict=True)]
        basis = np.stack([np.ones_like(ys), *powers], axis=1)
        coefficients, rest = optimize.nnls(basis, ys)
        return coefficients, float(rest)

    grid = np.linspace(0.05, 1.5, 16)
    start = min(((p, q) for p in grid for q in grid), key=lambda e: linear(np.array(e))[1])
    result = optimize.minimize(
        lambda e: linear(np.clip(e, 0.01, 3.0))[1], start, method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 4000},
    )  # fmt: skip
    alpha, beta = np.clip(result.x, 0.01, 3.0)
    (e, a, b), _ = linear(np.array([alpha, beta]))
    return TwoLaw(
        float(e), float(a * units[0] ** alpha), float(alpha), float(b * units[1] ** beta),
        float(beta),
    )  # fmt: skip


def draw(
    x: Sequence[float],
    loss: Sequence[float],
    law: PowerLaw,
    predicted: Sequence[dict[str, float]],
    measured: Sequence[float],
    path: pathlib.Path,
) -> None:
    """Draws the fitted points, the curve, the predictions, and later measurements.

    Args:
      x: parameters or FLOPs of the fitted points.
      loss: their losses.
      law: the curve, from `fit`.
      predicted: predictions with intervals, from `predictions`.
      measured: losses measured at the predicted sizes; empty: none.
      path: PNG file to write.
    """
    figure, panel = plt.subplots(figsize=(5.4, 3.6))
    highest = max([*x, *(p["x"] for p in predicted)])
    xs = np.geomspace(min(x), highest, 100)
    panel.plot(xs, law(xs), color=GUIDE, label=f"{law.a:.3g} x^{law.b:.3f} + {law.c:.3f}")
    panel.plot(xs, line(x, loss)(xs), ":", color=GUIDE, label="baseline: a x^b")
    panel.plot(x, loss, "o", color=LINE, label="fitted on")
    for n, p in enumerate(predicted):
        panel.errorbar(
            p["x"], p["predicted"], [[p["predicted"] - p["low"]], [p["high"] - p["predicted"]]],
            color=GUIDE, marker="_", capsize=4, label="predicted" if n == 0 else None,
        )  # fmt: skip
    if measured:
        at = [p["x"] for p in predicted]
        panel.plot(at, measured, "x", color=ACCENT, markersize=8, label="measured afterwards")
    panel.set_xscale("log")
    panel.set(xlabel="parameters or FLOPs", ylabel="loss (nats per token)")
    panel.legend(fontsize=8, frameon=False)
    clean(panel)
    save(figure, path)
