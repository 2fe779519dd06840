"""Helpers of config files, under the name that older config files import."""

from flm_jax.commands.config_files import no_variant, single, to_config_dict, unknown_variant

__all__ = ["no_variant", "single", "to_config_dict", "unknown_variant"]
