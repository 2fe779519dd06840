"""flm_jax: train a Tele-FLM-style decoder in JAX, and grow it while it trains.

The names below are the public API. Each is loaded when it is first used, so that `import flm_jax`
is quick and loads neither JAX nor TensorFlow nor orbax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flm_jax import extras
from flm_jax.version import __version__

if TYPE_CHECKING:
    from flm_jax import growth, interop
    from flm_jax.config import OptimizerConfig, StageConfig, TransformerConfig
    from flm_jax.errors import UserError
    from flm_jax.growth import Plan, grow, plan
    from flm_jax.inference.generation import generate
    from flm_jax.interop import load_hf, save_hf
    from flm_jax.interop.opening import open_model
    from flm_jax.models import Transformer
    from flm_jax.params.axes import ModelSpec, Param, Role, Scale
    from flm_jax.runs.chain import run
    from flm_jax.train.optim import optimizer
    from flm_jax.train.train_step import TrainState, init_state, make_train_step

# Name -> the module that defines it; "": the name is itself a package.
_HOMES = {
    "growth": "",
    "interop": "",
    "OptimizerConfig": "config",
    "StageConfig": "config",
    "TransformerConfig": "config",
    "UserError": "errors",
    "Plan": "growth",
    "grow": "growth",
    "plan": "growth",
    "generate": "inference.generation",
    "load_hf": "interop",
    "save_hf": "interop",
    "open_model": "interop.opening",
    "Transformer": "models",
    "ModelSpec": "params.axes",
    "Param": "params.axes",
    "Role": "params.axes",
    "Scale": "params.axes",
    "run": "runs.chain",
    "optimizer": "train.optim",
    "TrainState": "train.train_step",
    "init_state": "train.train_step",
    "make_train_step": "train.train_step",
}

__all__ = [
    "ModelSpec",
    "OptimizerConfig",
    "Param",
    "Plan",
    "Role",
    "Scale",
    "StageConfig",
    "TrainState",
    "Transformer",
    "TransformerConfig",
    "UserError",
    "__version__",
    "generate",
    "grow",
    "growth",
    "init_state",
    "interop",
    "load_hf",
    "make_train_step",
    "open_model",
    "optimizer",
    "plan",
    "run",
    "save_hf",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flm_jax' has no attribute {name!r}")
    home = _HOMES[name]
    with extras.named(f"flm_jax.{name}"):
        module = importlib.import_module(f"flm_jax.{home or name}")
    if not home:
        return module
    value = getattr(module, name)
    globals()[name] = value  # __getattr__ is not called for it again
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
