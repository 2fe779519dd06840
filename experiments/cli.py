"""The front of every command: flags, one JSON object on request, mistakes as one clear line.

  python -m experiments.NAME --config=configs/FILE.py[:variant] --workdir=DIR [--config.field=value]

Exit status 0 on success, 2 on a user's mistake, 3 when a command's gate does not hold, 130 when a
signal stopped the run.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

from absl import flags, logging
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags, config_path

from flm_jax import config as config_lib
from flm_jax import mapping
from flm_jax.errors import RunStopped, UserError

T = TypeVar("T")

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
    return config_lib.experiment(plain(config))


def dataclass_of(cls: type[T], config: ConfigDict) -> T:
    """A config of another kind than an experiment, as a validated dataclass."""
    return mapping.from_mapping(cls, plain(config))


def plain(value: Any) -> Any:
    if isinstance(value, ConfigDict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def run(
    main: Callable[[Any], Mapping[str, Any]],
    *,
    needs_config: bool = True,
    needs_workdir: bool = False,
) -> Mapping[str, Any]:
    """Parses the command line, calls `main`, prints and returns its result.

    Args:
      main: gets the config (a locked ConfigDict), or the positional arguments as a list of
        strings if `needs_config` is False; returns what --json prints.
      needs_config, needs_workdir: which flags must be given.
    """
    logging.set_verbosity(logging.WARNING)
    with _mistakes_as_one_line():
        arguments = _parse(needs_config, needs_workdir)
        given = CONFIG.value if needs_config else arguments
        if not JSON.value:
            return main(given)
        with _only_on_stderr():
            result = main(given)
        print(json.dumps(result))
        return result


def _parse(needs_config: bool, needs_workdir: bool) -> list[str]:
    """Checks the command line; returns the positional arguments."""
    if {"--help", "-h", "-help", "--helpshort"} & set(sys.argv[1:]):
        print(sys.modules["__main__"].__doc__)
        print(flags.FLAGS.main_module_help() + flags.FLAGS.module_help(sys.modules[__name__]))
        sys.exit(0)
    given = list(_flags_given(sys.argv[1:]))
    files = [value for name, value in given if name == "config" and value]
    if needs_config:
        if not files:
            raise UserError("--config is missing; give --config=configs/FILE.py (see configs/)")
        config = _load(files[-1])
        for name, _ in given:
            if name.startswith("config."):
                _check_field(config, name)
    try:
        arguments = flags.FLAGS(sys.argv)[1:]
    except flags.IllegalFlagValueError as error:
        for name, value in given:
            if name.startswith("config.") and str(error).startswith(f"flag --{name}={value}:"):
                now = config_path.get_value(name.removeprefix("config."), config)
                wanted = type(now).__name__
                raise UserError(f"--{name}={value}: it must be {wanted}, as {now!r} is") from error
        raise UserError(str(error)) from error
    except flags.Error as error:
        raise UserError(str(error)) from error
    if needs_config and arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; options begin with --")
    if needs_workdir and not WORKDIR.value:
        raise UserError("--workdir is missing; give the run's folder, as --workdir=runs/NAME")
    return arguments


def _flags_given(arguments: list[str]) -> Iterator[tuple[str, str | None]]:
    """Name and value of `--name=value` and `--name value`; for a switch the value is no value."""
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if argument == "--":
            return
        if argument.startswith("-"):
            name, equals, value = argument.lstrip("-").partition("=")
            yield name, value if equals else following


def _load(given: str) -> ConfigDict:
    """The config before overrides. Any error in the file is one line that says where."""
    path = given.split(":")[0]
    if not pathlib.Path(path).is_file():
        raise UserError(f"--config={given}: no such file; see configs/")
    try:
        config = config_flags.ConfigFileFlagParser("config").parse(given)
    except Exception as error:
        # The parser wraps a ValueError or TypeError in one whose text is a traceback.
        cause = error.__context__ or error
        if isinstance(cause, UserError):
            raise cause from None
        frames = [f for f in traceback.extract_tb(cause.__traceback__) if f.filename == path]
        where = f"{path}:{frames[-1].lineno}" if frames else path
        raise UserError(f"{where}: {type(cause).__name__}: {cause}; mend the file") from cause
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config must return a ConfigDict, not {type(config).__name__}")
    return config


def _check_field(config: ConfigDict, flag: str) -> None:
    """Raises UserError if `flag`, as config.stages[0].steps, is not one value of the config."""
    try:
        parts = config_path.split(flag)[1:]
    except ValueError:
        raise UserError(f"--{flag}: not a field; write it as --config.stages[0].steps") from None
    node: Any = config
    where = "config"
    for part in parts:
        if isinstance(node, ConfigDict):
            if part not in node:
                close = difflib.get_close_matches(str(part), node, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(node)}"
                raise UserError(f"--{flag}: {where} has no field {part!r}; {hint}")
            where += f".{part}"
        elif isinstance(node, tuple):
            if part not in range(len(node)):
                raise UserError(f"--{flag}: {where} has entries 0 to {len(node) - 1}, no {part!r}")
            where += f"[{part}]"
        else:
            raise UserError(f"--{flag}: {where} is {node!r} and has no fields")
        node = node[part]
    if isinstance(node[0] if isinstance(node, tuple) and node else node, ConfigDict):
        raise UserError(f"--{flag}: {where} is a group; set its fields one by one")


@contextlib.contextmanager
def _only_on_stderr() -> Iterator[None]:
    """Sends what anyone prints to standard error, libraries written in C++ included."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def _mistakes_as_one_line() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        exit_with(2, str(error))
    except RunStopped as stopped:
        exit_with(130, str(stopped))
    except KeyboardInterrupt:
        exit_with(130, "stopped")


def exit_with(status: int, message: str) -> NoReturn:
    """Ends the command, with one line on standard error."""
    print(f"{pathlib.Path(sys.argv[0]).stem}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
