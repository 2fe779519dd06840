"""RoPE in a config.json: read from the keys of transformers 4 and 5, written for both.

transformers 4 has `rope_theta`, `rope_scaling`, `partial_rotary_factor` and, for Gemma 3,
`rope_local_base_freq`. transformers 5 has all in `rope_parameters`, which is one object, or one for
each kind of layer. Where both are present, transformers 5.24 decides: `rope_scaling` wins, and
`rope_theta` counts only where the object has none.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from flm_jax.config import RopeConfig, TransformerConfig
from flm_jax.errors import UserError
from flm_jax.interop.config_keys import Keys

_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")  # the same names as in transformers
FULL, SLIDING = "full_attention", "sliding_attention"
_ORIGINAL = "original_max_position_embeddings"


def read(keys: Keys, by_layer: bool) -> tuple[float, RopeConfig]:
    """Reads theta and the scaling.

    Args:
      keys: of the config.json.
      by_layer: whether the family's sliding layers have a RoPE of their own (Gemma 3).

    Raises:
      UserError: a type that this decoder does not have, or a wrong value.
    """
    if by_layer:
        return _read_by_layer(keys)
    about = keys.group("rope_scaling") or keys.group("rope_parameters") or Keys({}, keys.path)
    if nested := {FULL, SLIDING} & set(about.values):
        raise UserError(
            f"{about.path} has {min(nested)}, but this family has one RoPE for all layers; give "
            "its settings alone"
        )
    return _scaling(keys, about, keys.get(_ORIGINAL))


def _read_by_layer(keys: Keys) -> tuple[float, RopeConfig]:
    """Reads the RoPE of full layers, and that of sliding layers, which is the same or unscaled."""
    both = keys.group("rope_parameters") or Keys({}, keys.path)
    if both.values and not {FULL, SLIDING} & set(both.values):
        raise UserError(
            f"{both.path} has neither {FULL} nor {SLIDING}, where this family's settings are; put "
            "them there"
        )
    groups = (both.group(FULL), keys.group("rope_scaling"))
    merged = {key: value for group in groups if group for key, value in group.values.items()}
    theta, rope = _scaling(keys, Keys(merged, keys.path))
    sliding = both.group(SLIDING) or Keys({}, keys.path)
    local, scaling = _scaling(keys, sliding, theta_key="rope_local_base_freq")
    if scaling == rope and local == theta:
        return theta, rope
    if scaling != RopeConfig():
        raise UserError(
            f"{sliding.path}: type {scaling.kind!r} in sliding layers, and this decoder scales "
            "only full ones; the model cannot be imported"
        )
    return theta, dataclasses.replace(rope, local_theta=local)


def _scaling(
    keys: Keys, about: Keys, original: Any = None, theta_key: str = "rope_theta"
) -> tuple[float, RopeConfig]:
    """Reads one object of RoPE settings.

    Args:
      keys: of the config.json, for what the object lacks.
      about: the object.
      original: the context before the scaling, which has priority over the object's.
      theta_key: key of theta in the config.json.
    """
    kind = about.get("rope_type", about.get("type", "default"))
    if kind not in _KINDS:
        raise UserError(
            f"{about.path}: RoPE is of type {kind!r}, and this decoder has {', '.join(_KINDS)}; "
            "the model cannot be imported"
        )
    own_theta = about.get("rope_theta") is not None
    theta = about.positive("rope_theta") if own_theta else keys.positive(theta_key)
    for group in (about, keys):
        if group.number("partial_rotary_factor", 1.0) != 1:
            raise UserError(
                f"{group.path}: partial_rotary_factor is {group.get('partial_rotary_factor')}, and "
                "transformers rotates whole heads in this family; the model cannot be imported"
            )
    values: dict[str, Any] = {"kind": kind}
    if kind == "dynamic":
        values["original_length"] = keys.size("max_position_embeddings")
    if kind in ("yarn", "llama3"):
        if original is None:
            original = about.get(_ORIGINAL, keys.get("max_position_embeddings"))
        values["original_length"] = Keys({_ORIGINAL: original}, about.path).size(_ORIGINAL)
    if kind == "yarn" and about.get("factor") is None and "factor" in about.values:
        # A factor of null, as in DeepSeek's configs: the ratio of the two contexts.
        values["factor"] = keys.size("max_position_embeddings") / values["original_length"]
    elif kind != "default":
        values["factor"] = about.number("factor")
    if kind == "llama3":
        values["low_frequency"] = about.positive("low_freq_factor")
        values["high_frequency"] = about.positive("high_freq_factor")
    if kind == "yarn":
        values["beta_fast"] = about.positive("beta_fast", 32.0)
        values["beta_slow"] = about.positive("beta_slow", 1.0)
        values["truncate"] = about.flag("truncate", True)
        values["attention_factor"] = _yarn_attention(about, values["factor"])
    return theta, RopeConfig(**values)


def _yarn_attention(about: Keys, factor: float) -> float:
    """YaRN's factor on cosine and sine, by the rules of transformers."""
    if about.get("attention_factor") is not None:
        return about.positive("attention_factor")

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    if about.get("mscale") and about.get("mscale_all_dim"):
        return magnitude(about.number("mscale")) / magnitude(about.number("mscale_all_dim"))
    return magnitude(1.0)


def write(config: TransformerConfig, by_layer: bool) -> dict[str, Any]:
    """The RoPE keys of a config.json, as transformers 4 and 5 have them.

    Args:
      config: the model.
      by_layer: whether the family's sliding layers have a RoPE of their own (Gemma 3).
    """
    rope = config.rope
    about: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": config.rope_theta}
    if rope.kind != "default":
        about["factor"] = rope.factor
    if rope.kind in ("yarn", "llama3"):
        about["original_max_position_embeddings"] = rope.original_length
    if rope.kind == "llama3":
        about |= {"low_freq_factor": rope.low_frequency, "high_freq_factor": rope.high_frequency}
    if rope.kind == "yarn":
        about |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        about["attention_factor"] = rope.attention_factor or 0.1 * math.log(rope.factor) + 1
        if not rope.truncate:
            about["truncate"] = False
    values: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_parameters": about}
    if rope.kind != "default":
        values["rope_scaling"] = {k: v for k, v in about.items() if k != "rope_theta"}
    if rope.kind == "dynamic":  # transformers has the original context in this key alone
        values["max_position_embeddings"] = rope.original_length
    if by_layer:
        local = about
        if rope.local_theta:
            local = {"rope_type": "default", "rope_theta": rope.local_theta}
            values["rope_local_base_freq"] = rope.local_theta
        values["rope_parameters"] = {FULL: about, SLIDING: local}
    return values
