"""The user's own tracker of experiments: a function that `ExperimentConfig.tracker` names.

It returns a clu MetricWriter, which receives what TensorBoard receives. So W&B, MLflow or Aim are
used without being dependencies; docs/experiments.md has examples.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from flm_jax.config import ExperimentConfig
from flm_jax.errors import UserError

# (run folder, config) -> clu.metric_writers.MetricWriter
Tracker = Callable[[pathlib.Path, ExperimentConfig], Any]


def find(name: str) -> Tracker:
    """Imports a tracker; modules in the working directory are found too.

    It is the user's own code, and runs with all rights of this process.

    Args:
      name: "package.module:function".

    Raises:
      UserError: it cannot be imported, or is no function.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise UserError(f"config.tracker is {name!r}; give package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # an installed command does not have it
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:
        raise UserError(
            f"config.tracker is {name!r}, which cannot be imported ({type(error).__name__}: "
            f"{error}); fix the module, or install what it needs"
        ) from error
    if not callable(found):
        raise UserError(f"config.tracker is {name!r}, which is no function; name a function")
    tracker: Tracker = found
    return tracker


def open_writer(name: str, folder: pathlib.Path, config: ExperimentConfig) -> Any:
    """Calls a tracker; returns its writer.

    Args:
      name: see `find`.
      folder: the run's folder.
      config: the run's config.

    Raises:
      UserError: it cannot be imported, it fails, or it returns no MetricWriter.
    """
    from clu.metric_writers import MetricWriter  # loads TensorFlow

    tracker = find(name)
    try:
        writer = tracker(folder, config)
    except Exception as error:
        raise UserError(
            f"config.tracker: {name} failed ({type(error).__name__}: {error}); fix it, or run "
            "without a tracker"
        ) from error
    if not isinstance(writer, MetricWriter):
        raise UserError(
            f"config.tracker: {name} returned {type(writer).__name__}; return a "
            "clu.metric_writers.MetricWriter"
        )
    return writer
