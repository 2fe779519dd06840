"""What a process asks of its host before JAX does anything: memory and compilation."""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_freed() -> None:
    """With glibc, freed arrays stay in the process. Call it before JAX does anything.

    For where the host is the accelerator.
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
    """On a CPU: less optimised programs, sooner. For runs of seconds and tiny models."""
    flags = os.environ.get("XLA_FLAGS", "")  # read when XLA compiles its first program
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
