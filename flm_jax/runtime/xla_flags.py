"""XLA's flags for accelerators: collectives that overlap with computation.

One table has them for each platform. They are set in the environment before JAX starts, since XLA
reads them once; a flag that the user has set stays as it is. The CPU has none.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, MutableMapping
from typing import Any

import jax

# Platform -> (variable that its compiler reads, flags). XLA ends the process at a flag that it does
# not know: all of these are known to jaxlib and libtpu of the versions below (a test starts both).
FLAGS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "tpu": (
        "LIBTPU_INIT_ARGS",
        (
            "--xla_tpu_enable_latency_hiding_scheduler=true",
            "--xla_enable_async_all_gather=true",
            "--xla_enable_async_collective_permute=true",
            "--xla_tpu_enable_async_collective_fusion=true",
            "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
            "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
            "--xla_tpu_overlap_compute_collective_tc=true",
        ),
    ),
    "cuda": (
        "XLA_FLAGS",
        (
            "--xla_gpu_enable_latency_hiding_scheduler=true",
            "--xla_gpu_enable_pipelined_all_gather=true",
            "--xla_gpu_enable_pipelined_reduce_scatter=true",
            "--xla_gpu_enable_pipelined_all_reduce=true",
        ),
    ),
}
_KNOWN_TO = (0, 10)  # version of jax


@dataclasses.dataclass(frozen=True)
class Applied:
    """What was done with a platform's flags, as a run's lineage records it.

    Attributes:
      platform: "tpu" or "cuda".
      set: flags that were set.
      user: flags of the same names that the user had set, which stay.
      problem: why none were set; "": they were.
    """

    platform: str
    set: tuple[str, ...] = ()
    user: tuple[str, ...] = ()
    problem: str = ""


def merge(platform: str, environment: MutableMapping[str, str]) -> Applied:
    """Adds a platform's flags to an environment; a flag that it has already keeps its value.

    Args:
      platform: "tpu" or "cuda".
      environment: variables, changed in place.
    """
    variable, flags = FLAGS[platform]
    given = environment.get(variable, "").split()
    named = {flag.split("=")[0]: flag for flag in given}
    user = tuple(named[f.split("=")[0]] for f in flags if f.split("=")[0] in named)
    added = tuple(f for f in flags if f.split("=")[0] not in named)
    environment[variable] = " ".join([*given, *added])
    return Applied(platform, added, user)


def platforms(environment: Mapping[str, str]) -> list[str]:
    """The platforms of the table that JAX may start: those of JAX_PLATFORMS, or all if unset."""
    named = environment.get("JAX_PLATFORMS", "").replace("gpu", "cuda").split(",")
    return [name for name in FLAGS if named == [""] or name in named]


@functools.cache
def apply() -> tuple[Applied, ...]:
    """Sets the flags of the platforms that JAX may start; later calls return the first's result.

    Call it before JAX does anything: a process whose devices have started keeps its flags, and the
    result says so.
    """
    from jax._src import xla_bridge  # the only place that knows

    problem = ""
    if xla_bridge.backends_are_initialized():
        problem = "JAX had started already"
    elif jax.__version_info__[:2] != _KNOWN_TO:
        problem = f"jax {jax.__version__} may not know them"
    names = platforms(os.environ)
    if problem:
        return tuple(Applied(name, problem=problem) for name in names)
    return tuple(merge(name, os.environ) for name in names)


def record() -> list[dict[str, Any]]:
    """What `apply` did, as JSON values."""
    return [dataclasses.asdict(applied) for applied in apply()]
