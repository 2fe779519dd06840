"""Published training runs, and what the forecast says of them: same model, chips and batch.

Where a run cut the model into pipeline stages, which this project does not do, our layout on the
same chips is forecast instead, and the row says so. Rows marked "fitted" set a constant of
`chips.py`; the others are held out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flm_jax.aot import work
from flm_jax.aot.chips import CHIPS, Chip
from flm_jax.aot.forecast import Forecast, forecast
from flm_jax.aot.places import fabric, places
from flm_jax.config import MeshConfig, TransformerConfig
from flm_jax.params.topology import parse


@dataclasses.dataclass(frozen=True)
class Run:
    """A published run.

    Attributes:
      name: the model and who ran it.
      model: its architecture.
      topology: its chips.
      mesh: the mesh.
      batch: sequences in a step.
      length: tokens in a sequence.
      tokens_per_s: tokens of each device in a second, as published; 0: `utilisation` was.
      utilisation: model FLOPs over the chip's peak, as published; 0: `tokens_per_s` was.
      source: where.
      chip: its chip, if it differs from the topology's.
      recompute: what its backward pass runs again; None: as its remat.
      accumulate: microbatches.
      async_tensor: whether it hides tensor parallelism's collectives (`ASYNC_TENSOR`).
      float8: whether its linear maps are float8 (`FLOAT8`).
      fitted: whether a constant was fitted to it.
      assumed: what the source does not say, or where our layout is another one.
    """

    name: str
    model: TransformerConfig
    topology: str
    mesh: MeshConfig
    batch: int
    length: int
    tokens_per_s: float
    utilisation: float
    source: str
    chip: Chip | None = None
    recompute: tuple[str, ...] | None = None
    accumulate: int = 1
    async_tensor: bool = False
    float8: bool = False
    fitted: bool = False
    assumed: str = ""


def _model(
    layers: int, width: int, heads: int, kv_heads: int, mlp: int, vocab: int, remat: str
) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=vocab, num_layers=layers, d_model=width, num_heads=heads, head_dim=128,
        d_ff=mlp, num_kv_heads=kv_heads, dtype="bfloat16", remat=remat,
    )  # fmt: skip


def _llama(size: str, remat: str, vocab: int = 128_256) -> TransformerConfig:
    """Llama 3.1 (arXiv 2407.21783, table 3); with 32,000 tokens, Llama 2 70B."""
    shape = {
        "8b": (32, 4096, 32, 8, 14336),
        "70b": (80, 8192, 64, 8, 28672),
        "405b": (126, 16384, 128, 8, 53248),
    }[size]
    return _model(*shape, vocab, remat)


def _scaled(scale: int, remat: str) -> TransformerConfig:
    """MaxText's `global_parameter_scale` (MaxText/pyconfig.py, get_individual_scales)."""
    base, rest = divmod(scale.bit_length() - 1, 3)
    wide = 2 ** (base + (rest > 0))
    return _model(
        16 * 2**base, 2048 * 2 ** (base + (rest > 1)), 16 * wide, 16 * wide, 7168 * wide, 32_000,
        remat,
    )  # fmt: skip


_MAPS = {name: f"layers/mlp/{name}" for name in ("gate", "up", "down")}
_QKV = tuple(f"layers/attention/{name}" for name in ("query", "key", "value"))
_OUT = "layers/attention/out"
# Only the first two maps of the MLP, and attention's kernel: the others are saved or offloaded.
_MLP_INPUTS = (_MAPS["gate"], _MAPS["up"], "attention")
_TIERS = "maxtext.readthedocs.io, Optimized models tiering"
_V5P = "MaxText/configs/v5p/README.md"
_RECIPES = "github.com/AI-Hypercomputer/tpu-recipes/training/"
_TITAN = "torchtitan/benchmarks/llama3_h100_202412_torchtitan.md"
_H100_500W = dataclasses.replace(
    CHIPS["h100"], hbm_bytes=96e9, hbm_bandwidth=2400e9, source=_TITAN + ": 500 W, HBM2e",
    matrix=0.41, matrix_source="fitted to torchtitan's Llama 3.1 8B on 8 of them (6,667 tokens/s)",
)  # fmt: skip
_ASYNC = "torchtitan/benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md"
_MEGATRON = "github.com/NVIDIA/Megatron-LM, README, strong scaling"
_BRIDGE = "github.com/NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary.md, 25.11"
_HERD = "arXiv 2407.21783, table 4"
_PIPELINE = "our layout; published with "
_TP8 = MeshConfig(1, 8, 8)
# torchtitan's selective checkpointing saves every second product, and attention.
_EVERY_SECOND = ("layers/attention/key", _OUT, _MAPS["up"])
# How much faster a step's linear maps are in float8. Fitted to torchtitan's Llama 3.1 8B on 8 H100
# (8,532 tokens/s). Only published runs use it: this project has no float8.
FLOAT8 = 1.38
# The share of the stream's collectives that PyTorch's asynchronous tensor parallelism hides. Fitted
# to torchtitan's Llama 3.1 70B in bfloat16 (652.4 tokens/s); this project has nothing like it.
ASYNC_TENSOR = 0.44


def _v5p(scale: int, topology: str, tensor: int, sequences: int, mfu: float, **more: Any) -> Run:
    devices, slices = len(places(topology)), parse(topology).slices
    remat = "full" if scale >= 512 else "dots"
    return Run(
        f"{scale}B, MaxText", _scaled(scale, remat), topology,
        MeshConfig(1, devices // tensor, tensor, dcn_fsdp=slices), sequences * devices, 2048, 0.0,
        mfu, _V5P, assumed="remat minimal as dots" if remat == "dots" else "", **more,
    )  # fmt: skip


def _gpt3(topology: str, mesh: MeshConfig, accumulate: int, mfu: float, **more: Any) -> Run:
    """GPT-3 175B of Megatron-LM; its MLP of two maps is one of three with as many entries."""
    return Run(
        "GPT-3 175B, Megatron-LM", _model(96, 12288, 96, 96, 32768, 131_072, "full"), topology,
        mesh, 1152, 4096, 0.0, mfu, _MEGATRON, accumulate=accumulate,
        assumed=_PIPELINE + "pipeline stages; length 4,096", **more,
    )  # fmt: skip


def _titan(size: str, topology: str, mesh: MeshConfig, batch: int, rate: float, **more: Any) -> Run:
    """A run of torchtitan: the 8B recomputes every second product, the others a layer's all."""
    small = size == "8b"
    words = [
        *(["float8"] if more.get("float8") else []),
        *(["async TP"] if more.get("async_tensor") else []),
        *([more.pop("assumed")] if "assumed" in more else []),
    ]
    own = {"assumed": "; ".join(words), **more}
    return Run(
        f"Llama 3.1 {size.upper()}, torchtitan", _llama(size, "dots" if small else "full"),
        topology, mesh, batch, 8192, rate, 0.0, own.pop("source", _TITAN),
        chip=_H100_500W, recompute=_EVERY_SECOND if small else None, **own,
    )  # fmt: skip


RUNS = (
    _v5p(32, "v5p:4x4x4", 4, 7, 0.7147, fitted=True),
    _v5p(64, "v5p:4x4x4", 4, 3, 0.7031),
    _v5p(128, "v5p:4x4x8", 8, 1, 0.6868),
    _v5p(128, "v5p:4x8x8", 8, 1, 0.6883),
    _v5p(256, "v5p:8x8x8", 8, 1, 0.6709),
    _v5p(512, "v5p:8x8x8", 8, 2, 0.6399),
    _v5p(1024, "v5p:8x8x16", 8, 2, 0.5535),
    _v5p(1024, "v5p:8x16x16", 8, 2, 0.6480),
    _v5p(32, "v5p:4x4x4@2", 4, 7, 0.6943),
    _v5p(128, "v5p:4x4x8@2", 8, 1, 0.6634),
    _v5p(1024, "v5p:8x8x16@2", 8, 2, 0.5155),
    Run(
        "Llama 2 70B, MaxText", _llama("70b", "dots", 32_000), "v5p:4x8x8", MeshConfig(1, 256),
        1024, 4096, 692, 0.0, _TIERS + "; MaxText/configs/v5p/llama2_70b.sh",
        recompute=_MLP_INPUTS, fitted=True, assumed="v5p-512 as 256 chips (512 cores)",
    ),
    Run(
        "Llama 3.1 405B, MaxText", _llama("405b", "full"), "v5p:8x8x8", MeshConfig(1, 512),
        1024, 8192, 124.618, 0.0, _RECIPES + "v5p/Llama3.1-405B-MaxText",
        assumed="fsdp 512, full remat",
    ),
    Run(
        "Llama 3.1 8B, MaxText", _llama("8b", "dots"), "v6e:16x16", MeshConfig(1, 256),
        768, 8192, 7207, 0.0, _TIERS, recompute=_MLP_INPUTS, fitted=True,
        assumed="batch and remat of the v6e-16 recipe",
    ),
    Run(
        "Llama 3.1 8B, MaxText", _llama("8b", "dots"), "v6e:4x4", MeshConfig(1, 16),
        48, 8192, 7243, 0.0, _RECIPES + "trillium/Llama3.1-8B-MaxText/v6e-16",
        recompute=_MLP_INPUTS,
    ),
    Run(
        "Llama 3.1 70B, MaxText", _llama("70b", "dots"), "v6e:16x16", MeshConfig(1, 256),
        1280, 8192, 960, 0.0, _RECIPES + "trillium/Llama3.1-70B-MaxText/v6e-256",
        recompute=(*_MLP_INPUTS, _OUT), fitted=True,
    ),
    Run(
        "Llama 2 70B, MaxText", _llama("70b", "dots", 32_000), "v6e:16x16", MeshConfig(1, 256),
        512, 4096, 900, 0.0, _TIERS + "; maxtext_trillium_model_configs.py",
        recompute=(*_MLP_INPUTS, _OUT),
    ),
    Run(
        "Llama 3.1 405B, MaxText", _llama("405b", "full"), "v6e:16x16@2",
        MeshConfig(1, 512, dcn_fsdp=2), 512, 8192, 149.482, 0.0,
        _RECIPES + "trillium/Llama3.1-405B-MaxText",
    ),
    Run(
        "Llama 3.1 405B, MaxText", _llama("405b", "full"), "v6e:16x16@2",
        MeshConfig(1, 512, dcn_fsdp=2), 512, 8192, 0.0, 0.3855, _TIERS,
        assumed="2 slices, as in the recipe",
    ),
    _titan("8b", "h100:1x8", MeshConfig(1, 8), 16, 6667, fitted=True),
    _titan("8b", "h100:16x8", MeshConfig(1, 128), 256, 6514),
    _titan("8b", "h100:8x8", _TP8, 96, 4378, source=_ASYNC),
    _titan("8b", "h100:8x8", _TP8, 96, 4809.4, source=_ASYNC, async_tensor=True),
    _titan("70b", "h100:32x8", MeshConfig(1, 32, 8), 512, 597.3, source=_ASYNC),
    _titan(
        "70b", "h100:32x8", MeshConfig(1, 32, 8), 512, 652.4, source=_ASYNC,
        async_tensor=True, fitted=True,
    ),
    _titan("8b", "h100:1x8", MeshConfig(1, 8), 16, 8532, float8=True, fitted=True),
    _titan("8b", "h100:16x8", MeshConfig(1, 128), 256, 8380, float8=True),
    _titan(
        "70b", "h100:32x8", MeshConfig(1, 32, 8), 512, 876, float8=True,
        async_tensor=True,
    ),
    _titan(
        "405b", "h100:64x8", MeshConfig(1, 64, 8), 256, 128, float8=True,
        async_tensor=True, assumed=_PIPELINE + "PP 8, TP 8, FSDP 8",
    ),
    Run(
        "Llama 3 8B, Megatron Bridge", _llama("8b", "none"), "h100:1x8", MeshConfig(1, 8), 128,
        8192, 14_451, 0.0, _BRIDGE, accumulate=16, float8=True,
        fitted=True, assumed="float8; no recomputation",
    ),
    _gpt3("h100:12x8", MeshConfig(1, 12, 8), 12, 0.47),
    _gpt3("h100:576x8", MeshConfig(1, 576, 8), 1, 0.42),
    Run(
        "Llama 3 405B, Meta", _llama("405b", "full"), "h100:1024x8",
        MeshConfig(1, 1024, 8), 2048, 8192, 0.0, 0.43, _HERD,
        assumed=_PIPELINE + "PP 16, TP 8, DP 64",
    ),
    Run(
        "Llama 3 405B, Meta", _llama("405b", "full"), "h100:2048x8",
        MeshConfig(1, 2048, 8), 2048, 8192, 0.0, 0.41, _HERD,
        assumed=_PIPELINE + "PP 16, TP 8, DP 128",
    ),
)  # fmt: skip


def compare(run: Run) -> dict[str, Any]:
    """Forecasts a published run.

    Returns:
      JSON values: what was run and published; `forecast` and `bound` in the published unit;
      `error`: the forecast over the published value, minus 1; whether the run was `fitted`; the
      parts of the forecast step in seconds.
    """
    made = _forecast(run)
    unit = "tokens_per_s" if run.tokens_per_s else "utilisation"
    published = run.tokens_per_s or run.utilisation
    value = getattr(made, unit)
    return {
        "name": run.name,
        "topology": run.topology,
        "mesh": {"fsdp": run.mesh.fsdp, "tensor": run.mesh.tensor},
        "batch": run.batch,
        "length": run.length,
        "unit": unit,
        "published": published,
        "forecast": value,
        "bound": value * made.step_s / made.bound_s,
        "error": value / published - 1,
        "fitted": run.fitted,
        "assumed": run.assumed,
        "source": run.source,
        "parts": {
            name: getattr(made, name)
            for name in ("step_s", "maps_s", "attention_s", "traffic_s", "exposed_s", "hidden_s")
        },
    }


def step_of(run: Run) -> work.Step:
    """The step that a run makes."""
    mesh = {"data": run.mesh.data, "fsdp": run.mesh.fsdp, "tensor": run.mesh.tensor}
    return work.Step(
        run.model, run.batch, run.length, mesh, run.accumulate, recompute=run.recompute
    )


def _forecast(run: Run) -> Forecast:
    where = fabric(run.topology, run.mesh)
    chip = run.chip or where.chip
    if run.float8:
        chip = dataclasses.replace(chip, matrix=chip.matrix * FLOAT8)
    hidden = ASYNC_TENSOR if run.async_tensor else 0.0
    return forecast(step_of(run), dataclasses.replace(where, chip=chip), stream_hidden=hidden)


def errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean absolute errors of `compare`'s rows, by what they show of the forecast."""
    kinds: dict[str, list[float]] = {
        "fitted": [], "held out": [], "held out, our layout in place of another": [],
    }  # fmt: skip
    for row in rows:
        kind = list(kinds)[2 if _PIPELINE in row["assumed"] else 0 if row["fitted"] else 1]
        kinds[kind].append(abs(row["error"]))
    return {kind: sum(found) / len(found) for kind, found in kinds.items()}
