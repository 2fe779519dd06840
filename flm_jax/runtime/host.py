"""Settings of the host process, made before JAX starts: memory and compilation."""

from __future__ import annotations

import ctypes
import os
import sys

import jax

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8
# Kept memory is used again in pieces of other sizes. While a model of 156M parameters trained (a
# state of 1.9 GB), the process grew to 20 GB and beyond; without keeping, it stayed at 7.8 GB.
_KEPT_OF_STATE = 16


def prefer_cpu() -> None:
    """Makes JAX compute on the CPU, unless the user has set JAX_PLATFORMS.

    For commands that only describe accelerators: JAX would look for real ones first, and its CUDA
    plugin fails on a machine without a driver. JAX reads the variable when it is imported, so that
    setting the variable here would come too late.
    """
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")


def keep_freed() -> None:
    """Keeps freed arrays in the process, with glibc. Call it before JAX does anything.

    This helps when JAX computes on the CPU.
    By default glibc gives every large array back to the kernel, and the next step faults it in
    again page by page, which costs more than most elementwise operations on it.
    """
    _mallopt({
        _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 1 << 28, _M_ARENA_MAX: 1,
    })  # fmt: skip


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def return_freed(state_bytes: int) -> None:
    """Undoes `keep_freed` if a train state is so large that kept memory may exhaust the machine's.

    Args:
      state_bytes: of the parameters and the optimizer's state.
    """
    if _KEPT_OF_STATE * state_bytes > memory_bytes():
        # What glibc's thresholds come to by themselves, until one of them is set.
        _mallopt({
            _M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20,
            _M_TOP_PAD: 128 << 10,
        })  # fmt: skip


def _mallopt(values: dict[int, int]) -> None:
    """Sets parameters of glibc's allocator; without glibc does nothing."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        for name, value in values.items():
            libc.mallopt(name, value)


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
