"""flm_jax: train a Tele-FLM-style decoder and grow it."""
