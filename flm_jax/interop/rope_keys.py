"""RoPE in a config.json: read from the keys of transformers 4 and 5, written for both.

transformers 4 has `rope_theta`, `rope_scaling`, `partial_rotary_factor` and, for Gemma 3,
`rope_local_base_freq`. transformers 5 has all in `rope_parameters`, which is one object, or one for
each kind of layer. Where both are present, `rope_parameters` wins, as in transformers 5.
"""

from __future__ import annotations

import math
from typing import Any

from flm_jax.config import RopeConfig, TransformerConfig
from flm_jax.errors import UserError
from flm_jax.interop.config_keys import Keys

# The types of transformers, and older names for them.
_KINDS = {"default": "default", "linear": "linear", "dynamic": "dynamic", "yarn": "yarn",
          "llama3": "llama3"}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"


def read(keys: Keys, by_layer: bool) -> tuple[float, RopeConfig]:
    """Reads theta and the scaling.

    Args:
      keys: of the config.json.
      by_layer: whether the family's sliding layers have a RoPE of their own (Gemma 3).

    Raises:
      UserError: a type that this decoder does not have, or a wrong value.
    """
    group = keys.group("rope_parameters")
    if group is not None and (group.group(FULL) or group.group(SLIDING)):
        full, sliding = group.group(FULL), group.group(SLIDING)
        if full is None:  # no full layer uses it
            full = Keys({"rope_theta": keys.get("rope_theta")}, keys.path)
        theta, rope = _scaling(keys, full)
        if sliding is None:
            return theta, rope
        return theta, _with_local(theta, rope, *_scaling(keys, sliding), sliding.path)
    theta, rope = _scaling(keys, group or keys.group("rope_scaling") or Keys({}, keys.path))
    if by_layer:
        local = keys.positive("rope_local_base_freq")
        rope = _with_local(theta, rope, local, RopeConfig(), keys.path)
    return theta, rope


def _with_local(
    theta: float, rope: RopeConfig, local: float, scaling: RopeConfig, path: str
) -> RopeConfig:
    """Adds the RoPE of sliding layers, which is the same or unscaled."""
    if scaling == rope and local == theta:
        return rope
    if scaling != RopeConfig():
        raise UserError(
            f"{path}: type {scaling.kind!r} in sliding layers, and this decoder scales only full "
            "ones; the model cannot be imported"
        )
    values = {name: getattr(rope, name) for name in RopeConfig.__dataclass_fields__}
    return RopeConfig(**values | {"local_theta": local})


def _scaling(keys: Keys, about: Keys) -> tuple[float, RopeConfig]:
    """Reads one object of RoPE settings; what it lacks is at the top of the file."""
    kind = about.get("rope_type", about.get("type", "default"))
    if kind not in _KINDS:
        raise UserError(
            f"{about.path}: RoPE is of type {kind!r}, and this decoder has {', '.join(_KINDS)}; "
            "the model cannot be imported"
        )
    theta = about.positive("rope_theta", keys.positive("rope_theta"))
    values: dict[str, Any] = {"kind": kind}
    fraction = keys.number("partial_rotary_factor", 1.0)
    values["fraction"] = about.number("partial_rotary_factor", fraction)
    if kind != "default":
        values["factor"] = about.number("factor")
    if kind == "dynamic":
        values["original_length"] = keys.size("max_position_embeddings")
    if kind in ("yarn", "llama3"):
        original = keys.get("original_max_position_embeddings", keys.get("max_position_embeddings"))
        values["original_length"] = about.size("original_max_position_embeddings", original)
    if kind == "llama3":
        values["low_frequency"] = about.positive("low_freq_factor")
        values["high_frequency"] = about.positive("high_freq_factor")
    if kind == "yarn":
        values["beta_fast"] = about.positive("beta_fast", 32.0)
        values["beta_slow"] = about.positive("beta_slow", 1.0)
        values["truncate"] = about.flag("truncate", True)
        values["attention_factor"] = _yarn_attention(about)
    return theta, RopeConfig(**values)


def _yarn_attention(about: Keys) -> float:
    """YaRN's factor on cosine and sine, by the rules of transformers."""
    if about.get("attention_factor") is not None:
        return about.positive("attention_factor")
    factor, scale = about.number("factor"), about.get("mscale")
    over_all = about.get("mscale_all_dim")

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    if scale and over_all:
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
    if rope.fraction != 1:
        about["partial_rotary_factor"] = rope.fraction
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
    if rope.fraction != 1:
        values["partial_rotary_factor"] = rope.fraction
    if rope.kind == "dynamic":  # transformers has the original context in this key alone
        values["max_position_embeddings"] = rope.original_length
    if by_layer:
        local = about
        if rope.local_theta:
            local = {"rope_type": "default", "rope_theta": rope.local_theta}
            values["rope_local_base_freq"] = rope.local_theta
        values["rope_parameters"] = {FULL: about, SLIDING: local}
    return values
