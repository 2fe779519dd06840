"""The model families of Hugging Face that this decoder is, one entry for each `model_type`.

An entry says how the keys of config.json become fields of `TransformerConfig` and back, which
values of the block's fields the family has, and which multipliers it has keys for. All else is the
same for every family (`hf_config.py`): sizes, RoPE, the activation, tied heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from flm_jax.config import TransformerConfig
from flm_jax.errors import UserError
from flm_jax.interop import other_models
from flm_jax.interop.config_keys import Keys
from flm_jax.interop.rope_keys import FULL, SLIDING

Fields = dict[str, Any]
_BIASES = ("qkv_bias", "out_bias", "mlp_bias")


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
      model_type: as in config.json; also the name of the format.
      architecture: the class in transformers.
      read: fields of `TransformerConfig` from the keys, besides the common ones.
      write: keys from the config, besides the common ones.
      defaults: values of keys that a file may leave out.
      has: field of the block -> the values that the family allows; for a field that is not listed,
        only the default of `TransformerConfig`.
      kinds: the kinds of layers that it has.
      mixed: whether its layers may be of several kinds.
      multipliers: those of "input", "logit", "branch" and "score" that have a key.
      rope: whether its RoPE can be scaled.
      rope_by_layer: whether sliding layers have a RoPE of their own.
      activation: the key of the activation.
      gain_offset: what the files subtract from gains (1 for Gemma, whose norms multiply by 1 + w).
      ignored: keys that transformers does not apply in this family.
      whole_heads: whether transformers refuses a d_model that is no multiple of num_heads.
    """

    model_type: str
    architecture: str
    read: Callable[[Keys], Fields] = lambda keys: {}
    write: Callable[[TransformerConfig], Fields] = lambda config: {}
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    has: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    kinds: tuple[str, ...] = ("full",)
    mixed: bool = False
    multipliers: frozenset[str] = frozenset()
    rope: bool = True
    rope_by_layer: bool = False
    activation: str = "hidden_act"
    gain_offset: float = 0.0
    ignored: tuple[str, ...] = ()
    whole_heads: bool = False

    def lacks(self, config: TransformerConfig) -> list[str]:
        """Lists what the model has and the family has not, as "field value"."""
        plain = {f.name: f.default for f in dataclasses.fields(TransformerConfig)}
        found = [
            f"{name} {getattr(config, name)!r}"
            for name in (*_BIASES, "norms", "qk_norm", "attention_softcap", "logit_softcap")
            if getattr(config, name) not in self.has.get(name, (plain[name],))
            and self.has.get(name) != ()  # any value
        ]
        if "out_bias" in self.has and config.out_bias != config.qkv_bias:
            found.append(f"out_bias {config.out_bias} with qkv_bias {config.qkv_bias}")
        kinds = set(config.kinds)
        found += [f"layer_kinds {kind!r}" for kind in sorted(kinds - set(self.kinds))]
        if len(kinds) > 1 and not self.mixed:
            found.append(f"layer_kinds of {len(kinds)} kinds")
        rope = config.rope
        if not self.rope and rope.kind != "default":
            found.append(f"rope.kind {rope.kind!r}")
        if rope.fraction != 1:  # transformers has it in none of these families
            found.append(f"rope.fraction {rope.fraction:g}")
        if rope.local_theta and not self.rope_by_layer:
            found.append(f"rope.local_theta {rope.local_theta:g}")
        return found


def _biases(keys: Keys) -> Fields:
    """`attention_bias`: of queries, keys, values and the output."""
    bias = keys.flag("attention_bias")
    return {"qkv_bias": bias, "out_bias": bias}


def _all_biases(keys: Keys) -> Fields:
    return _biases(keys) | {"mlp_bias": keys.flag("mlp_bias")}


def _write_biases(config: TransformerConfig) -> Fields:
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


_EITHER = (False, True)
_ATTENTION_BIAS = {"qkv_bias": _EITHER, "out_bias": _EITHER}
_ANY_BIAS = {**_ATTENTION_BIAS, "mlp_bias": _EITHER}


def _kinds(keys: Keys, types: list[Any]) -> Fields:
    """Layer kinds and window from transformers' `layer_types`."""
    known = {FULL: "full", SLIDING: "sliding"}
    for layer, name in enumerate(types):
        if name not in (FULL, SLIDING):
            raise UserError(
                f"{keys.path}: layer_types[{layer}] is {name!r}; this decoder has {FULL} and "
                f"{SLIDING}, so the model cannot be imported"
            )
    kinds = tuple(known[name] for name in types)
    if "sliding" not in kinds:
        return {}
    return {"layer_kinds": _shortest(kinds), "window": keys.size("sliding_window")}


def _shortest(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest pattern whose repetition gives the kinds."""
    for length in range(1, len(kinds)):
        if all(kind == kinds[layer % length] for layer, kind in enumerate(kinds)):
            return kinds[:length]
    return kinds


def layer_types(config: TransformerConfig) -> list[str]:
    """transformers' name of every layer's attention."""
    return [SLIDING if kind.startswith("sliding") else FULL for kind in config.kinds]


def _read_mistral(keys: Keys) -> Fields:
    if keys.get("sliding_window") is None:
        return {}
    return {"layer_kinds": ("sliding",), "window": keys.size("sliding_window")}


def _write_mistral(config: TransformerConfig) -> Fields:
    return {"sliding_window": config.window if "sliding" in config.kinds else None}


def _read_qwen_windows(keys: Keys) -> Fields:
    layers = keys.size("num_hidden_layers")
    window = keys.get("sliding_window") if keys.flag("use_sliding_window") else None
    first = keys.number("max_window_layers", 28)
    types = keys.per_layer("layer_types", layers) or [
        SLIDING if window is not None and layer >= first else FULL for layer in range(layers)
    ]
    return _kinds(keys, types if window is not None else [FULL] * layers)


def _write_qwen_windows(config: TransformerConfig) -> Fields:
    sliding = "sliding" in config.kinds
    return {
        "use_sliding_window": sliding,
        "sliding_window": config.window if sliding else None,
        "max_window_layers": config.kinds.index("sliding") if sliding else config.num_layers,
        "layer_types": layer_types(config),
    }


def _read_smollm3(keys: Keys) -> Fields:
    layers, interval = keys.size("num_hidden_layers"), keys.size("no_rope_layer_interval", 4)
    rotates = keys.bits("no_rope_layers", layers)
    if rotates is None:  # 1: with RoPE, in spite of the key's name
        rotates = [int((layer + 1) % interval != 0) for layer in range(layers)]
    window = keys.get("sliding_window") if keys.flag("use_sliding_window") else None
    types = keys.per_layer("layer_types", layers) or [
        SLIDING if window is not None and not rope else FULL for rope in rotates
    ]
    slides = [window is not None and name == SLIDING for name in types]
    kinds = tuple(
        ("sliding" if sliding else "full") + ("" if rope else "_nope")
        for sliding, rope in zip(slides, rotates, strict=True)
    )
    fields = _all_biases(keys) | {"layer_kinds": _shortest(kinds)}
    return fields | ({"window": keys.size("sliding_window")} if any(slides) else {})


def _write_smollm3(config: TransformerConfig) -> Fields:
    sliding = any(kind.startswith("sliding") for kind in config.kinds)
    return _write_biases(config) | {
        "no_rope_layers": [int(not kind.endswith("_nope")) for kind in config.kinds],
        "use_sliding_window": sliding,
        "sliding_window": config.window if sliding else None,
        "layer_types": layer_types(config),
    }


def _read_gemma(keys: Keys, every: int) -> Fields:
    """All but the softcap of scores; without `layer_types`, every so many layers one is full."""
    layers = keys.size("num_hidden_layers")
    if keys.get("use_bidirectional_attention"):
        raise UserError(
            f"{keys.path}: use_bidirectional_attention is true, and this decoder is causal; the "
            "model cannot be imported"
        )
    types = keys.per_layer("layer_types", layers) or [
        SLIDING if (layer + 1) % every else FULL for layer in range(layers)
    ]
    return {
        **_biases(keys),
        **_kinds(keys, types),
        "norms": "both",
        "input_mult": math.sqrt(keys.size("hidden_size")),
        "attention_mult": keys.positive("query_pre_attn_scalar") ** -0.5,
        "logit_softcap": keys.number("final_logit_softcapping", 0.0),
    }


def _read_gemma2(keys: Keys) -> Fields:
    cap = keys.number("attn_logit_softcapping", 0.0)
    return _read_gemma(keys, 2) | {"attention_softcap": cap}


def _read_gemma3(keys: Keys) -> Fields:
    return _read_gemma(keys, keys.size("sliding_window_pattern")) | {"qk_norm": "head"}


def _write_gemma(config: TransformerConfig) -> Fields:
    # transformers needs a window, even where no layer slides: it then has its own default.
    window = {"sliding_window": config.window} if "sliding" in config.kinds else {}
    return window | {
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": round(config.score_mult**-2),
        "layer_types": layer_types(config),
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logit_softcap or None,
    }


def _read_granite(keys: Keys) -> Fields:
    return _all_biases(keys) | {
        "input_mult": keys.positive("embedding_multiplier", 1.0),
        "output_mult": 1 / keys.positive("logits_scaling", 1.0),
        "residual_mult": keys.positive("residual_multiplier", 1.0),
        "attention_mult": keys.positive("attention_multiplier", 1.0),
    }


def _write_granite(config: TransformerConfig) -> Fields:
    return _write_biases(config) | {
        "embedding_multiplier": config.input_mult,
        "logits_scaling": 1 / config.logit_mult,
        "residual_multiplier": config.branch_mult,
        "attention_multiplier": config.score_mult,
    }


def _read_teleflm(keys: Keys) -> Fields:
    if not keys.flag("use_mup"):
        return {}
    d_model, factor = keys.size("hidden_size"), keys.positive("mup_scale_factor", 1.0)
    fields: Fields = {
        "input_mult": keys.positive("input_mult", 1.0),
        "output_mult": keys.positive("output_mult", 1.0),
    }
    base = round(d_model / factor)
    if 1 <= base <= d_model and math.isclose(d_model / base, factor, rel_tol=1e-12):
        return fields | {"mup_base_width": base}
    # No whole base width has this factor: the logits keep it, and training starts at base = width.
    return fields | {"output_mult": fields["output_mult"] / factor}


def _write_teleflm(config: TransformerConfig) -> Fields:
    sp = config.parametrisation == "sp"
    return {
        "use_mup": True,
        "input_mult": config.input_mult,
        "output_mult": config.output_mult * (config.width_mult if sp else 1),
        "mup_scale_factor": config.width_mult,
    }


_GEMMA = {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "num_key_value_heads": 4,
          "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
          "sliding_window": 4096}  # fmt: skip
_GEMMA_HAS: dict[str, tuple[Any, ...]] = {
    **_ATTENTION_BIAS,
    "norms": ("both",),
    "logit_softcap": (),
}
_WINDOWED = ("full", "sliding")

FAMILIES: dict[str, Family] = {
    family.model_type.lower(): family
    for family in (
        Family("llama", "LlamaForCausalLM", _all_biases, _write_biases,
               {"max_position_embeddings": 2048}, _ANY_BIAS, whole_heads=True),
        Family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral,
               {"num_key_value_heads": 8, "max_position_embeddings": 131072,
                "sliding_window": 4096}, kinds=_WINDOWED, ignored=("layer_types",)),
        Family("qwen2", "Qwen2ForCausalLM",
               lambda keys: {"qkv_bias": True} | _read_qwen_windows(keys), _write_qwen_windows,
               {"num_key_value_heads": 32, "max_position_embeddings": 32768,
                "sliding_window": 4096},
               {"qkv_bias": (True,)}, _WINDOWED, mixed=True),
        Family("qwen3", "Qwen3ForCausalLM",
               lambda keys: {"qk_norm": "head"} | _biases(keys) | _read_qwen_windows(keys),
               lambda config: {"attention_bias": config.qkv_bias} | _write_qwen_windows(config),
               {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768,
                "sliding_window": 4096},
               {**_ATTENTION_BIAS, "qk_norm": ("head",)}, _WINDOWED, mixed=True),
        Family("olmo2", "Olmo2ForCausalLM",
               lambda keys: {"norms": "after", "qk_norm": "all"} | _biases(keys),
               lambda config: {"attention_bias": config.qkv_bias},
               {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
               {**_ATTENTION_BIAS, "norms": ("after",), "qk_norm": ("all",)}),
        Family("smollm3", "SmolLM3ForCausalLM", _read_smollm3, _write_smollm3,
               {"num_key_value_heads": 4, "rope_theta": 2_000_000.0, "tie_word_embeddings": True,
                "max_position_embeddings": 32768}, _ANY_BIAS,
               ("full", "sliding", "full_nope", "sliding_nope"), mixed=True),
        Family("gemma2", "Gemma2ForCausalLM", _read_gemma2, _write_gemma,
               {**_GEMMA, "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0},
               {**_GEMMA_HAS, "attention_softcap": ()}, _WINDOWED, mixed=True,
               activation="hidden_activation", gain_offset=1.0, whole_heads=True),
        Family("gemma3_text", "Gemma3ForCausalLM", _read_gemma3, _write_gemma,
               {**_GEMMA, "sliding_window_pattern": 6, "max_position_embeddings": 131072,
                "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
               {**_GEMMA_HAS, "qk_norm": ("head",)}, _WINDOWED, mixed=True, rope_by_layer=True,
               activation="hidden_activation", gain_offset=1.0,
               ignored=("attn_logit_softcapping",), whole_heads=True),
        Family("granite", "GraniteForCausalLM", _read_granite, _write_granite,
               {"max_position_embeddings": 2048}, _ANY_BIAS,
               multipliers=frozenset({"input", "logit", "branch", "score"})),
        Family("TeleFLM", "TeleFLMForCausalLM", _read_teleflm, _write_teleflm,
               {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
               multipliers=frozenset({"input", "logit"}), rope=False, whole_heads=True),
    )
}  # fmt: skip


def family_of(model_type: Any, path: str) -> Family:
    """The family of a config.json.

    Raises:
      UserError: there is none; says what is missing, if that is known, and the nearest family.
    """
    name = str(model_type).lower()
    if name in FAMILIES:
        return FAMILIES[name]
    if name == "gemma3":
        raise UserError(
            f"{path}: model_type is 'gemma3', which also has images; give a folder of the text "
            "model alone (model_type gemma3_text)"
        )
    missing, nearest = other_models.about(name, list(FAMILIES))
    because = f"which has {missing}" if missing else "which flm_jax does not know"
    raise UserError(
        f"{path}: model_type is {model_type!r}, {because}; the nearest family here is "
        f"{nearest!r}, of {', '.join(FAMILIES)}"
    )


def families_with(config: TransformerConfig) -> list[str]:
    """Names of the families that have all that the model has."""
    return [name for name, family in FAMILIES.items() if not family.lacks(config)]
