"""The front of every command: flags, one JSON object on request, mistakes as one clear line.

  python -m experiments.NAME --config=configs/FILE.py[:variant] --workdir=DIR [--config.field=value]

Exit status 0 on success, 2 on a user's mistake, 130 when a signal stopped the run.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from flm_jax import config as config_lib
from flm_jax.errors import RunStopped, UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment: configs/FILE.py, or configs/FILE.py:variant.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object on standard output.")


def json_wanted() -> bool:
    """Whether standard output is for the JSON object alone."""
    return bool(JSON.value)


def workdir() -> str:
    """The value of --workdir."""
    return str(WORKDIR.value)


def experiment(config: ConfigDict) -> config_lib.ExperimentConfig:
    """The config as a validated dataclass."""

    def plain(value: Any) -> Any:
        if isinstance(value, ConfigDict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    return config_lib.experiment(plain(config))


def run(
    main: Callable[[Any], Mapping[str, Any] | None],
    *,
    needs_config: bool = True,
    needs_workdir: bool = False,
) -> None:
    """Parses the command line, calls `main`, prints its result, and exits.

    Args:
      main: gets the config (a locked ConfigDict), or the positional arguments as a list of
        strings if `needs_config` is False; returns what --json prints.
      needs_config, needs_workdir: which flags must be given.
    """
    logging.set_verbosity(logging.WARNING)
    with _mistakes_as_one_line():
        arguments = _parse(needs_config, needs_workdir)
        # Libraries that print go to standard error while the result is being made.
        stdout = sys.stdout
        with contextlib.redirect_stdout(sys.stderr) if JSON.value else contextlib.nullcontext():
            result = main(CONFIG.value if needs_config else arguments)
        if JSON.value:
            print(json.dumps(result), file=stdout)


def _parse(needs_config: bool, needs_workdir: bool) -> list[str]:
    if {"--help", "-h", "-help", "--helpshort"} & set(sys.argv[1:]):
        print(sys.modules["__main__"].__doc__)
        print(flags.FLAGS.main_module_help() + flags.FLAGS.module_help(sys.modules[__name__]))
        sys.exit(0)
    chosen = [a.split("=", 1)[1] for a in sys.argv[1:] if a.startswith("--config=")]
    if needs_config and not chosen:
        raise UserError("--config is missing; give --config=configs/FILE.py (see configs/)")
    for path in chosen:
        if not pathlib.Path(path.split(":")[0]).is_file():
            raise UserError(f"--config={path}: no such file; see configs/")
    try:
        arguments = flags.FLAGS(sys.argv)[1:]
        if needs_config:
            CONFIG.value  # noqa: B018  (the file is read, and overridden, on first use)
    except UserError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(_translated(error)) from error
    if needs_config and arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; options begin with --")
    if needs_workdir and not WORKDIR.value:
        raise UserError("--workdir is missing; give the run's folder, as --workdir=runs/NAME")
    return arguments


def _translated(error: Exception) -> str:
    """What ml_collections and absl say of a wrong flag, as one line that names the flag."""
    said = str(error.args[0] if error.args else error).replace("\\n", " ").replace("\\'", "'")
    if own := re.search(r"UserError: (.*)", said):  # a config file's own error, as text
        return own.group(1)
    overrides = [a.lstrip("-") for a in sys.argv[1:] if a.startswith("--config.")]
    field = re.compile(r"\b(\w+)(?:\[\d+\])?=")
    named = [o for o in overrides if (m := field.search(o)) and m.group(1) in said]
    flag = "--" + (named or overrides or ["config"])[0]
    if isinstance(error, IndexError):
        return f"{flag}: {said}; the config has fewer entries"
    if isinstance(error, (KeyError, AttributeError)):
        return f"{flag}: the config has no such field: {said}"
    if isinstance(error, flags.Error) and not overrides:
        return said
    return f"{flag}: {said}; give a value of the type that the config file has"


@contextlib.contextmanager
def _mistakes_as_one_line() -> Any:
    try:
        yield
    except UserError as error:
        _exit(2, str(error))
    except RunStopped as stopped:
        _exit(130, str(stopped))


def _exit(status: int, message: str) -> NoReturn:
    print(f"{pathlib.Path(sys.argv[0]).stem}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
