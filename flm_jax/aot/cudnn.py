"""Lets jax trace cuDNN's attention for GPUs that this machine does not have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from jax._src.cudnn import fused_attention_stablehlo as checks

VERSION = (9, 10, 0)  # of cuDNN, on the described GPUs


@contextlib.contextmanager
def described(device: Any) -> Iterator[None]:
    """Answers jax's questions about GPU and cuDNN for a described device.

    jax (0.10) asks the machine that it runs on: for the version of its cuDNN library, and for its
    GPU's compute capability, at least and exactly. Without a GPU it refuses to trace the kernel,
    although it compiles for another machine.

    Args:
      device: as `topologies` describes it; of another platform than "gpu": nothing changes.
    """
    if device.platform != "gpu":
        yield
        return
    capability = _numbers(device.compute_capability)
    major, minor, patch = VERSION
    answers: dict[str, Any] = {
        "check_cudnn_version": lambda: 10_000 * major + 100 * minor + patch,
        "check_compute_capability": lambda least: capability >= _numbers(least),
        "is_cuda_compute_capability_equal": lambda asked: capability == _numbers(asked),
    }
    with mock.patch.multiple(checks, **answers):
        yield


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
