"""What one training step costs each device: FLOPs, memory traffic and collectives, without XLA.

Derived here from the axis table, the sharding rules and the decoder's constraints
(`models/transformer.py`): batch over data and fsdp, the residual stream's tokens over tensor, a
weight's `embed` axis over fsdp. `tests/test_forecast.py` compares the bytes of each mesh axis with
those of compiled programs.

Letters: n tokens of one microbatch on the devices of one tensor group, D embed, F mlp, V vocab,
L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flm_jax.aot.hlo import Move
from flm_jax.config import MESH_AXES, RulesConfig, TransformerConfig
from flm_jax.execution import layer_groups
from flm_jax.params import axes, counts, sharding

STATE_BYTES = counts.MASTER_BYTES + counts.MOMENTS_BYTES
# Maps whose forward pass rematerialisation does not run again: nothing in its layer reads `down`,
# and what the next layer reads is saved.
_LAST = "layers/mlp/down"
# Maps that a policy's named activations keep the results of (`execution.py`).
_KEPT = {
    "qkv": [f"layers/attention/{name}" for name in ("query", "key", "value")],
    "attended": ["attention"],
    "gate_up": ["layers/mlp/gate", "layers/mlp/up"],
    "branches": ["layers/attention/out"],
}
_WIDTHS = {"bfloat16": 2, "float32": 4, "float64": 8}


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer step of a model on a mesh.

    Attributes:
      model: the model; its `remat` and `dtype` count.
      batch: sequences in the step.
      length: tokens in a sequence.
      mesh: mesh axis -> size; axes that are left out have size 1.
      accumulate: microbatches in the step.
      rules: how parameters are split.
      recompute: maps and "attention" that the backward pass runs again; None: those of `remat`.
        Only runs with other policies than this project's need it.
    """

    model: TransformerConfig
    batch: int
    length: int
    mesh: Mapping[str, int]
    accumulate: int = 1
    rules: RulesConfig = sharding.RULES
    recompute: tuple[str, ...] | None = None

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh.values())

    def size(self, *names: str) -> int:
        """Devices along mesh axes."""
        return math.prod(self.mesh.get(name, 1) for name in names)

    @property
    def tokens(self) -> int:
        """Tokens of the step on each device, were they divided over all devices."""
        return self.batch * self.length // self.devices

    @property
    def again(self) -> frozenset[str]:
        """The maps, and "attention", whose forward pass the backward pass runs again."""
        if self.recompute is not None:
            return frozenset(self.recompute)
        if self.model.remat in ("none", "dots"):
            return frozenset({"attention"} if self.model.remat == "dots" else ())
        kept = [_KEPT.get(name, ()) for name in self.model.remat.split("+")]
        everything = frozenset(_maps(self.model)) - {_LAST} | {"attention"}
        return everything.difference(*kept)

    @property
    def groups(self) -> tuple[tuple[int, Step], ...]:
        """Groups of layers that share a rematerialisation: how many, and a step with only it."""
        groups = layer_groups(self.model.remat, self.model.num_layers)
        return tuple(
            (
                group.end - group.first,
                dataclasses.replace(
                    self, model=dataclasses.replace(self.model, remat=group.policy)
                ),
            )
            for group in groups
        )


def _maps(model: TransformerConfig) -> dict[str, int]:
    """The layers' linear maps: path -> entries in all layers."""
    table, sizes = axes.table(model), axes.param_sizes(model)
    return {
        path: sizes[path]
        for path, param in table.items()
        if param.stacked and param.reads() & axes.WIDTHS
    }


@dataclasses.dataclass(frozen=True)
class Work:
    """A part of a step on one device, in FLOPs and bytes of HBM.

    Attributes:
      maps: FLOPs of linear maps.
      attention: FLOPs of attention's kernels, the masked half not counted.
      traffic: bytes of HBM that no matrix product hides: norms, activations, sums, the optimizer.
      weights: bytes of weights that the maps read; their time is at least that of this.
    """

    maps: float = 0.0
    attention: float = 0.0
    traffic: float = 0.0
    weights: float = 0.0


def forward(step: Step) -> Work:
    """All layers' forward passes."""
    return _layers(step, frozenset(_maps(step.model)) | {"attention"}, passes=1)


def backward(step: Step) -> Work:
    """All layers' backward passes, with what they run again."""
    layers = max(step.model.num_layers, 1)
    again = Work()
    for number, one in step.groups:
        part = _layers(one, one.again, passes=one.model.remat != "none")
        pairs = zip(dataclasses.astuple(again), dataclasses.astuple(part), strict=True)
        again = Work(*(x + number / layers * y for x, y in pairs))
    once = _layers(step, frozenset(_maps(step.model)), passes=2)
    # A flash kernel's gradient has five products where its forward pass has two.
    attention = 2.5 * _attention(step) + again.attention
    return Work(
        2 * once.maps + again.maps,
        attention,
        once.traffic + again.traffic,
        2 * once.weights + again.weights,
    )


def _layers(step: Step, what: frozenset[str], passes: int) -> Work:
    """The forward pass of some maps, and `passes` times what lies between them."""
    model, table = step.model, axes.table(step.model)
    width = _WIDTHS[model.dtype]
    entries = {path: size for path, size in _maps(model).items() if path in what}
    on_device = sum(size / _parts(table[path], step, "tensor") for path, size in entries.items())
    heads = (model.num_heads + 2 * model.kv_heads) * model.head_dim
    # Two norms read and write the stream; two sums read two and write one; RoPE reads and writes
    # queries and keys; the activation reads two and writes one.
    between = 10 * model.d_model + 2 * heads + 3 * model.d_ff
    return Work(
        2 * step.tokens * sum(entries.values()),
        _attention(step) if "attention" in what else 0.0,
        passes * width * step.tokens * model.num_layers * between,
        step.accumulate * width * on_device,
    )


def _attention(step: Step) -> float:
    """FLOPs of attention's forward pass: scores and values of the tokens that a query sees."""
    model = step.model
    seen = [
        min(model.window, step.length) if kind.startswith("sliding") else step.length / 2
        for kind in model.kinds
    ]
    return 4 * step.tokens * model.num_heads * model.head_dim * sum(seen)


def ends(step: Step) -> Work:
    """The head, the loss and the embedding, both passes."""
    model, width = step.model, _WIDTHS[step.model.dtype]
    head = model.d_model * model.vocab_size
    # The logits are float32. The loss reads and writes them about six times in all.
    traffic = 6 * 4 * step.tokens * model.vocab_size
    weights = 3 * step.accumulate * width * head / step.size("tensor")
    return Work(6 * step.tokens * head, 0.0, traffic, weights)


def update(step: Step) -> Work:
    """The optimizer: it reads gradients, weights and moments, and writes all but the gradients."""
    own = counts.params(step.model) / step.size("fsdp", "tensor")
    sums = 2 * counts.MASTER_BYTES * own * (step.accumulate if step.accumulate > 1 else 0)
    return Work(traffic=(2 * STATE_BYTES + counts.MASTER_BYTES) * own + sums)


def _parts(param: axes.Param, step: Step, name: str) -> int:
    """Into how many parts a mesh axis cuts a parameter."""
    return step.size(name) if name in sharding.param_spec(param, step.rules) else 1


def moves(step: Step) -> Iterator[tuple[str, str, Move]]:
    """Yields a step's collectives.

    Yields:
      (part of the step: "forward", "backward" or "ends"; what it moves: "weights", "gradients" or
      "stream"; the collective).
    """
    model, table = step.model, axes.table(step.model)
    width, micro = _WIDTHS[model.dtype], step.accumulate

    def over(name: str, kind: str, part: str, what: str, count: float, result: float) -> Any:
        """A collective over a mesh axis; `result`: bytes of the whole array."""
        size = step.size(name)
        sent = result * (size - 1) / size * (2 if kind == "all-reduce" else 1)
        return part, what, Move(kind, micro, count * sent, group_of(step, name))

    for path, entries in _maps(model).items():
        if "fsdp" in sharding.param_spec(table[path], step.rules):
            whole = width * entries / _parts(table[path], step, "tensor")
            yield over("fsdp", "all-gather", "forward", "weights", 1, whole)
            yield over("fsdp", "all-gather", "backward", "weights", 1, whole)
            yield over("fsdp", "reduce-scatter", "backward", "gradients", 1, whole)
    own = width * counts.params(model) / step.size("fsdp", "tensor")
    yield over("data", "all-reduce", "backward", "gradients", 1, own)
    stream = width * step.tokens * step.size("tensor") / micro * model.d_model
    layers = model.num_layers
    # Each branch gathers its input and scatters its output. The gradient does the reverse, gathers
    # the input again for the weights' gradient, and runs a branch again up to what it needs.
    yield over("tensor", "all-gather", "forward", "stream", 2 * layers, stream)
    yield over("tensor", "reduce-scatter", "forward", "stream", 2 * layers, stream)
    inputs = sum(n * (2 if one.model.remat == "none" else 4) for n, one in step.groups)
    yield over("tensor", "all-gather", "backward", "stream", inputs, stream)
    if again := sum(n for n, one in step.groups if "layers/attention/out" in one.again):
        yield over("tensor", "reduce-scatter", "backward", "stream", again, stream)
    yield over("tensor", "all-reduce", "backward", "stream", 2 * layers, stream)
    vocab = width * model.vocab_size * model.d_model / step.size("tensor")
    yield over("fsdp", "all-gather", "ends", "weights", 2, vocab)  # the embedding and the head
    yield over("fsdp", "reduce-scatter", "ends", "gradients", 1, vocab)
    yield over("fsdp", "all-reduce", "ends", "gradients", 1, vocab)  # the lookup's gradient
    yield over("tensor", "all-gather", "ends", "stream", 1, stream)
    yield over("tensor", "all-reduce", "ends", "stream", 1, stream)


def group_of(step: Step, name: str) -> tuple[int, ...]:
    """The first group of devices along a mesh axis, as positions in the mesh."""
    sizes = [step.size(axis) for axis in MESH_AXES]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    index = tuple(slice(None) if axis == name else 0 for axis in MESH_AXES)
    return tuple(ids[index].tolist())


def memory(step: Step) -> float:
    """Bytes of HBM on each device, estimated.

    The train state and its gradients; what each layer saves for the gradient; two layers' gathered
    weights and one layer's activations; the float32 logits and their gradient.
    """
    model, width = step.model, _WIDTHS[step.model.dtype]
    own = counts.params(model) / step.size("fsdp", "tensor")
    n = step.tokens * step.size("tensor") / step.accumulate
    tensor = step.size("tensor")
    heads = (model.num_heads + 2 * model.kv_heads) * model.head_dim
    inside = heads + model.num_heads * model.head_dim + 2 * model.d_ff
    kept = {
        "full": 0,
        "dots": 2 * model.d_model + inside,
        # Adjusted to the 102B's program on v5p:4x4x8 (83.6 GB).
        "none": 8 * model.d_model + 3 * inside + 2 * model.d_ff,
        "qkv": heads,
        "attended": model.num_heads * model.head_dim,
        "gate_up": 2 * model.d_ff,
        "branches": 2 * model.d_model,
    }
    saved = sum(
        number * (model.d_model + sum(kept[name] for name in one.model.remat.split("+")))
        for number, one in step.groups
    )
    layer = sum(_maps(model).values()) / max(model.num_layers, 1)
    working = 2 * width * layer / tensor + width * n * (4 * model.d_model + 2 * inside / tensor)
    logits = 3 * 4 * n * model.vocab_size / tensor
    state = (STATE_BYTES + counts.MASTER_BYTES) * own
    return state + width * n / tensor * saved + max(working, logits)
