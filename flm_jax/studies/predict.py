"""Loss prediction: L = a x^b + c over parameters or FLOPs, and L(N, D), with intervals.

Mu-scaling fits the first to losses of narrow models at an equal step and predicts wide ones (arXiv
2304.06875); the second is the Chinchilla form E + A / N^alpha + B / D^beta (arXiv 2203.15556).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from scipy import optimize

from flm_jax.errors import UserError
from flm_jax.runtime.figures import ACCENT, GUIDE, LINE, clean, plt, save

Numbers = Sequence[float] | np.ndarray

BOOTSTRAPS = 1000
INTERVAL = (2.5, 97.5)  # percentiles
# Exponents are looked for in between; outside, a curve is a step or a straight line.
_LOWEST_B, _HIGHEST_B = -3.0, -0.01


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """a x^b + c, with b below 0."""

    a: float
    b: float
    c: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.a * np.asarray(x, float) ** self.b + self.c


def fit(x: Numbers, loss: Numbers) -> PowerLaw:
    """Least squares. For a given b the other two are linear, so that only b is searched.

    Args:
      x: parameters or FLOPs, above 0.
      loss: one for each.

    Raises:
      UserError: fewer than four points, or x or loss that cannot be fitted.
    """
    xs, ys = np.asarray(x, float), np.asarray(loss, float)
    if len(xs) < 4:
        raise UserError(
            f"a x^b + c has 3 parameters and there are {len(xs)} points; give at least 4"
        )
    if not (np.isfinite(xs).all() and np.isfinite(ys).all() and (xs > 0).all()):
        raise UserError("the points hold a size that is not above 0, or a loss that is no number")
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
    found = optimize.minimize_scalar(
        lambda b: linear(b)[1], bounds=(low, high), method="bounded", options={"xatol": 1e-10}
    )
    (a, c), _ = linear(found.x)
    return PowerLaw(a=float(a * unit**-found.x), b=float(found.x), c=float(c))


def predictions(
    x: Numbers, loss: Numbers, at: Sequence[float], seed: int = 0, bootstraps: int = BOOTSTRAPS
) -> list[dict[str, float]]:
    """Predicted losses with bootstrap intervals.

    Residuals are drawn again with replacement, scaled by sqrt(n / (n - 3)) for the three fitted
    numbers, added to the fit, and fitted again; a drawn residual is added to each prediction.
    """
    law = fit(x, loss)
    xs = np.asarray(x, float)
    residuals = (np.asarray(loss, float) - law(xs)) * np.sqrt(len(xs) / (len(xs) - 3))
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(bootstraps):
        again = fit(x, law(xs) + rng.choice(residuals, len(xs)))
        drawn.append(again(np.asarray(at)) + rng.choice(residuals, len(at)))
    low, high = np.percentile(drawn, INTERVAL, axis=0)
    return [
        {"x": float(v), "predicted": float(p), "low": float(lo), "high": float(hi)}
        for v, p, lo, hi in zip(at, law(np.asarray(at)), low, high, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class TwoLaw:
    """E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def __call__(self, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        n, d = np.asarray(params, float), np.asarray(tokens, float)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta


def fit_two(params: Sequence[float], tokens: Sequence[float], loss: Sequence[float]) -> TwoLaw:
    """Least squares in the two exponents, the other three being linear and not below 0.

    Raises UserError with fewer than six points, or where one of the two never varies.
    """
    n, d, ys = (np.asarray(v, float) for v in (params, tokens, loss))
    if len(ys) < 6:
        raise UserError(
            f"E + A / N^alpha + B / D^beta has 5 parameters and there are {len(ys)} points; give "
            "at least 6"
        )
    if len(set(n)) < 3 or len(set(d)) < 3:
        raise UserError("L(N, D) needs at least 3 different params and 3 different tokens")
    units = [np.exp(np.mean(np.log(v))) for v in (n, d)]

    def linear(exponents: np.ndarray) -> tuple[np.ndarray, float]:
        basis = np.stack(
            [np.ones_like(ys), *((v / u) ** -e for v, u, e in zip((n, d), units, exponents,
                                                                 strict=True))], axis=1
        )  # fmt: skip
        coefficients, rest = optimize.nnls(basis, ys)
        return coefficients, float(rest)

    grid = np.linspace(0.05, 1.5, 16)
    start = min(((p, q) for p in grid for q in grid), key=lambda e: linear(np.array(e))[1])
    found = optimize.minimize(
        lambda e: linear(np.clip(e, 0.01, 3.0))[1], start, method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 4000},
    )  # fmt: skip
    alpha, beta = np.clip(found.x, 0.01, 3.0)
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
    """Draws the fitted points, the curve, predictions with intervals, and later measurements."""
    figure, panel = plt.subplots(figsize=(5.4, 3.6))
    highest = max([*x, *(p["x"] for p in predicted)])
    xs = np.geomspace(min(x), highest, 100)
    panel.plot(xs, law(xs), color=GUIDE, label=f"{law.a:.3g} x^{law.b:.3f} + {law.c:.3f}")
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
    panel.set(xlabel="parameters or FLOPs", ylabel="loss")
    panel.legend(fontsize=8, frameon=False)
    clean(panel)
    save(figure, path)
