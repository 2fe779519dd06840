"""The dtype of master weights and of every statistic (softmax, norms, loss, bias correction)."""

from __future__ import annotations

from typing import Any

import numpy as np


def wide(dtype: Any) -> np.dtype:
    """float32; float64 where float64 is computed in, which is for exactness checks."""
    return np.dtype("float64" if dtype == "float64" else "float32")
