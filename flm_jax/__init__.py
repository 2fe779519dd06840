"""flm_jax: train a Tele-FLM-style decoder, and grow it while it trains."""

from flm_jax.config import TransformerConfig
from flm_jax.models import Transformer

__all__ = ["Transformer", "TransformerConfig"]
