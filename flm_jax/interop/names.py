"""The name map between parameters of the axis table and tensors of Llama's state dict.

Hugging Face's linear layers have the shape [outputs, inputs], one tensor per layer, with merged
heads. Tele-FLM and Granite use Llama's names. Shapes come from the axis table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np

from flm_jax.params.axes import Param, Table

Index = tuple[slice, ...]  # a block of a parameter: one slice per axis, with a step of 1


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter's Hugging Face name and layout.

    Attributes:
      name: contains {layer} if there is one tensor per layer.
      layout: for each dimension, the axes merged into it, slowest first.
    """

    name: str
    layout: tuple[tuple[str, ...], ...]

    @property
    def rows(self) -> str:
        """The axis along which the tensor is cut: consecutive rows are contiguous in the file."""
        return self.layout[0][0]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(math.prod(sizes[axis] for axis in merged) for merged in self.layout)

    def row_size(self, sizes: Mapping[str, int]) -> int:
        """Number of rows of the tensor for one slot of the axis `rows`."""
        return math.prod(sizes[axis] for axis in self.layout[0][1:])


def _tensor(name: str, layout: str) -> Tensor:
    """Parses a layout: a space separates dimensions, a dot the axes merged into one."""
    return Tensor(name, tuple(tuple(merged.split(".")) for merged in layout.split()))


_LAYER = "model.layers.{layer}."

# In file order. The query heads of one key/value head are next to each other.
TENSORS: dict[str, Tensor] = {
    "embedding": _tensor("model.embed_tokens.weight", "vocab embed"),
    "layers/attention/norm": _tensor(_LAYER + "input_layernorm.weight", "embed"),
    "layers/attention/query": _tensor(
        _LAYER + "self_attn.q_proj.weight", "kv_heads.q_per_kv.head_dim embed"
    ),
    "layers/attention/key": _tensor(_LAYER + "self_attn.k_proj.weight", "kv_heads.head_dim embed"),
    "layers/attention/value": _tensor(
        _LAYER + "self_attn.v_proj.weight", "kv_heads.head_dim embed"
    ),
    "layers/attention/out": _tensor(
        _LAYER + "self_attn.o_proj.weight", "embed kv_heads.q_per_kv.head_dim"
    ),
    "layers/mlp/norm": _tensor(_LAYER + "post_attention_layernorm.weight", "embed"),
    "layers/mlp/gate": _tensor(_LAYER + "mlp.gate_proj.weight", "mlp embed"),
    "layers/mlp/up": _tensor(_LAYER + "mlp.up_proj.weight", "mlp embed"),
    "layers/mlp/down": _tensor(_LAYER + "mlp.down_proj.weight", "embed mlp"),
    "final_norm": _tensor("model.norm.weight", "embed"),
    "head": _tensor("lm_head.weight", "vocab embed"),
}


def own_axes(param: Param) -> tuple[str, ...]:
    """The parameter's axes without `layers`."""
    return param.axes[param.stacked :]


def shapes(table: Table, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of a model by name, in file order."""
    shape_of = {}
    for path, layer in _in_file_order(table, sizes):
        tensor = TENSORS[path]
        shape_of[tensor.name.format(layer=layer)] = tensor.shape(sizes)
    return shape_of


def blocks(table: Table, sizes: Mapping[str, int], most_bytes: int) -> Iterator[tuple[str, Index]]:
    """Cuts all parameters into blocks of at most `most_bytes` of float32, in file order.

    A block lies in one layer and is cut only along the axis `Tensor.rows`. A block of one slot on
    that axis may be larger than `most_bytes`.
    """
    for path, layer in _in_file_order(table, sizes):
        names, rows = own_axes(table[path]), TENSORS[path].rows
        row_bytes = 4 * math.prod(sizes[axis] for axis in names) // sizes[rows]
        step = max(1, most_bytes // row_bytes)
        lead = (slice(layer, layer + 1),) if table[path].stacked else ()
        for start in range(0, sizes[rows], step):
            stop = min(start + step, sizes[rows])
            own = (slice(start, stop) if axis == rows else slice(0, sizes[axis]) for axis in names)
            yield path, (*lead, *own)


def _in_file_order(table: Table, sizes: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Yields (path, layer) in file order, layer by layer; layer is 0 if there is no layer axis."""
    paths = list(TENSORS)
    layered = [path for path in paths if table[path].stacked]
    first = paths.index(layered[0])
    yield from ((path, 0) for path in paths[:first])
    yield from ((path, layer) for layer in range(sizes["layers"]) for path in layered)
    yield from ((path, 0) for path in paths[first + len(layered) :])


def to_rows(x: np.ndarray, param: Param, tensor: Tensor) -> np.ndarray:
    """Turns a block of one layer, in the table's axes, into rows of the tensor.

    The result is a view where numpy can make one.
    """
    names = own_axes(param)
    layout = tensor.layout
    x = x.transpose([names.index(axis) for merged in layout for axis in merged])
    sizes = dict(zip((axis for merged in layout for axis in merged), x.shape, strict=True))
    return x.reshape([math.prod(sizes[axis] for axis in merged) for merged in layout])


def from_rows(
    rows: np.ndarray, param: Param, tensor: Tensor, sizes: Mapping[str, int]
) -> np.ndarray:
    """Inverts `to_rows`; `sizes` are the axis sizes of the block."""
    order = [axis for merged in tensor.layout for axis in merged]
    x = rows.reshape([sizes[axis] for axis in order])
    return x.transpose([order.index(axis) for axis in own_axes(param)])
