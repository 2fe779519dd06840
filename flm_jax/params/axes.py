"""The axis table: every parameter, its axes, and what it does on each.

This one table gives each parameter its shape, its initial scale and learning rate (`mup.py`), its
place on the mesh (`sharding.py`) and its growth (`growth/`). The model creates its parameters
from it, so a parameter cannot exist without an entry.

Roles. Every activation lives on an axis, and a parameter touches activations in four ways:
  OUT   it writes them: the axis is an output of the linear map (`up` writes `mlp`)
  IN    it reads them: the axis is summed over (`down` reads `mlp`)
  GAIN  it multiplies them one by one (a norm's gain)
  STACK one slice per layer; no activation on this axis
A slot of an axis is one index of it, in every parameter that has the axis.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any

from flm_jax.config import TransformerConfig
from flm_jax.params.trees import flatten


class Role(enum.Enum):
    IN = "in"
    OUT = "out"
    GAIN = "gain"
    STACK = "stack"


# Axes whose size grows with the model's width. `head_dim` stays (RoPE), `vocab` and `layers` are
# not widths.
WIDTHS = frozenset({"embed", "mlp", "kv_heads", "q_per_kv"})


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter: its axes in order, its role on each, and the multiplier it is used with."""

    axes: tuple[str, ...]
    roles: tuple[Role, ...]
    multiplier: str = ""  # "input" or "output": see `multiplier_of`

    def shape(self, config: TransformerConfig) -> tuple[int, ...]:
        sizes = axis_sizes(config)
        return tuple(sizes[axis] for axis in self.axes)

    def has(self, role: Role, axis: str) -> bool:
        return (axis, role) in zip(self.axes, self.roles, strict=True)

    def reads(self) -> frozenset[str]:
        return frozenset(a for a, r in zip(self.axes, self.roles, strict=True) if r is Role.IN)

    def writes(self) -> frozenset[str]:
        return frozenset(a for a, r in zip(self.axes, self.roles, strict=True) if r is Role.OUT)

    @property
    def kind(self) -> str:
        """What grows with the width (Tensor Programs V, arXiv 2203.03466, table 3).

        "matrix": inputs and outputs; "readout": only inputs; "vector": only outputs, or a gain.
        """
        if not self.reads() & WIDTHS:
            return "vector"
        return "matrix" if self.writes() & WIDTHS else "readout"

    @property
    def matrix_like(self) -> bool:
        return self.kind == "matrix"

    @property
    def residual_writer(self) -> bool:
        """It ends a layer's branch: attention's output or the MLP's down projection."""
        return self.has(Role.STACK, "layers") and self.has(Role.OUT, "embed")


def _param(spec: str, multiplier: str = "") -> Param:
    """`_param("layers:stack embed:in mlp:out")`."""
    pairs = [item.split(":") for item in spec.split()]
    return Param(tuple(a for a, _ in pairs), tuple(Role(r) for _, r in pairs), multiplier)


PARAMS: dict[str, Any] = {
    "embedding": _param("vocab:in embed:out", multiplier="input"),
    "layers": {
        "attention": {
            "norm": _param("layers:stack embed:gain"),
            # Query head g of group k is [k, g]: heads append inside their group by construction.
            "query": _param("layers:stack embed:in kv_heads:out q_per_kv:out head_dim:out"),
            "key": _param("layers:stack embed:in kv_heads:out head_dim:out"),
            "value": _param("layers:stack embed:in kv_heads:out head_dim:out"),
            "out": _param("layers:stack kv_heads:in q_per_kv:in head_dim:in embed:out"),
        },
        "mlp": {
            "norm": _param("layers:stack embed:gain"),
            "gate": _param("layers:stack embed:in mlp:out"),
            "up": _param("layers:stack embed:in mlp:out"),
            "down": _param("layers:stack mlp:in embed:out"),
        },
    },
    "final_norm": _param("embed:gain"),
    "head": _param("embed:in vocab:out", multiplier="output"),
}


def axis_sizes(config: TransformerConfig) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "embed": config.d_model,
        "mlp": config.d_ff,
        "kv_heads": config.kv_heads,
        "q_per_kv": config.queries_per_kv,
        "head_dim": config.head_dim,
        "layers": config.num_layers,
    }


def multiplier_of(param: Param, config: TransformerConfig) -> float:
    """The scalar that the model multiplies this parameter's output by."""
    return {"": 1.0, "input": config.input_mult, "output": config.logit_mult}[param.multiplier]


TABLE: dict[str, Param] = dict(flatten(PARAMS))


def param_sizes(config: TransformerConfig) -> dict[str, int]:
    """Number of entries of each parameter."""
    return {path: math.prod(param.shape(config)) for path, param in TABLE.items()}
