"""The goodput that a run can expect: the share of its time that trains, despite failures.

Failures come at random with a mean time M between them (a Poisson process), work is saved every τ
seconds of training, a save stops training for δ, and a restart takes R. Then a segment of L = τ + δ
seconds succeeds only if no failure interrupts it. With k expected failures before it succeeds:

  k = exp(L / M) - 1,  each costs M on average (all time between two failures is M)
  a restart can fail too; it takes M (exp(R / M) - 1) in the mean
  E[T] = k (M + M (exp(R / M) - 1)) = M exp(R / M) (exp((τ + δ) / M) - 1)

and the goodput is τ / E[T] (Daly, "A higher order estimate of the optimum checkpoint interval for
restart dumps", 2006, equation 13). The best τ solves exp(-(τ + δ) / M) = 1 - τ / M, so
τ = M (1 + W(-exp(-1 - δ / M))) with Lambert's W; for small δ / M it is Young's sqrt(2 δ M) (1974).
"""

from __future__ import annotations

import math

from scipy.special import lambertw

# Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 H100 (arXiv 2407.21783, 3.3.4).
LLAMA3_DEVICE_HOURS = 54 * 24 * 16_384 / 419


def between_failures(devices: int, device_hours: float = LLAMA3_DEVICE_HOURS) -> float:
    """Returns the mean seconds between failures of a job.

    Args:
      devices: of the job; one failure of any of them stops it.
      device_hours: mean hours between failures of one device, its share of the host included.
    """
    return 3600 * device_hours / devices


def expected(interval: float, save: float, failure: float, restart: float) -> float:
    """Returns the expected goodput, in (0, 1).

    Args:
      interval: seconds of training between two saves.
      save: seconds for which a save stops training (0 if it is written in the background).
      failure: mean seconds between failures.
      restart: seconds from a failure until training goes on, and the time to write a checkpoint
        in the background: a failure in it goes back to the checkpoint before.

    >>> round(expected(interval=1200, save=30, failure=36000, restart=900), 4)
    0.9354
    """
    segment = failure * math.exp(restart / failure) * math.expm1((interval + save) / failure)
    return interval / segment


def best_interval(save: float, failure: float) -> float:
    """Returns the seconds of training between two saves at which the goodput is largest.

    Args:
      save: seconds for which a save stops training; above 0.
      failure: mean seconds between failures.
    """
    return failure * (1 + float(lambertw(-math.exp(-1 - save / failure)).real))
