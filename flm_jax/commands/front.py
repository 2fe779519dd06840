"""The front of `flm`: finds a command, calls it, prints one JSON object or one line of error.

Exit statuses are those of `flm_jax.errors.Exit`; a command whose gate does not hold has its own.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from flm_jax import extras
from flm_jax.data import json_text
from flm_jax.errors import Exit, RunStopped, UserError
from flm_jax.runtime.stop import Guard
from flm_jax.version import __version__

# In the order of --help. "growth check" is flm_jax/commands/growth/check.py.
COMMANDS = (
    "train", "branch", "extend", "sweep", "doctor", "sft",
    "growth check", "growth fuzz", "growth checkpoint", "growth probe", "growth draw",
    "mup check", "mup sweep", "mup growth", "mup predict",
    "generate", "evaluate", "compare", "harness", "reported",
    "inspect", "describe", "forecast", "preflight", "convert", "families", "vocabulary",
    "samples make", "samples select", "less_is_more", "study", "plan",
    "benchmark step", "benchmark generate",
)  # fmt: skip
OLD_NAMES = {"compile": "preflight"}
GROUPS = tuple(dict.fromkeys(name.split()[0] for name in COMMANDS if " " in name))
HELP = frozenset({"--help", "-h", "-help", "--helpshort"})


def main(*words: str) -> None:
    """Runs `flm WORDS...` with the process's arguments, and exits."""
    with Guard("flm"):
        status = run([*words, *sys.argv[1:]])
    sys.exit(status)


def run(argv: Sequence[str]) -> int:
    """Runs one command line, as ["growth", "check", "--list"]; returns the exit status.

    Results are printed on standard output, everything else on standard error.
    """
    name = ""
    try:
        if argv and argv[0] == "--version":
            print(f"flm {__version__}")
            return 0
        if argv and argv[0] in HELP:
            print(_overview())
            return 0
        if len(argv) > 1 and argv[0] in GROUPS and argv[1] in HELP:
            print(_summary(argv[0]), *_listed(f"{argv[0]} "), sep="\n")
            return 0
        argv = [OLD_NAMES.get(argv[0], argv[0]), *argv[1:]] if argv else argv
        name = _name(argv)
        with extras.named():
            return _run_command(name, argv[len(name.split()) :])
    except (UserError, RunStopped) as error:
        return _failed(name, error.status, str(error))
    except KeyboardInterrupt:
        return _failed(name, Exit.INTERRUPTED, "stopped")


def _run_command(name: str, argv: Sequence[str]) -> int:
    # Imported here because it loads ml_collections and rich: `flm --help` and the error for a
    # wrong name stay quick.
    from flm_jax.commands.command import Command

    module = importlib.import_module(f"flm_jax.commands.{name.replace(' ', '.')}")
    command: Command[Any] = module.COMMAND
    if HELP & set(argv):
        print(f"{module.__doc__}\nFlags:\n{command.help(name)}")
        return 0
    logging.set_verbosity(logging.WARNING)
    call = command.parse(name, argv)
    try:
        with _only_on_stderr() if call.json else contextlib.nullcontext():
            result = command.main(call)
    except UserError as error:
        return _failed(name, error.status, command.line(error))
    if call.json:
        print(json_text.dump(result))
    if command.gate and (failure := command.gate.failure(result)):
        return _failed(name, command.gate.status, failure)
    return 0


def _name(argv: Sequence[str]) -> str:
    """Returns the command's name: the first word, or the first two."""
    if not argv:
        raise UserError("give a command; flm --help lists them")
    first, second = argv[0], argv[1] if len(argv) > 1 else ""
    if first not in GROUPS:
        known = dict.fromkeys(name.split()[0] for name in COMMANDS)
        if first in known:
            return first
        raise UserError(f"no command {first!r}; {_hint(first, known)}flm --help lists them")
    known = dict.fromkeys(name.split()[1] for name in COMMANDS if name.startswith(f"{first} "))
    if second in known:
        return f"{first} {second}"
    choices = ", ".join(known)
    if not second or second.startswith("-"):
        raise UserError(f"{first} needs a subcommand; choose one of {choices}")
    raise UserError(f"{first} has no {second!r}; {_hint(second, known)}choose one of {choices}")


def _hint(word: str, known: dict[str, None]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def _overview() -> str:
    usage = "flm NAME [--flag=value ...]; flm NAME --help shows a command's flags and examples"
    groups = [f"  {group:<20}{_summary(group)}" for group in GROUPS]
    return "\n".join(
        [f"flm {__version__}: {usage}", "", *_listed(), "", "Groups of commands:", *groups]
    )


def _listed(prefix: str = "") -> list[str]:
    return [f"  {name:<20}{_summary(name)}" for name in COMMANDS if name.startswith(prefix)]


def _summary(name: str) -> str:
    """The first line of a command's or a group's docstring, without importing it."""
    path = pathlib.Path(__file__).parent / name.replace(" ", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


def _failed(name: str, status: int, message: str) -> int:
    """Prints one line on standard error; returns `status`."""
    print(f"{f'flm {name}'.strip()}: {' '.join(message.split())}", file=sys.stderr)
    return status


@contextlib.contextmanager
def _only_on_stderr() -> Iterator[None]:
    """Redirects standard output to standard error, for libraries written in C++ too."""
    sys.stdout.flush()
    saved_stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved_stdout, 1)
        os.close(saved_stdout)
