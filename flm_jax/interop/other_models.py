"""What this decoder lacks for models of other families, and the nearest family that it has.

Only for messages: a model type that is not listed is refused too, without the reason.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

_EXPERTS, _IMAGES, _ENCODER = "experts", "images", "an encoder"
_SSM = "state-space layers"
_LAYER_NORM = "LayerNorm"
_PARALLEL = "LayerNorm and parallel branches"
_POSITIONS = "LayerNorm and learned positions"
_MERGED = "merged projections"

# Part of a model_type -> (what is missing, nearest family). The longest part that a model_type
# contains counts, so that "qwen3_moe" is not "moe".
_KNOWN: dict[str, tuple[str, str]] = {
    "apertus": ("the activation xIELU", "qwen3"),
    "arcee": ("an MLP without a gate", "llama"),
    "arctic": (_EXPERTS, "llama"),
    "baichuan": (_MERGED, "llama"),
    "bamba": (_SSM, "llama"),
    "bart": (_ENCODER, "llama"),
    "bert": (_ENCODER, "llama"),
    "bitnet": ("ternary weights", "llama"),
    "bloom": ("LayerNorm and ALiBi", "llama"),
    "chatglm": (_MERGED, "qwen2"),
    "codegen": (_PARALLEL, "llama"),
    "cohere": (_PARALLEL, "llama"),
    "dbrx": (_EXPERTS, "llama"),
    "deepseek": ("latent attention and experts", "llama"),
    "diffllama": ("differential attention", "llama"),
    "dots1": (_EXPERTS, "qwen3"),
    "ernie4_5": ("RoPE by pairs", "llama"),
    "ernie4_5_moe": (_EXPERTS, "llama"),
    "falcon": (_PARALLEL, "llama"),
    "falcon_h1": (_SSM, "llama"),
    "falcon_mamba": (_SSM, "llama"),
    "gemma": ("gains of 1 + w without norms after the branches", "gemma2"),
    "gemma3n": ("per-layer inputs", "gemma3_text"),
    "gemma4": ("per-layer inputs", "gemma3_text"),
    "glm": (f"{_MERGED} and RoPE by pairs", "llama"),
    "glm4_moe": (_EXPERTS, "qwen3"),
    "gpt2": (_POSITIONS, "llama"),
    "gpt_bigcode": (_POSITIONS, "llama"),
    "gpt_neo": (_POSITIONS, "llama"),
    "gpt_neox": ("LayerNorm, parallel branches and partial RoPE", "llama"),
    "gpt_oss": ("experts and attention sinks", "mistral"),
    "gptj": ("LayerNorm, parallel branches and RoPE by pairs", "llama"),
    "granitemoe": (_EXPERTS, "granite"),
    "granitemoehybrid": (f"{_SSM} and experts", "granite"),
    "helium": ("RoPE by pairs", "llama"),
    "internlm2": (_MERGED, "llama"),
    "jamba": (f"{_SSM} and experts", "mistral"),
    "jetmoe": (_EXPERTS, "llama"),
    "lfm2": ("convolutions", "qwen3"),
    "llama4": ("experts and scaled chunked attention", "llama"),
    "llava": (_IMAGES, "llama"),
    "mamba": (_SSM, "llama"),
    "minicpm3": ("latent attention", "granite"),
    "minimax": ("experts and linear attention", "llama"),
    "ministral": ("windows in some layers only", "mistral"),
    "mistral3": (_IMAGES, "mistral"),
    "mixtral": (_EXPERTS, "mistral"),
    "mllama": (_IMAGES, "llama"),
    "moe": (_EXPERTS, "llama"),
    "mpt": ("LayerNorm and ALiBi", "llama"),
    "nemotron": ("LayerNorm and an MLP without a gate", "llama"),
    "nemotron_h": (_SSM, "llama"),
    "olmo": ("LayerNorm without parameters", "olmo2"),
    "olmo3": ("OLMo-2's norms with sliding layers", "olmo2"),
    "olmoe": (_EXPERTS, "olmo2"),
    "openai_gpt": (_POSITIONS, "llama"),
    "opt": (_POSITIONS, "llama"),
    "paligemma": (_IMAGES, "gemma2"),
    "persimmon": (f"{_LAYER_NORM} and an MLP without a gate", "llama"),
    "phi": ("LayerNorm, parallel branches and partial RoPE", "llama"),
    "phi3": (f"{_MERGED} and LongRoPE", "llama"),
    "phimoe": (_EXPERTS, "mistral"),
    "pixtral": (_IMAGES, "mistral"),
    "qwen": (_MERGED, "qwen2"),
    "qwen2_moe": (_EXPERTS, "qwen2"),
    "qwen3_moe": (_EXPERTS, "qwen3"),
    "qwen3_next": ("experts and linear attention", "qwen3"),
    "qwen3_5": ("linear attention", "qwen3"),
    "recurrent_gemma": ("recurrent layers", "gemma2"),
    "rwkv": ("recurrent layers", "llama"),
    "stablelm": (f"{_LAYER_NORM} and partial RoPE", "llama"),
    "starcoder2": (f"{_LAYER_NORM} and an MLP without a gate", "mistral"),
    "t5": (_ENCODER, "llama"),
    "vision": (_IMAGES, "llama"),
    "vl": (_IMAGES, "qwen2"),
    "whisper": ("an encoder of audio", "llama"),
    "xlstm": ("recurrent layers", "llama"),
    "zamba": (_SSM, "llama"),
}  # fmt: skip


def about(model_type: str, families: Sequence[str]) -> tuple[str, str]:
    """What is missing for a model ("" if that is not known), and the nearest of the families.

    Args:
      model_type: in lower case.
      families: the names that there are.
    """
    name = model_type.replace("-", "_")
    if parts := [part for part in _KNOWN if part in name]:
        return _KNOWN[max(parts, key=len)]

    def likeness(family: str) -> float:
        return difflib.SequenceMatcher(None, name, family).ratio()

    return "", max(families, key=likeness)
