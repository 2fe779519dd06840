"""Parameters, FLOPs and bytes of a model, from its config alone; nothing is allocated."""

from __future__ import annotations

from typing import Any

from flm_jax.config import TransformerConfig
from flm_jax.params import axes
from flm_jax.params.axes import Role

MASTER_BYTES = 4  # float32 master weights
MOMENTS_BYTES = 2 * 4  # Adam's two moments, float32


def params(config: TransformerConfig) -> int:
    """Number of parameters.

    >>> params(TransformerConfig(
    ...     vocab_size=10, num_layers=1, d_model=4, num_heads=2, head_dim=2, d_ff=8))
    252
    """
    return sum(axes.param_sizes(config).values())


def params_by_component(config: TransformerConfig) -> dict[str, int]:
    """Number of parameters of embedding, attention, mlp, norms and head.

    >>> params_by_component(TransformerConfig(
    ...     vocab_size=10, num_layers=1, d_model=4, num_heads=2, head_dim=2, d_ff=8))
    {'embedding': 40, 'attention': 64, 'mlp': 96, 'norms': 12, 'head': 40}
    """
    counted = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head"), 0)
    for path, size in axes.param_sizes(config).items():
        is_gain = Role.GAIN in axes.table(config)[path].roles
        component = "norms" if is_gain else path.removeprefix("layers/").split("/")[0]
        counted[component] += size
    return counted


def flops_per_token_forward(config: TransformerConfig, length: int) -> int:
    """FLOPs of the forward pass per token (PaLM's convention, arXiv 2204.02311, appendix B).

    A multiply-add counts 2. Counted are matrix products, and attention scores and values over all
    `length` tokens, masked or not, in a window or not. The embedding is a lookup and counts 0;
    biases are not counted.

    Args:
      config: the model.
      length: tokens in a sequence.

    >>> flops_per_token_forward(TransformerConfig(
    ...     vocab_size=10, num_layers=1, d_model=4, num_heads=2, head_dim=2, d_ff=8), length=16)
    656
    """
    table, sizes = axes.table(config), axes.param_sizes(config)
    matrices = sum(size for path, size in sizes.items() if table[path].reads() & axes.WIDTHS)
    if config.tied:
        matrices += sizes["embedding"]
    attention = 4 * config.num_layers * length * config.num_heads * config.head_dim
    return 2 * matrices + attention


def flops_per_token_train(config: TransformerConfig, length: int) -> int:
    """FLOPs of the forward and backward pass per token, without recomputation.

    The backward pass counts twice the forward pass. `length`: tokens in a sequence.
    """
    return 3 * flops_per_token_forward(config, length)


def describe(config: TransformerConfig, length: int) -> dict[str, Any]:
    """All counts of this module, for sequences of `length` tokens."""
    total = params(config)
    return {
        "params": total,
        "params_by_component": params_by_component(config),
        "flops_per_token_forward": flops_per_token_forward(config, length),
        "flops_per_token_train": flops_per_token_train(config, length),
        "param_bytes": MASTER_BYTES * total,
        "optimizer_bytes": MOMENTS_BYTES * total,
    }
