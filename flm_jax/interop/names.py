"""The name map between parameters of the axis table and tensors of Hugging Face's state dicts.

Hugging Face's linear layers have the shape [outputs, inputs], one tensor per layer, with merged
heads. All families use Llama's names. Shapes come from the axis table.
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


_LAYER = "model.layers.{layer}."
_ATTENTION, _MLP = _LAYER + "self_attn.", _LAYER + "mlp."

# In file order. Names of tensors; a weight's bias has "bias" in place of "weight".
_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "layers/attention/norm": _LAYER + "input_layernorm.weight",
    "layers/attention/query": _ATTENTION + "q_proj.weight",
    "layers/attention/query_bias": _ATTENTION + "q_proj.bias",
    "layers/attention/key": _ATTENTION + "k_proj.weight",
    "layers/attention/key_bias": _ATTENTION + "k_proj.bias",
    "layers/attention/value": _ATTENTION + "v_proj.weight",
    "layers/attention/value_bias": _ATTENTION + "v_proj.bias",
    "layers/attention/out": _ATTENTION + "o_proj.weight",
    "layers/attention/out_bias": _ATTENTION + "o_proj.bias",
    "layers/attention/query_norm": _ATTENTION + "q_norm.weight",
    "layers/attention/key_norm": _ATTENTION + "k_norm.weight",
    "layers/attention/after_norm": _LAYER + "post_attention_layernorm.weight",
    "layers/mlp/norm": _LAYER + "post_attention_layernorm.weight",
    "layers/mlp/gate": _MLP + "gate_proj.weight",
    "layers/mlp/gate_bias": _MLP + "gate_proj.bias",
    "layers/mlp/up": _MLP + "up_proj.weight",
    "layers/mlp/up_bias": _MLP + "up_proj.bias",
    "layers/mlp/down": _MLP + "down_proj.weight",
    "layers/mlp/down_bias": _MLP + "down_proj.bias",
    "layers/mlp/after_norm": _LAYER + "post_feedforward_layernorm.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
# With a norm after attention too, the one before the MLP has this name.
_BEFORE_MLP = _LAYER + "pre_feedforward_layernorm.weight"

# The axes merged into each dimension of a matrix. The query heads of one key/value head are next
# to each other.
_MATRICES: dict[str, str] = {
    "embedding": "vocab embed",
    "layers/attention/query": "kv_heads.q_per_kv.head_dim embed",
    "layers/attention/key": "kv_heads.head_dim embed",
    "layers/attention/value": "kv_heads.head_dim embed",
    "layers/attention/out": "embed kv_heads.q_per_kv.head_dim",
    "layers/mlp/gate": "mlp embed",
    "layers/mlp/up": "mlp embed",
    "layers/mlp/down": "embed mlp",
    "head": "vocab embed",
}


def tensors(table: Table) -> dict[str, Tensor]:
    """The tensor of each parameter of a table, in file order."""
    names = dict(_NAMES)
    if "layers/attention/after_norm" in table:
        names["layers/mlp/norm"] = _BEFORE_MLP
    found = {}
    for path, name in names.items():
        if path in table:
            layout = _MATRICES.get(path, ".".join(own_axes(table[path])))
            found[path] = Tensor(name, tuple(tuple(m.split(".")) for m in layout.split()))
    return found


def own_axes(param: Param) -> tuple[str, ...]:
    """The parameter's axes without `layers`."""
    return param.axes[param.stacked :]


def shapes(table: Table, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of a model by name, in file order."""
    of = tensors(table)
    return {
        of[path].name.format(layer=layer): of[path].shape(sizes)
        for path, layer in _in_file_order(table, sizes)
    }


def blocks(table: Table, sizes: Mapping[str, int], most_bytes: int) -> Iterator[tuple[str, Index]]:
    """Cuts all parameters into blocks of at most `most_bytes` of float32, in file order.

    A block lies in one layer and is cut only along the axis `Tensor.rows`. A block of one slot on
    that axis may be larger than `most_bytes`.
    """
    of = tensors(table)
    for path, layer in _in_file_order(table, sizes):
        names, rows = own_axes(table[path]), of[path].rows
        row_bytes = 4 * math.prod(sizes[axis] for axis in names) // sizes[rows]
        step = max(1, most_bytes // row_bytes)
        lead = (slice(layer, layer + 1),) if table[path].stacked else ()
        for start in range(0, sizes[rows], step):
            stop = min(start + step, sizes[rows])
            own = (slice(start, stop) if axis == rows else slice(0, sizes[axis]) for axis in names)
            yield path, (*lead, *own)


def _in_file_order(table: Table, sizes: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Yields (path, layer) in file order, layer by layer; layer is 0 if there is no layer axis."""
    paths = list(tensors(table))
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
