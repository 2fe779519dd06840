"""How scales follow the model's size: initial scale, learning rate, decay, Adam's eps, multipliers.

With m = d_model / base width, by the rules of Tensor Programs V (arXiv 2203.03466, table 3, Adam)
as Tele-FLM uses them (arXiv 2404.16645, table 4). "sp" is the standard parametrisation, for
comparison: entries are scaled to their fan-in, and everything else is the same at every width. Both
agree at m = 1.

    kind      example          µP: std     rate   decay   output        SP: std     rate, decay
    matrix    query, down      s / sqrt m  1 / m  m                     s / sqrt m  1
    vector    embedding, gain  s           1      1                     s           1
    readout   head             s           1      1       output / m    s / sqrt m  1

Decoupled decay acts through the learning rate: the factor m keeps it equally fast at every width.
Attention needs no factor, because the head size is fixed.

"completep" (CompleteP, arXiv 2505.01618, table 1 with alpha = 1) is µP with two more rules. With
n = num_layers / base depth, every layer adds its branches (attention and MLP) divided by n, so that
their sum stays equally large at every depth. Gradients of a layer's parameters then fall as
1 / (m n), those of the others as 1 / m, and Adam's eps falls with them. Learning rates need no
factor for the depth: theirs is n^(alpha - 1).

    parameters of          branch output   eps
    a layer                1 / n           1 / (m n)
    the rest of the model                  1 / m
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from flm_jax.config import OptimizerConfig, StageConfig, TransformerConfig
from flm_jax.params import axes
from flm_jax.params.axes import ModelSpec, Param, Role, Scale


def init_std(param: Param, config: TransformerConfig) -> float:
    """Standard deviation of a parameter's initial entries: 0 for gains, at 1, and biases, at 0.

    >>> up = Param(("embed", "mlp"), (Role.IN, Role.OUT))
    >>> wide = TransformerConfig(
    ...     vocab_size=10, num_layers=1, d_model=64, num_heads=4, head_dim=16, d_ff=128,
    ...     mup_base_width=16, matrix_init_std=0.1)
    >>> init_std(up, wide)  # 0.1 / sqrt(64 / 16)
    0.05
    """
    if Role.GAIN in param.roles or param.bias:
        return 0.0
    fan_in = math.sqrt(config.width_mult)
    if not param.matrix_like:
        scaled = param.kind == "readout" and config.parametrisation == "sp"
        return config.vector_init_std / (fan_in if scaled else 1)
    std = config.matrix_init_std / fan_in
    if config.depth_scaled_init and param.residual_writer:
        std /= math.sqrt(2 * max(config.num_layers, 1))
    return std


def _matrix_mult(param: Param, config: TransformerConfig) -> float:
    """m for matrix-like parameters under µP and CompleteP, else 1."""
    follows = config.parametrisation != "sp"
    return config.width_mult if follows and param.matrix_like else 1.0


def learning_rate_mult(param: Param, config: TransformerConfig) -> float:
    """Factor on a parameter's learning rate: 1/m for matrix-like ones (under "sp" 1), else 1.

    >>> up, gain = Param(("embed", "mlp"), (Role.IN, Role.OUT)), Param(("embed",), (Role.GAIN,))
    >>> wide = TransformerConfig(
    ...     vocab_size=10, num_layers=1, d_model=64, num_heads=4, head_dim=16, d_ff=128,
    ...     mup_base_width=16, matrix_init_std=0.1)
    >>> learning_rate_mult(up, wide), learning_rate_mult(gain, wide)
    (0.25, 1.0)
    """
    return 1 / _matrix_mult(param, config)


def decay_mult(param: Param, config: TransformerConfig) -> float:
    """Factor on a parameter's decay: m for matrices (under "sp" 1), 0 for gains and biases, else 1.

    >>> up, gain = Param(("embed", "mlp"), (Role.IN, Role.OUT)), Param(("embed",), (Role.GAIN,))
    >>> wide = TransformerConfig(
    ...     vocab_size=10, num_layers=1, d_model=64, num_heads=4, head_dim=16, d_ff=128,
    ...     mup_base_width=16, matrix_init_std=0.1)
    >>> decay_mult(up, wide), decay_mult(gain, wide)
    (4.0, 0.0)
    """
    if Role.GAIN in param.roles or param.bias:
        return 0.0
    return _matrix_mult(param, config)


def multiplier(param: Param, config: TransformerConfig) -> float:
    """Factor that the model applies to a parameter's output.

    The last norm before a tied head ("tied") has what a head's multiplier is over the embedding's:
    if a growth changes either, only this norm can compensate for the head.
    """
    return {
        "": 1.0,
        "input": config.input_mult,
        "output": config.logit_mult,
        "tied": config.logit_mult / config.input_mult,
        "residual": config.branch_mult,
    }[param.multiplier]


def eps_mult(param: Param, config: TransformerConfig) -> float:
    """Factor on Adam's eps: 1 / m under CompleteP, 1 / (m n) for a layer's parameters; else 1.

    >>> up, gain = Param.of("layers:stack embed:in mlp:out"), Param.of("embed:gain")
    >>> deep = TransformerConfig(
    ...     vocab_size=10, num_layers=8, d_model=64, num_heads=4, head_dim=16, d_ff=128,
    ...     parametrisation="completep", mup_base_width=32, mup_base_depth=2)
    >>> eps_mult(up, deep), eps_mult(gain, deep)
    (0.125, 0.5)
    """
    if config.parametrisation != "completep":
        return 1.0
    return 1 / (config.width_mult * (config.depth_mult if param.stacked else 1))


def scale(param: Param, config: TransformerConfig) -> Scale:
    """All of these numbers for one of the decoder's parameters, at this config's size."""
    return Scale(
        std=init_std(param, config),
        start=1.0 if Role.GAIN in param.roles else 0.0,
        rate=learning_rate_mult(param, config),
        decay=decay_mult(param, config),
        multiplier=multiplier(param, config),
        eps=eps_mult(param, config),
    )


@functools.lru_cache
def spec(config: TransformerConfig) -> ModelSpec:
    """The decoder's table, sizes and scales, as growth and the optimizer use them."""
    table = axes.table(config)
    return ModelSpec(
        table=table,
        sizes=axes.axis_sizes(config),
        scales={path: scale(param, config) for path, param in table.items()},
        norm_eps=config.rms_norm_eps,
    )


def summary(stage: StageConfig, settings: OptimizerConfig) -> dict[str, dict[str, Any]]:
    """Summarises µP for a stage, at the base size and at the stage's own size.

    Args:
      stage: gives the model and the peak learning rates.
      settings: gives the weight decay and Adam's eps.

    Returns:
      For each parameter: its kind, and its initial std, learning rate, weight decay, multiplier and
      Adam's eps at both sizes ("base" and "target").
    """
    target = stage.model
    base = dataclasses.replace(
        target,
        d_model=target.mup_base_width or target.d_model,
        num_layers=target.mup_base_depth or target.num_layers,
    )

    def at(param: Param, config: TransformerConfig) -> dict[str, float]:
        rate = stage.matrix_learning_rate if param.matrix_like else stage.learning_rate
        numbers = scale(param, config)
        return {
            "init_std": numbers.std,
            "learning_rate": rate * numbers.rate,
            "weight_decay": settings.weight_decay * numbers.decay,
            "multiplier": numbers.multiplier,
            "eps": settings.eps * numbers.eps,
        }

    return {
        path: {"kind": param.kind, "base": at(param, base), "target": at(param, target)}
        for path, param in axes.table(target).items()
    }
