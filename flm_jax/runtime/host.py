"""Settings of the host process, made before JAX starts: memory and compilation."""

from __future__ import annotations

import ctypes
import os
import sys

import jax

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_freed() -> None:
    """Keeps freed arrays in the process, with glibc. Call it before JAX does anything.

    This helps when JAX computes on the CPU.
    By default glibc gives every large array back to the kernel, and the next step faults it in
    again page by page, which costs more than most elementwise operations on it.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 1 << 28)
        libc.mallopt(_M_ARENA_MAX, 1)


def compile_quickly() -> None:
    """Makes XLA compile faster on a CPU, to slower programs. For short runs and tiny models.

    Turns off LLVM's optimisation and uses XLA's older emitter of fused loops, which compiles in
    half the time of the newer one (jaxlib 0.10).
    """
    flags = ["--xla_backend_optimization_level=0"]
    # XLA ends the process at a flag that it does not know, and this one is there for a transition.
    if jax.__version_info__[:2] == (0, 10):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    # Read when XLA compiles its first program.
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
