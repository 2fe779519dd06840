"""Converts config.json of Llama, TeleFLM and Granite to `TransformerConfig`, and back.

All three are the architecture of this decoder. They differ in their scalar multipliers:

    llama     none
    teleflm   embedding times input_mult, logits times output_mult / mup_scale_factor (if use_mup)
    granite   embedding times embedding_multiplier, logits over logits_scaling, attention scores
              times attention_multiplier, branches times residual_multiplier

A multiplier that the target has no field for is folded into the parameters (`Scales`).
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from flm_jax.config import TransformerConfig
from flm_jax.data import json_text
from flm_jax.errors import UserError

# Format -> (model_type, architecture).
FORMATS = {
    "llama": ("llama", "LlamaForCausalLM"),
    "teleflm": ("TeleFLM", "TeleFLMForCausalLM"),
    "granite": ("granite", "GraniteForCausalLM"),
}
_BY_MODEL_TYPE = {model_type.lower(): name for name, (model_type, _) in FORMATS.items()}

# Keys with the only values that this decoder supports. A missing key is fine.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
# A format's own scalars: not carried into another format.
_SCALARS = ("use_mup", "input_mult", "output_mult", "mup_scale_factor", "embedding_multiplier",
            "logits_scaling", "attention_multiplier", "residual_multiplier")  # fmt: skip
# Every layer adds the outputs of these to the stream.
_BRANCH_ENDS = ("layers/attention/out", "layers/mlp/down")

Scales = Mapping[str, float]  # path -> factor that the parameter is multiplied by


@dataclasses.dataclass(frozen=True)
class Described:
    """The contents of a config.json.

    Attributes:
      config: config of the model after `scales` are applied.
      scales: factors for the parameters in the files.
      tied: whether the head is the embedding.
      values: every key of the file.
    """

    config: TransformerConfig
    scales: Scales
    tied: bool
    values: dict[str, Any]


def read(folder: pathlib.Path) -> Described:
    """Reads config.json.

    Raises:
      UserError: the file is missing or not JSON, or its architecture is another one; the message
        names the file and key.
    """
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{path}: missing; give a folder with a Hugging Face model")
    return _described(read_object(path), path)


def read_object(file: pathlib.Path) -> dict[str, Any]:
    """Reads a file with one JSON object. Raises UserError, naming the file, if it has none."""
    try:
        values = json_text.parse(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); fetch it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: no JSON object; fetch it again")
    return values


def _described(values: dict[str, Any], path: pathlib.Path) -> Described:
    format = _BY_MODEL_TYPE.get(str(values.get("model_type")).lower())
    if format is None:
        raise UserError(
            f"{path}: model_type is {values.get('model_type')!r}; this decoder is one of "
            f"{', '.join(model_type for model_type, _ in FORMATS.values())}"
        )
    for key, allowed in _ONLY.items():
        if (value := values.get(key)) is not None and value not in allowed:
            raise UserError(
                f"{path}: {key} is {value!r}, and this decoder has only {allowed[0]!r}; the model "
                "cannot be imported"
            )

    def number(key: str, default: float | None = None) -> Any:
        value = values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{path}: {key} is {value!r}; it must be a number")
        return value

    def size(key: str, default: int | None = None) -> int:
        value = number(key, default)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{path}: {key} is {value!r}; it must be an integer above 0")
        return value

    d_model, heads = size("hidden_size"), size("num_attention_heads")
    head_dim = size("head_dim", d_model // heads)
    multipliers: dict[str, Any] = {}
    scales: dict[str, float] = {}
    if format == "teleflm" and values.get("use_mup"):
        multipliers = {
            "input_mult": float(number("input_mult", 1.0)),
            "output_mult": float(number("output_mult", 1.0)),
            "mup_base_width": _base_width(d_model, float(number("mup_scale_factor", 1.0)), path),
        }
    elif format == "granite":
        multipliers = {
            "input_mult": float(number("embedding_multiplier", 1.0)),
            "output_mult": 1 / float(number("logits_scaling", 1.0)),
        }
        attention = float(number("attention_multiplier", 1.0)) * math.sqrt(head_dim)
        branch = float(number("residual_multiplier", 1.0))
        usual = math.isclose(attention, 1, rel_tol=1e-12)
        scales = {
            "layers/attention/query": 1.0 if usual else attention,
            **dict.fromkeys(_BRANCH_ENDS, branch),
        }
    config = TransformerConfig(
        vocab_size=size("vocab_size"),
        num_layers=size("num_hidden_layers"),
        d_model=d_model,
        num_heads=heads,
        num_kv_heads=_kv_heads(heads, size("num_key_value_heads", heads)),
        head_dim=head_dim,
        d_ff=size("intermediate_size"),
        rope_theta=_rope_theta(values, path),
        rms_norm_eps=float(number("rms_norm_eps", 1e-6)),
        **multipliers,
    )
    tied = bool(values.get("tie_word_embeddings", False))
    return Described(config, {p: s for p, s in scales.items() if s != 1}, tied, values)


def _kv_heads(heads: int, kv_heads: int) -> int:
    """Returns 0 where there are as many key/value heads as query heads."""
    return 0 if kv_heads == heads else kv_heads


def _base_width(d_model: int, factor: float, path: pathlib.Path) -> int:
    base = round(d_model / factor) if factor > 0 else 0
    if not 1 <= base <= d_model or not math.isclose(d_model / base, factor, rel_tol=1e-12):
        raise UserError(
            f"{path}: mup_scale_factor is {factor:g} and hidden_size {d_model}; their ratio, the "
            "width at which hyper-parameters were found, must be a whole number of at most "
            "hidden_size"
        )
    return base


def _rope_theta(values: Mapping[str, Any], path: pathlib.Path) -> float:
    """Reads a RoPE setting: from its key, or `rope_parameters`, where transformers 5 has it."""
    theta = values.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        about = values.get(key) or {}
        kind = about.get("rope_type", about.get("type", "default"))
        if kind != "default":
            raise UserError(
                f"{path}: {key} is of type {kind!r}, and this decoder rotates by plain RoPE; the "
                "model cannot be imported"
            )
        if about.get("partial_rotary_factor", 1) != 1:
            raise UserError(
                f"{path}: {key}.partial_rotary_factor is {about['partial_rotary_factor']}, and "
                "this decoder rotates whole heads; the model cannot be imported"
            )
        theta = about.get("rope_theta", theta)
    return 10_000.0 if theta is None else float(theta)


def folded(config: TransformerConfig, format: str) -> tuple[TransformerConfig, Scales]:
    """Folds the multipliers that a format has no field for into the parameters.

    Llama has no multipliers: `input_mult` is folded into the embedding, `logit_mult` into the head,
    and CompleteP's `branch_mult` into the two parameters that end a layer's branches. TeleFLM has
    no field for `branch_mult`; Granite has one for each.

    Args:
      config: config of the model.
      format: one of `FORMATS`.

    Returns:
      The config to write, and the factors for the parameters.
    """
    if format == "granite":
        return config, {}
    scales = dict.fromkeys(_BRANCH_ENDS, config.branch_mult)
    plain = dataclasses.replace(config, mup_base_depth=0)
    if format == "llama":
        scales |= {"embedding": config.input_mult, "head": config.logit_mult}
        plain = dataclasses.replace(plain, input_mult=1.0, output_mult=1.0, mup_base_width=0)
    return plain, {path: scale for path, scale in scales.items() if scale != 1}


def write(
    config: TransformerConfig, format: str, dtype: str, carried: Mapping[str, Any], context: int
) -> dict[str, Any]:
    """Returns the values of config.json for a model.

    Args:
      config: config of the model, without the multipliers that the format lacks (see `folded`).
      format: one of `FORMATS`.
      dtype: dtype of the files: float32, bfloat16 or float16.
      carried: another config.json, whose other keys are copied.
      context: the longest sequence in tokens, used if `carried` does not give one.

    Raises:
      UserError: the format cannot express this model.
    """
    model_type, architecture = FORMATS[format]
    if config.d_model % config.num_heads:
        raise UserError(
            f"format {format!r}: transformers wants d_model to be a multiple of num_heads, but "
            f"they are {config.d_model} and {config.num_heads}; grow one of them to suit"
        )
    if format == "teleflm" and config.head_dim * config.num_heads != config.d_model:
        raise UserError(
            f"format 'teleflm': a head's size is d_model / num_heads there, but head_dim "
            f"{config.head_dim} times num_heads {config.num_heads} is not d_model "
            f"{config.d_model}; choose llama or granite"
        )
    if config.num_layers == 0:
        raise UserError(f"format {format!r}: the model has no layers; grow it first")
    dropped = {*_SCALARS, "rope_scaling", "torch_dtype", "transformers_version", "_name_or_path"}
    if carried.get("model_type") != model_type:
        dropped.add("auto_map")  # another architecture's code
    values = {key: value for key, value in carried.items() if key not in dropped}
    values |= {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        # Both names are written: transformers 4 and vLLM read the first, transformers 5 the second.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    values.setdefault("max_position_embeddings", context)
    if format == "teleflm":
        sp = config.parametrisation == "sp"
        values |= {
            "use_mup": True,
            "input_mult": config.input_mult,
            "output_mult": config.output_mult * (config.width_mult if sp else 1),
            "mup_scale_factor": config.width_mult,
        }
    if format == "granite":
        values |= {
            "embedding_multiplier": config.input_mult,
            "logits_scaling": 1 / config.logit_mult,
            "attention_multiplier": config.head_dim**-0.5,
            "residual_multiplier": config.branch_mult,
        }
    return values
