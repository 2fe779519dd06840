"""The optional parts of the installation: which extra of setup.py installs a missing package.

`pip install flm_jax` brings what growth of parameter trees needs. Everything else is an extra.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

from flm_jax.errors import UserError

# Name of the imported package -> the extra that installs it.
OF_PACKAGE = {
    **dict.fromkeys(
        (
            "clu", "datasketch", "etils", "filelock", "fsspec", "matplotlib", "orbax", "pyarrow",
            "sentencepiece", "seqio", "sklearn", "tensorboard", "tensorflow",
            "tensorflow_datasets", "tensorflow_text", "tensorstore", "tokenizers",
        ),
        "train",
    ),
    **dict.fromkeys(("accelerate", "lm_eval", "torch", "transformers"), "hf"),
    "gcsfs": "gcs",
    "gguf": "gguf",
    "kubernetes": "k8s",
    "libtpu": "tpu",
    "s3fs": "s3",
}  # fmt: skip


def pip(extra: str) -> str:
    """Returns the command that installs an extra.

    >>> pip("train")
    "pip install 'flm_jax[train]'"
    """
    return f"pip install 'flm_jax[{extra}]'"


@contextlib.contextmanager
def named(purpose: str = "", instead: str = "") -> Iterator[None]:
    """Turns the failed import of a package of an extra into one line with the pip command.

    Args:
      purpose: what the package is for; comes first in the line.
      instead: what else may be done; comes last.

    Raises:
      UserError: the block imports a package of an extra that is not installed. Any other failed
        import is raised as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in OF_PACKAGE:
            raise
        raise UserError(_line(package, purpose, instead)) from error


def require(*packages: str, purpose: str = "", instead: str = "") -> None:
    """Raises UserError, as `named`, for the first package that is not installed; imports none."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(_line(package, purpose, instead))


def _line(package: str, purpose: str, instead: str) -> str:
    before = f"{purpose} needs the package" if purpose else "this needs the package"
    after = f", or {instead}" if instead else ""
    return f"{before} {package}, which is not installed; {pip(OF_PACKAGE[package])}{after}"
