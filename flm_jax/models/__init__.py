"""The decoder. The only place that imports flax.linen."""

from flm_jax.models.cache import Cache, by_layer
from flm_jax.models.transformer import Transformer

__all__ = ["Cache", "Transformer", "by_layer"]
