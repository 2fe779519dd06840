"""Converts config.json to `TransformerConfig`, and back.

What differs between families is in `families.py`. Sizes, RoPE, the activation and the multipliers
are handled here. A multiplier that the target's family has no key for is folded into the parameters
(`folded`), so that the function stays the same.
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
from flm_jax.interop import rope_keys
from flm_jax.interop.config_keys import Keys
from flm_jax.interop.families import FAMILIES, Family, families_with, family_of
from flm_jax.params import axes
from flm_jax.params.axes import Role

FORMATS = tuple(FAMILIES)

# The activation of the gate, by its names in transformers.
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
                "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"}  # fmt: skip
_ACTIVATION_KEYS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
# Keys of another architecture's features: not carried into an export. `write` sets those it needs.
_DROPPED = ("use_mup", "input_mult", "output_mult", "mup_scale_factor", "embedding_multiplier",
            "logits_scaling", "attention_multiplier", "residual_multiplier", "rope_scaling",
            "rope_parameters", "rope_local_base_freq", "partial_rotary_factor", "layer_types",
            "no_rope_layers", "no_rope_layer_interval", "sliding_window", "use_sliding_window",
            "sliding_window_pattern", "_sliding_window_pattern", "max_window_layers",
            "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
            "attention_bias", "mlp_bias", "hidden_act", "hidden_activation", "torch_dtype",
            "transformers_version", "_name_or_path", "pretraining_tp", "cache_implementation",
            "original_max_position_embeddings", "quantization_config",
            "compression_config")  # fmt: skip
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

_CONTEXT = "max_position_embeddings"
Scales = Mapping[str, float]  # path -> factor that the parameter is multiplied by


@dataclasses.dataclass(frozen=True)
class Described:
    """The contents of a config.json.

    Attributes:
      config: config of the model; tied if the file says so.
      family: the model's family.
      values: every key of the file.
      context: the longest sequence in tokens; 0: not known.
      notes: keys without an effect.
    """

    config: TransformerConfig
    family: Family
    values: dict[str, Any]
    context: int
    notes: tuple[str, ...] = ()


def read(folder: pathlib.Path) -> Described:
    """Reads config.json.

    Raises:
      UserError: the file is missing or not JSON, or its architecture is another one; the message
        names the file and key.
    """
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{path}: missing; give a folder with a Hugging Face model")
    return described(json_text.read_object(path), path)


def described(values: dict[str, Any], path: pathlib.Path) -> Described:
    """Reads the keys of a config.json; errors call it `path`. Raises UserError as `read`."""
    family = family_of(values.get("model_type"), str(path))
    if values.get("quantization_config") is not None:
        raise UserError(
            f"{path}: quantization_config is set, and flm_jax reads plain weights; fetch the model "
            "that is not quantized"
        )
    common = {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, family.activation: "silu"}
    keys = Keys({**common, **family.defaults, **values}, str(path))
    try:
        config = _config(keys, family)
    except UserError as error:
        if str(error).startswith(str(path)):
            raise
        raise UserError(f"{path}: {error}") from None  # a value that our config refuses
    context = 0 if keys.get(_CONTEXT) is None else keys.size(_CONTEXT)
    notes = [
        f"{path.name}: {key} has no effect, as in transformers"
        for key in family.ignored
        if keys.get(key) is not None
    ]
    return Described(config, family, values, context, tuple(notes))


def _config(keys: Keys, family: Family) -> TransformerConfig:
    d_model, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    kv_heads = keys.size("num_key_value_heads", heads)
    head_dim = keys.size("head_dim", d_model // heads)
    theta, rope = rope_keys.read(keys, family.rope_by_layer)
    fields = family.read(keys)
    if math.isclose(fields.get("attention_mult", 0.0), head_dim**-0.5, rel_tol=1e-12):
        del fields["attention_mult"]  # it is the usual one
    return TransformerConfig(
        vocab_size=keys.size("vocab_size"),
        num_layers=keys.size("num_hidden_layers"),
        d_model=d_model,
        num_heads=heads,
        num_kv_heads=0 if kv_heads == heads else kv_heads,
        head_dim=head_dim,
        d_ff=keys.size("intermediate_size"),
        rope_theta=theta,
        rope=rope,
        rms_norm_eps=keys.positive("rms_norm_eps"),
        activation=keys.text(family.activation, _ACTIVATIONS),
        tied=keys.flag("tie_word_embeddings"),
        **fields,
    )


def folded(config: TransformerConfig, format: str) -> tuple[TransformerConfig, Scales]:
    """Folds the multipliers that a family has no key for into the parameters.

    `input_mult` goes into the embedding and `logit_mult` into the head; if they are tied, what the
    head needs goes into the last norm. `branch_mult` goes into the parameters that end a layer's
    branches, and what `score_mult` has beyond head_dim^-0.5 into the queries. An eps of the
    queries' and keys' norms that differs from that of the others goes into the maps before them,
    because RMSNorm(c x; c^2 eps) = RMSNorm(x; eps).

    Args:
      config: config of the model.
      format: one of `FORMATS`.

    Returns:
      The config to write, and the factors for the parameters.
    """
    family, table = FAMILIES[format], axes.table(config)
    scales = dict.fromkeys(table, 1.0)
    values: dict[str, Any] = {}

    def multiply(factor: float, *paths: str) -> None:
        for path in paths:
            if path in scales:
                scales[path] *= factor

    if family.gain_offset:  # Gemma multiplies the embedding by sqrt(d_model)
        _fold_input(config.input_mult / math.sqrt(config.d_model), config, multiply)
        values["input_mult"] = math.sqrt(config.d_model)
    elif "input" not in family.multipliers:
        _fold_input(config.input_mult, config, multiply)
        values["input_mult"] = 1.0
    if "logit" not in family.multipliers:
        multiply(config.logit_mult, "final_norm" if config.tied else "head")
        values |= {"output_mult": 1.0, "mup_base_width": 0}
    if "branch" not in family.multipliers:
        ends = [path for path, param in table.items() if param.multiplier == "residual"]
        multiply(config.branch_mult, *ends)
        values |= {"residual_mult": 1.0, "mup_base_depth": 0}
    score = config.score_mult * math.sqrt(config.head_dim)
    integer = family.gain_offset and (round(config.score_mult**-2) or 1) ** -0.5
    if integer and math.isclose(integer, config.score_mult, rel_tol=1e-9):
        values["attention_mult"] = integer
    elif "score" not in family.multipliers and not math.isclose(score, 1, rel_tol=1e-12):
        normed = "layers/attention/query_norm" in table
        queries = ("query_norm",) if normed else ("query", "query_bias")
        multiply(score, *(f"layers/attention/{name}" for name in queries))
        values["attention_mult"] = 0.0
    if config.qk_norm != "none" and config.qk_norm_eps not in (0, config.rms_norm_eps):
        maps = ("query", "key", "query_bias", "key_bias")
        ratio = math.sqrt(config.rms_norm_eps / config.qk_norm_eps)
        multiply(ratio, *(f"layers/attention/{name}" for name in maps))
        values["qk_norm_eps"] = 0.0
    plain = dataclasses.replace(config, **values)
    return plain, {path: scale for path, scale in scales.items() if scale != 1}


def _fold_input(factor: float, config: TransformerConfig, multiply: Any) -> None:
    """Folds a factor on the embedding's output into the embedding."""
    multiply(factor, "embedding")
    if config.tied:
        multiply(1 / factor, "final_norm")


def gain_paths(config: TransformerConfig) -> frozenset[str]:
    """The paths of the norms' gains."""
    return frozenset(path for path, p in axes.table(config).items() if Role.GAIN in p.roles)


def write(
    config: TransformerConfig, format: str, dtype: str, carried: Mapping[str, Any], context: int
) -> dict[str, Any]:
    """Returns the values of config.json for a model.

    Args:
      config: config of the model, without the multipliers that the family lacks (see `folded`).
      format: one of `FORMATS`.
      dtype: dtype of the files: float32, bfloat16 or float16.
      carried: another config.json, whose other keys are copied.
      context: the longest sequence in tokens, used if `carried` does not give one.

    Raises:
      UserError: the family cannot express this model.
    """
    family = FAMILIES[format]
    _check(config, family, format)
    of, dropped = carried.get("model_type"), set(_DROPPED)
    if of is not None and str(of).lower() not in FAMILIES:
        dropped |= set(carried) - set(SPECIAL_IDS)  # the tokenizer's, of a model that is none here
    # transformers puts a family's own ids where a file has none; the vocabulary may lack them.
    values: dict[str, Any] = {"pad_token_id": None}
    if of != family.model_type:
        dropped.add("auto_map")  # another architecture's code
        values = dict.fromkeys(SPECIAL_IDS)
    values |= {key: value for key, value in carried.items() if key not in dropped}
    values |= {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        family.activation: _ACTIVATION_KEYS[config.activation],
        "tie_word_embeddings": config.tied,
        # Both names are written: transformers 4 and vLLM read the first, transformers 5 the second.
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if not isinstance(values.get(_CONTEXT), int) or values[_CONTEXT] < 1:
        values[_CONTEXT] = context  # transformers needs one
    return values | rope_keys.write(config, family.rope_by_layer) | family.write(config)


def _check(config: TransformerConfig, family: Family, format: str) -> None:
    """Raises UserError if the family cannot express the model."""
    if lacks := family.lacks(config):
        others = [name for name in families_with(config) if name != format]
        advice = f"choose {' or '.join(others)}" if others else "no family has all that it has"
        raise UserError(f"format {format!r} has no {', '.join(lacks)}; {advice}")
    if family.whole_heads and config.d_model % config.num_heads:
        raise UserError(
            f"format {format!r}: transformers wants d_model to be a multiple of num_heads, but "
            f"they are {config.d_model} and {config.num_heads}; grow one of them to suit"
        )
    if family.model_type == "TeleFLM" and config.head_dim * config.num_heads != config.d_model:
        raise UserError(
            f"format 'teleflm': a head's size is d_model / num_heads there, but head_dim "
            f"{config.head_dim} times num_heads {config.num_heads} is not d_model "
            f"{config.d_model}; choose llama or granite"
        )
    if config.num_layers == 0:
        raise UserError(f"format {format!r}: the model has no layers; grow it first")
