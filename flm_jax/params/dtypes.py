"""The dtype of master weights and of every statistic (softmax, norms, loss, bias correction)."""

from __future__ import annotations

from typing import Any

import numpy as np


def wide(dtype: Any) -> np.dtype[Any]:
    """float64 for a compute dtype of float64 (used in exactness checks), else float32.

    >>> wide("bfloat16")
    dtype('float32')
    """
    return np.dtype("float64" if dtype == "float64" else "float32")
