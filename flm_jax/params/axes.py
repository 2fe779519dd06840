"""The axis table: every parameter, its axes, and what it does on each.

A table is a value: path -> `Param`. `table(config)` is the decoder's; a model of your own brings
its own. The table and the sizes of its axes determine each parameter's shape, its initial scale and
learning rate (`mup.py`), its sharding (`sharding.py`), its optimizer state (`train/optim.py`) and
its growth (`growth/`). The decoder creates its parameters from the table, so a parameter cannot
exist without an entry.

Roles. Every activation lives on an axis, and a parameter touches activations in four ways:
  OUT   it writes them: the axis is an output of the linear map (`up` writes `mlp`)
  IN    it reads them: the axis is summed over (`down` reads `mlp`)
  GAIN  it acts on them one by one (a norm's gain or bias)
  STACK one slice per layer; no activation on this axis
A slot of an axis is one index of it, in every parameter that has the axis.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Mapping
from typing import Any

from flm_jax.config import TransformerConfig
from flm_jax.errors import UserError
from flm_jax.mapping import added
from flm_jax.params import trees


class Role(enum.StrEnum):
    """What a parameter does on one of its axes (see the head of this module)."""

    IN = "in"
    OUT = "out"
    GAIN = "gain"
    STACK = "stack"


# Axes whose size grows with the model's width. `head_dim` is fixed (RoPE); `vocab` and `layers` are
# not widths.
WIDTHS = frozenset({"embed", "mlp", "kv_heads", "q_per_kv"})

# The slots of a parameter with both axes are query heads. An operator can divide the queries of a
# key/value head among its copies (`repeat`), which changes neither their number nor their order.
QUERY_HEADS = ("kv_heads", "q_per_kv")


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter: its axes in order, and its role on each.

    Attributes:
      axes: names of its dimensions.
      roles: what it does on each of them.
      multiplier: factor that the decoder applies to its output: "", "input", "output", "tied" or
        "residual" (`mup.py`).
      carries: axes whose copy weights this parameter carries, because their reader cannot. Example:
        a tied embedding both writes and reads `embed`, in one leaf. The last norm's gain and bias,
        which only the tied head reads, then carry the weights of the copies.
      ends_branch: whether a layer's branch ends with it, so that the branch is off while it is
        zero. None: if it writes `embed`. A norm after the branch ends it in place of the last map.

    Raises:
      UserError: axes and roles do not match.
    """

    axes: tuple[str, ...]
    roles: tuple[Role, ...]
    multiplier: str = ""
    carries: tuple[str, ...] = ()
    ends_branch: bool | None = added(None)

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.roles) or not set(self.carries) <= set(self.axes):
            raise UserError(
                f"Param has axes {self.axes}, roles {self.roles} and carries {self.carries}; give "
                "one role for each axis, and carry axes that it has"
            )

    @classmethod
    def of(
        cls,
        spec: str,
        multiplier: str = "",
        carries: tuple[str, ...] = (),
        ends_branch: bool | None = None,
    ) -> Param:
        """Reads a parameter from text: "axis:role axis:role".

        >>> Param.of("layers:stack embed:in mlp:out").axes
        ('layers', 'embed', 'mlp')
        """
        pairs = [item.split(":") for item in spec.split()]
        axes, roles = tuple(a for a, _ in pairs), tuple(Role(r) for _, r in pairs)
        return cls(axes, roles, multiplier, carries, ends_branch)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape, for these sizes of all axes."""
        return tuple(sizes[axis] for axis in self.axes)

    def has(self, role: Role, axis: str) -> bool:
        """Whether it has this role on this axis."""
        return (axis, role) in zip(self.axes, self.roles, strict=True)

    def reads(self) -> frozenset[str]:
        """The axes that it reads."""
        return frozenset(a for a, r in zip(self.axes, self.roles, strict=True) if r is Role.IN)

    def writes(self) -> frozenset[str]:
        """The axes that it writes."""
        return frozenset(a for a, r in zip(self.axes, self.roles, strict=True) if r is Role.OUT)

    @property
    def slots(self) -> dict[str, tuple[int, ...]]:
        """Its kinds of slots: name -> dimensions. One for each axis, except "query_heads", for two.

        >>> Param.of("embed:in kv_heads:out q_per_kv:out head_dim:out").slots
        {'embed': (0,), 'query_heads': (1, 2), 'head_dim': (3,)}
        """
        kinds: dict[str, tuple[int, ...]] = {}
        for dim, axis in enumerate(self.axes):
            if self.axes[dim : dim + 2] == QUERY_HEADS:
                kinds["query_heads"] = (dim, dim + 1)
            elif self.axes[max(dim - 1, 0) : dim + 1] != QUERY_HEADS:
                kinds[axis] = (dim,)
        return kinds

    @property
    def stacked(self) -> bool:
        """Whether its first axis stacks layers."""
        return bool(self.roles) and self.roles[0] is Role.STACK

    @property
    def kind(self) -> str:
        """Which of its sides grow with the width (Tensor Programs V, arXiv 2203.03466, table 3).

        "matrix": inputs and outputs; "readout": only inputs; "vector": only outputs, or a gain.

        >>> Param.of("embed:in mlp:out").kind, Param.of("embed:in vocab:out").kind
        ('matrix', 'readout')
        """
        if not self.reads() & WIDTHS:
            return "vector"
        return "matrix" if self.writes() & WIDTHS else "readout"

    @property
    def matrix_like(self) -> bool:
        """Whether both its inputs and its outputs grow with the width."""
        return self.kind == "matrix"

    @property
    def bias(self) -> bool:
        """Whether it is added to activations: it only writes."""
        return bool(self.writes()) and not self.reads() and Role.GAIN not in self.roles

    @property
    def residual_writer(self) -> bool:
        """Whether a layer's branch ends with it (`ends_branch`): its zeros turn the branch off."""
        if self.ends_branch is None:
            return self.has(Role.STACK, "layers") and self.has(Role.OUT, "embed")
        return self.ends_branch


Table = Mapping[str, Param]  # path ("layers/mlp/up") -> parameter


def normed_axes(table: Table) -> frozenset[str]:
    """The axes over which some norm takes its mean: those on which a parameter is a gain."""
    return frozenset(
        axis
        for param in table.values()
        for axis, role in zip(param.axes, param.roles, strict=True)
        if role is Role.GAIN
    )


@dataclasses.dataclass(frozen=True)
class Scale:
    """The numbers of one parameter that depend on the model's size.

    Attributes:
      std: standard deviation of its initial entries.
      start: mean of its initial entries: 1 for a gain, else 0.
      rate: factor on the learning rate.
      decay: factor on the weight decay.
      multiplier: factor that the model applies to the parameter's output.
      eps: factor on Adam's eps.
    """

    std: float = 0.02
    start: float = 0.0
    rate: float = 1.0
    decay: float = 1.0
    multiplier: float = 1.0
    eps: float = added(1.0)


GAIN_SCALE = Scale(std=0.0, start=1.0, decay=0.0)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """All that growth needs to know about a model at one size.

    `mup.spec(config)` is the decoder's. For a model of your own, use one table with the sizes
    before and after: `plan(ModelSpec(table, small_sizes), ModelSpec(table, big_sizes), "tile")`.

    Attributes:
      table: its parameters.
      sizes: axis -> size.
      scales: path -> numbers at this size. Parameters that are left out have `Scale()`, or start at
        1 if they have a GAIN role.
      norm_eps: eps of the RMSNorms over `embed`. None: the model has other norms (LayerNorm), whose
        output would change if zero coordinates were added.

    Raises:
      UserError: an axis has no size, or a scale belongs to no parameter.
    """

    table: Table
    sizes: Mapping[str, int]
    scales: Mapping[str, Scale] = dataclasses.field(default_factory=dict)
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        for path, param in self.table.items():
            for axis in param.axes:
                if axis not in self.sizes:
                    raise UserError(
                        f"ModelSpec.sizes has no axis {axis!r}, which parameter {path!r} has; add "
                        "its size"
                    )
        for path in self.scales:
            if path not in self.table:
                raise UserError(
                    f"ModelSpec.scales has parameter {path!r}, which its table does not have; "
                    f"the table has {', '.join(self.table)}"
                )

    def __hash__(self) -> int:
        groups = (self.table, self.sizes, self.scales)
        return hash(
            (*(tuple(sorted(g.items(), key=lambda x: x[0])) for g in groups), self.norm_eps)
        )

    def scale(self, path: str) -> Scale:
        """The numbers of the parameter at `path`."""
        if path in self.scales:
            return self.scales[path]
        return GAIN_SCALE if Role.GAIN in self.table[path].roles else Scale()

    def shape(self, path: str) -> tuple[int, ...]:
        """The shape of the parameter at `path`."""
        return self.table[path].shape(self.sizes)

    @functools.cached_property
    def slots(self) -> dict[str, tuple[str, ...]]:
        """All kinds of slots (`Param.slots`) in sorted order: name -> axes."""
        kinds: dict[str, tuple[str, ...]] = {}
        for param in self.table.values():
            for name, dims in param.slots.items():
                kinds[name] = tuple(param.axes[dim] for dim in dims)
        return dict(sorted(kinds.items()))

    def count(self, kind: str) -> int:
        """Number of slots of a kind."""
        return math.prod(self.sizes[axis] for axis in self.slots[kind])


# Query head g of group k is [k, g], so a new head is always added inside its group.
_QUERY = "kv_heads:{0} q_per_kv:{0} head_dim:{0}"
_KEY = "kv_heads:{0} head_dim:{0}"
_LAYER = "layers:stack "


@functools.lru_cache
def table(config: TransformerConfig) -> dict[str, Param]:
    """The decoder's axis table: path -> parameter, sorted by path. Do not change it."""
    params = {"embedding": Param.of("vocab:in embed:out", multiplier="input")}
    for name, branch in (("attention", _attention(config)), ("mlp", _mlp(config))):
        params |= {f"layers/{name}/{leaf}": param for leaf, param in branch.items()}
    if config.tied:
        # The embedding writes the stream and cannot also be weighted for the head that reads it.
        params["final_norm"] = Param.of("embed:gain", multiplier="tied", carries=("embed",))
    else:
        params["final_norm"] = Param.of("embed:gain")
        params["head"] = Param.of("embed:in vocab:out", multiplier="output")
    return dict(trees.flatten(trees.unflatten(params)))


def _attention(config: TransformerConfig) -> dict[str, Param]:
    """The parameters of a layer's attention branch."""
    outputs = {
        "query": _QUERY.format("out"),
        "key": _KEY.format("out"),
        "value": _KEY.format("out"),
    }
    params = {name: Param.of(f"{_LAYER}embed:in {axes}") for name, axes in outputs.items()}
    if config.qkv_bias:
        params |= {f"{name}_bias": Param.of(_LAYER + axes) for name, axes in outputs.items()}
    if config.qk_norm == "head":
        params |= {f"{name}_norm": Param.of(_LAYER + "head_dim:gain") for name in ("query", "key")}
    if config.qk_norm == "all":
        params["query_norm"] = Param.of(_LAYER + _QUERY.format("gain"))
        params["key_norm"] = Param.of(_LAYER + _KEY.format("gain"))
    return params | _branch_end(config, "out", _QUERY.format("in"), config.out_bias)


def _mlp(config: TransformerConfig) -> dict[str, Param]:
    """The parameters of a layer's MLP branch."""
    params = {name: Param.of(_LAYER + "embed:in mlp:out") for name in ("gate", "up")}
    if config.mlp_bias:
        params |= {f"{name}_bias": Param.of(_LAYER + "mlp:out") for name in ("gate", "up")}
    return params | _branch_end(config, "down", "mlp:in", config.mlp_bias)


def _branch_end(config: TransformerConfig, name: str, inputs: str, bias: bool) -> dict[str, Param]:
    """A branch's norms and its last map, with its bias; the norm after it, if any, ends it."""
    params = {}
    if config.norms != "after":
        params["norm"] = Param.of(_LAYER + "embed:gain")
    ends: dict[str, Any] = {"multiplier": "residual"}
    if config.norms != "before":
        params["after_norm"] = Param.of(_LAYER + "embed:gain", ends_branch=True, **ends)
        ends = {"ends_branch": False}
    params[name] = Param.of(f"{_LAYER}{inputs} embed:out", **ends)
    if bias:
        params[f"{name}_bias"] = Param.of(_LAYER + "embed:out", **ends)
    return params


def nested_table(config: TransformerConfig) -> dict[str, Any]:
    """The decoder's table as nested dicts, shaped like its parameters."""
    return trees.unflatten(table(config))


def axis_sizes(config: TransformerConfig) -> dict[str, int]:
    """The size of each of the decoder's axes. Raises UserError if the vocabulary's is not given."""
    if not config.vocab_size:
        raise UserError(
            "TransformerConfig.vocab_size is 0, which only a chain fills in from its vocabulary; "
            "give the number of tokens"
        )
    return {
        "vocab": config.vocab_size,
        "embed": config.d_model,
        "mlp": config.d_ff,
        "kv_heads": config.kv_heads,
        "q_per_kv": config.queries_per_kv,
        "head_dim": config.head_dim,
        "layers": config.num_layers,
    }


def param_sizes(config: TransformerConfig) -> dict[str, int]:
    """Number of entries of each of the decoder's parameters."""
    sizes = axis_sizes(config)
    return {path: math.prod(param.shape(sizes)) for path, param in table(config).items()}
