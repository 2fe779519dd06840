"""Checks every family of models against transformers: imported, exported, and grown.

For each family, transformers makes a tiny model with random weights, gains and biases, and with
values in its config that are not the usual ones. Distances are the largest difference of two
logits, divided by their root mean square, over ragged sequences.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax import growth
from flm_jax.config import TransformerConfig
from flm_jax.errors import UserError
from flm_jax.interop import converter, opening, weights
from flm_jax.interop.families import FAMILIES
from flm_jax.interop.tokenizer_files import Vocabulary
from flm_jax.interop.verify import our_logits, relative_distance, torch_logits
from flm_jax.studies.check_operators import target_of

LARGEST = 1e-4  # distance that counts as the same model, in float32
RECIPES = ("msg", "tile", "identity")
COLUMNS = ("imported", "exported", *RECIPES)
_LENGTHS = (21, 9, 14)  # tokens of the ragged sequences
_VOCAB = 96

_SIZES: dict[str, Any] = {
    "vocab_size": _VOCAB, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 3e-4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def _rope(kind: str, theta: float, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **values}}


# What each family's model has. A family may have several models: they are told apart by a suffix.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu",
              **_rope("llama3", 700.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                      original_max_position_embeddings=16)},
    "llama, linear": {"tie_word_embeddings": True, **_rope("linear", 900.0, factor=2.5)},
    "llama, dynamic": {"max_position_embeddings": 12, **_rope("dynamic", 900.0, factor=3.0)},
    "llama, yarn": _rope("yarn", 900.0, factor=4.0, original_max_position_embeddings=12,
                         beta_fast=4.0, beta_slow=0.5),
    "mistral": {"sliding_window": 6, **_rope("default", 500.0)},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2,
              "tie_word_embeddings": True, "head_dim": 8, **_rope("yarn", 800.0, factor=2.0,
              original_max_position_embeddings=16)},
    "qwen3": {"attention_bias": True, "use_sliding_window": True, "sliding_window": 7,
              "max_window_layers": 1, **_rope("default", 600.0)},
    "olmo2": {"attention_bias": True, "head_dim": 8, **_rope("default", 400.0)},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1], "use_sliding_window": True, "sliding_window": 6,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention",
                                "full_attention"],
                "attention_bias": True, "mlp_bias": True, "head_dim": 8,
                "tie_word_embeddings": True, **_rope("default", 600.0)},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 3.0,
               "final_logit_softcapping": 5.0, "attention_bias": True, **_rope("default", 300.0)},
    "gemma3_text": {"sliding_window": 5, "query_pre_attn_scalar": 20,
                    "layer_types": ["sliding_attention", "sliding_attention", "full_attention",
                                    "sliding_attention"],
                    "rope_parameters": {
                        "full_attention": {"rope_type": "linear", "rope_theta": 900.0,
                                           "factor": 3.0},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 70.0}}},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.4,
                "attention_multiplier": 0.11, "attention_bias": True, "mlp_bias": True,
                "head_dim": 8, "tie_word_embeddings": True, **_rope("default", 600.0)},
}  # fmt: skip


def make(name: str, folder: pathlib.Path, seed: int = 0, **values: Any) -> None:
    """Writes a random model of a family, as transformers saves it.

    Args:
      name: a key of `MODELS`.
      folder: where to write.
      seed: of the weights.
      **values: further keys of its config.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    family = FAMILIES[name.split(",")[0]]
    settings = _SIZES | MODELS[name] | values
    config = transformers.AutoConfig.for_model(family.model_type, **settings)
    torch.manual_seed(seed)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
                parameter -= family.gain_offset
            else:
                parameter.normal_(0, 0.3 if parameter_name.endswith("bias") else 0.15)
    model.save_pretrained(folder)


def sequences(seed: int = 0) -> list[np.ndarray]:
    """Random sequences of different lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, _VOCAB, length) for length in _LENGTHS]


def _target(config: TransformerConfig, recipe: str) -> TransformerConfig:
    """A target of the recipe that transformers can hold: its heads divide its width.

    Under "msg", heads do not grow if a norm runs over all of them: such a model cannot be exported
    before its masks are at 1.
    """
    if recipe != "msg":
        return target_of(config, recipe)
    twice = 1 if config.qk_norm == "all" else 2
    big = dataclasses.replace(
        config, d_model=config.d_model * 3 // 2, d_ff=config.d_ff + 20,
        num_layers=config.num_layers + 1, num_heads=config.num_heads * twice,
        num_kv_heads=config.kv_heads * twice,
    )  # fmt: skip
    return growth.derived(config, big, recipe)


def check(name: str, seed: int = 0) -> dict[str, Any]:
    """Imports, exports and grows a random model of a family.

    Args:
      name: a key of `MODELS`.
      seed: of weights and tokens.

    Returns:
      A row of the table, as JSON values: distances to transformers' logits after the import, after
      the export, and of each grown model after its export. `ok`: all are at most `LARGEST`.
    """
    family = name.split(",")[0]
    rows = sequences(seed)
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "source"
        make(name, source, seed)
        want = torch_logits(source, rows)
        stored = opening.open_stored_model(str(source))
        config, params = stored.weights.config, weights.load(stored.weights)
        row: dict[str, Any] = {"name": name, "family": family}
        row["imported"] = relative_distance(want, our_logits(params, config, rows))

        def exported(params: Any, config: TransformerConfig, to: str) -> float:
            target = pathlib.Path(folder) / to
            tree = weights.Tree(params, config)
            vocabulary = Vocabulary(str(source))
            converter.write_hf(target, tree, family, "float32", vocabulary)
            return relative_distance(want, torch_logits(target, rows))

        row["exported"] = exported(params, config, "exported")
        for recipe in RECIPES:
            row[recipe] = exported(*_grown(params, config, recipe), recipe)
    row["ok"] = max(row[key] for key in COLUMNS) <= LARGEST
    return row


def _grown(
    params: Any, config: TransformerConfig, recipe: str
) -> tuple[dict[str, Any], TransformerConfig]:
    """Grows the parameters; masks are folded in at 0, where the growth starts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", growth.LockedCopiesWarning)
        plan = growth.plan(config, _target(config, recipe), recipe)
    grown = growth.grow(jax.tree.map(jnp.asarray, params), plan, jax.random.key(1))
    model: Any = plan.config
    if plan.masked:
        grown, model = growth.fold(grown, plan, 0.0)
    return jax.tree.map(np.asarray, grown), model


def chosen(family: str) -> list[str]:
    """The models of a family, or of all.

    Raises:
      UserError: the family is unknown.
    """
    names = [name for name in MODELS if family in ("all", name.split(",")[0])]
    if not names:
        known = dict.fromkeys(name.split(",")[0] for name in MODELS)
        raise UserError(f"family is {family!r}; choose all or one of {', '.join(known)}")
    return names


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, as in docs/interop.md."""
    lines = [f"| model | {' | '.join(COLUMNS)} |", "| --- |" + " --- |" * len(COLUMNS)]
    for row in rows:
        cells = " | ".join(f"{row[key]:.1e}" for key in COLUMNS)
        lines.append(f"| {row['name']} | {cells} |")
    return "\n".join(lines)
