"""Published figures of accelerators, and the shares of them that real programs reach.

The peak figures come from the makers. The shares are what a forecast multiplies them with. Each one
has its source here: a published measurement, one published run that it was fitted to
(`published.py` shows the error on that run and on those that it was not fitted to), or another chip
that it was taken from.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping

# FlashAttention-3 (arXiv 2407.08608, figures 5 and 6): cuDNN on H100, 8,192 tokens, head size 128,
# 600e12 FLOPs/s forward and 518e12 backward of 989e12. The TPU kernels' share is taken from it.
ATTENTION = 0.54
# "How To Scale Your Model" (jax-ml.github.io/scaling-book, chapters 2 and 12): about 90 of v5p's
# 100 GB/s per link, and 370 of H100's 450 GB/s over NVLink. For network cards the share of NVLink
# is assumed, and for other TPUs that of v5p.
TORUS_LINKS, GPU_LINKS = 0.9, 0.82
# The same book (chapter 12, question 7): 3.84 ms needed 4.1 ms when large vectors are added.
HBM = 0.93


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one device. Rates are per second, and those of links in one direction.

    Attributes:
      flops: dense bfloat16 FLOPs.
      hbm_bytes: size of the memory, in bytes.
      hbm_bandwidth: bytes.
      network: bytes that the device sends to other nodes or slices.
      source: where the figures were published.
      matrix: the share of `flops` that large matrix products reach.
      matrix_source: where this share comes from.
      link: bytes over one link of the torus; 0: there is no torus.
      torus: number of the torus's axes; each device has two links on each.
      cores: devices on one place of the torus.
      wraps: a torus axis is a ring if its size is a multiple of this; otherwise it is a line.
      node: devices in one node; 1: the devices of a slice communicate over the torus.
      inside: bytes that the device sends inside its node.
    """

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    network: float
    source: str
    matrix: float
    matrix_source: str
    link: float = 0.0
    torus: int = 0
    cores: int = 1
    wraps: int = 1
    node: int = 1
    inside: float = 0.0

    @property
    def links(self) -> float:
        """The share of their rate that links reach."""
        return GPU_LINKS if self.node > 1 else TORUS_LINKS


_V5P = "fitted to MaxText's 32B on 64 v5p and Llama 2 70B on 256"
_V6E = "fitted to MaxText's Llama 3.1 8B and 70B on 256 v6e"
# A benchmark of products alone reaches 0.80 of the peak (794.5e12, "maximum achievable matmul
# FLOPS" of github.com/stas00/ml-engineering).
_HOPPER = "fitted to Megatron Bridge's Llama 3 8B on 8 H100, in float8 (14,451 tokens/s)"
_H100 = "NVIDIA H100 SXM data sheet; NVLink inside 8 GPUs, one 400 Gb/s card for each beyond"
_H200 = "NVIDIA H200 SXM data sheet; NVLink inside 8 GPUs, one 400 Gb/s card for each beyond"
_TPU = "cloud.google.com/tpu/docs/"

CHIPS: Mapping[str, Chip] = types.MappingProxyType(
    {
        "v4": Chip(
            275e12, 32 * 2**30, 1228e9, 6.25e9, _TPU + "v4", 0.85, "taken from v5p",
            link=50e9, torus=3, wraps=4,
        ),
        "v5e": Chip(
            197e12, 16 * 2**30, 819e9, 3.125e9, _TPU + "v5e", 0.85, "taken from v5p",
            link=50e9, torus=2, wraps=16,
        ),
        "v5p": Chip(
            459e12, 95 * 2**30, 2765e9, 6.25e9, _TPU + "v5p", 0.85, _V5P,
            link=100e9, torus=3, wraps=4,
        ),
        "v6e": Chip(
            918e12, 32 * 2**30, 1640e9, 12.5e9, _TPU + "v6e", 0.6, _V6E,
            link=100e9, torus=2, wraps=16,
        ),
        # A chip is two devices in JAX; these are the figures of one: half of the chip's.
        "tpu7x": Chip(
            1153.5e12, 96 * 2**30, 3690e9, 6.25e9, "docs.cloud.google.com/tpu/docs/tpu7x", 0.6,
            "taken from v6e", link=50e9, torus=3, wraps=4, cores=2,
        ),
        "h100": Chip(
            989e12, 80e9, 3350e9, 50e9, _H100, 0.69, _HOPPER, node=8, inside=450e9,
        ),
        "h200": Chip(
            989e12, 141e9, 4800e9, 50e9, _H200, 0.69, _HOPPER, node=8, inside=450e9,
        ),
    }
)  # fmt: skip
