"""Next-token cross-entropy."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sum of weighted negative log-likelihoods in nats, and the sum of the weights.

    Both in the logits' dtype, so that sums over microbatches and devices add up exactly as one.
    """
    weights_BT = weights_BT.astype(logits_BTV.dtype)
    log_normaliser_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum((log_normaliser_BT - target_BT) * weights_BT), jnp.sum(weights_BT)
