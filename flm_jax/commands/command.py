"""A command: its flags as a frozen dataclass, and a function from a call to a result.

Every call parses into a new `absl.flags.FlagValues`, so commands share no state: two can be
imported in one process, and one can be called many times.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

import rich.console
from absl import flags as absl_flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags, config_path

from flm_jax import fields as config_fields
from flm_jax.commands import config_files, config_kinds
from flm_jax.errors import UserError
from flm_jax.runtime import display

F = TypeVar("F")
Need = Literal["required", "optional", "none"]


@dataclasses.dataclass(frozen=True)
class NoFlags:
    """The flags of a command that has none of its own."""


def flag(
    default: Any,
    help: str,
    *,
    lower: float | None = None,
    upper: float | None = None,
    choices: Sequence[str] = (),
    comma: bool = False,
    required: str = "",
) -> Any:
    """A field of a command's `Flags` dataclass. The field's annotation is the flag's type.

    Args:
      default: the value of a flag that is not given.
      help: one sentence for --help.
      lower, upper: bounds of a number, inclusive.
      choices: the allowed values of a string.
      comma: values of a `tuple[str, ...]` are separated by commas; otherwise the flag is repeated.
      required: what to do if the flag is missing, for the error; "" if the flag may be left out.

    Returns:
      A dataclass field, whose metadata hold the arguments.
    """
    metadata = {
        "help": help,
        "lower": lower,
        "upper": upper,
        "choices": choices,
        "comma": comma,
        "required": required,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Call(Generic[F]):
    """One parsed command line.

    Attributes:
      flags: the command's own flags.
      config: the config with its overrides, locked; empty if the command got none.
      workdir: the value of --workdir; "" if it is not given.
      json: whether standard output is for the JSON object alone.
      arguments: the positional arguments.
      argv: the command line as given, for a command that starts itself again.
    """

    flags: F
    config: ConfigDict
    workdir: str
    json: bool
    arguments: tuple[str, ...]
    argv: tuple[str, ...]

    def console(self, **options: Any) -> rich.console.Console:
        """The console for results: standard output, or standard error with --json.

        Brackets in names that come from files are not markup.
        """
        return display.open_console(stderr=self.json, **options)


@dataclasses.dataclass(frozen=True)
class Gate:
    """A condition on the result, checked after the result is printed.

    Attributes:
      status: the exit status if it does not hold.
      failure: what is wrong with a result, or "" if it holds.
    """

    status: int
    failure: Callable[[Mapping[str, Any]], str]


@dataclasses.dataclass(frozen=True)
class Command(Generic[F]):
    """A command: `main` gets the parsed call and returns what --json prints.

    Attributes:
      config, workdir: whether it uses --config and --workdir, and whether it needs them.
      config_of: makes the config from the first positional argument if --config is not given.
      positional: the names of the positional arguments; all must be given. If the last one ends
        with "...", there may be more of it.
      argument: the flag that a single argument without a name sets; "": none.
      unexpected: the advice if more arguments are given than it takes.
      gate: a condition on the result, with an exit status of its own.
    """

    main: Callable[[Call[F]], Mapping[str, Any]]
    flags: type[F]
    config: Need = "required"
    workdir: Need = "none"
    config_of: Callable[[str], ConfigDict] | None = None
    positional: tuple[str, ...] = ()
    argument: str = ""
    unexpected: str = "options begin with --"
    gate: Gate | None = None

    def parse(self, name: str, argv: Sequence[str]) -> Call[F]:
        """Parses a command line.

        Args:
          name: the command's name, for error messages.
          argv: the arguments after the command's name.

        Raises:
          UserError: the command line or the config file has a mistake; the message is one line.
        """
        values, rest, config = self._flag_values(), list(argv), ConfigDict()
        if self.config != "none":
            given, rest = config_files.split(argv)
            if given:
                config = config_files.load_config(given)
            elif self.config_of and (first := self._first_argument(name, rest)):
                config = self.config_of(first)
            elif self.config == "required":
                raise UserError("--config is missing; give --config=configs/FILE.py (see configs/)")
        if config:
            for override, _ in _flags_given(rest):
                if override.startswith("config."):
                    config_files.check_field(config, override)
        arguments = _parse(values, [name, *rest], config)
        if self.argument and len(arguments) == 1 and not values[self.argument].value:
            values[self.argument].value = arguments.pop()
        own = self.flags(
            **{f.name: _value(values[f.name], hint) for f, hint in _fields(self.flags)}
        )
        workdir = (values["workdir"].value if "workdir" in values else None) or ""
        self._check(name, own, arguments, workdir)
        return Call(own, config, workdir, bool(values["json"].value), tuple(arguments), tuple(argv))

    def _first_argument(self, name: str, argv: Sequence[str]) -> str:
        """The first positional argument, before the config's fields are flags; "": none."""
        try:
            left = self._flag_values()([name, *argv], known_only=True)[1:]
        except absl_flags.Error as error:
            raise UserError(str(error)) from error
        return next((word for word in left if not word.startswith("-")), "")

    def line(self, error: UserError) -> str:
        """The error's message; an argument that is a flag of the command is named as the flag."""
        own = {field.name for field, _ in _fields(self.flags)}
        if self.workdir != "none":
            own.add("workdir")
        message, name = str(error), error.argument
        if name not in own:
            return message
        if re.match(rf"{name}\b", message):
            return f"--{message}"
        return f"--{name}: {message}"

    def help(self, name: str) -> str:
        """The flags as --help lists them, and the fields of the config of command `name`."""
        values = self._flag_values()
        if self.config != "none":
            absl_flags.DEFINE_string(
                "config", None,
                "Config file, as configs/FILE.py or configs/FILE.py:variant; a field of it is set "
                "by --config.field=value.", flag_values=values,
            )  # fmt: skip
        # absl's list begins with the name of the module that defines the flags.
        listed = values.get_help(include_special_flags=False).partition(":\n")[2].rstrip()
        if self.config == "none":
            return listed
        return f"{listed}\n\nFields, as --config.FIELD=VALUE:\n{_fields_of(name)}"

    def _flag_values(self) -> absl_flags.FlagValues:
        values = absl_flags.FlagValues()
        for field, hint in _fields(self.flags):
            _define(values, field, hint)
        absl_flags.DEFINE_bool(
            "json", False, "Print one JSON object on standard output.", flag_values=values
        )
        # Scripts give --config and --workdir to every command, also where no run is made.
        if self.config != "none":
            absl_flags.DEFINE_string("workdir", None, "The run's folder.", flag_values=values)
        return values

    def _check(self, name: str, own: F, arguments: Sequence[str], workdir: str) -> None:
        """Raises UserError if an argument is missing or unexpected, or a needed flag is missing."""
        wanted = len(self.positional)
        if len(arguments) > wanted and not wanted:
            raise UserError(f"unexpected argument {arguments[0]!r}; {self.unexpected}")
        more = bool(wanted) and self.positional[-1].endswith("...")
        if len(arguments) != wanted and not (more and len(arguments) > wanted):
            given, words = " ".join(arguments) or "no argument", " ".join(self.positional)
            advice = f"; {self.unexpected}" if len(arguments) > wanted else ""
            raise UserError(f"got {given}; give flm {name} {words}{advice}")
        for field, _ in _fields(self.flags):
            advice = field.metadata["required"]
            if advice and getattr(own, field.name) in (None, "", ()):
                raise UserError(f"--{field.name} is missing; {advice}")
        if self.workdir == "required" and not workdir:
            raise UserError("--workdir is missing; give the run's folder, as --workdir=runs/NAME")


def _fields(cls: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls)]


def _is_tuple(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


def _value(flag: absl_flags.Flag[Any], hint: Any) -> Any:
    """The flag's value, converted to the type in the field's annotation."""
    if _is_tuple(hint):
        return tuple(flag.value or ())
    return "" if hint is str and flag.value is None else flag.value


def _define(values: absl_flags.FlagValues, field: dataclasses.Field[Any], hint: Any) -> None:
    """Defines the field's flag."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # X | None
        hint = typing.get_args(hint)[0]
    metadata, default = field.metadata, typing.cast(Any, field.default)
    given: tuple[str, Any, str] = (field.name, default, metadata["help"])
    if hint is bool:
        absl_flags.DEFINE_bool(*given, flag_values=values)
    elif hint is int:
        absl_flags.DEFINE_integer(*given, metadata["lower"], metadata["upper"], flag_values=values)
    elif hint is float:
        absl_flags.DEFINE_float(*given, metadata["lower"], metadata["upper"], flag_values=values)
    elif _is_tuple(hint):
        define = absl_flags.DEFINE_list if metadata["comma"] else absl_flags.DEFINE_multi_string
        define(field.name, list(default), metadata["help"], flag_values=values)
    elif metadata["choices"]:
        name, _, help = given
        absl_flags.DEFINE_enum(name, default or None, metadata["choices"], help, flag_values=values)
    else:
        absl_flags.DEFINE_string(*given, flag_values=values)


def _fields_of(command: str) -> str:
    """The fields of a command's config, one a line: path, type and default, meaning."""
    rows = config_fields.described(config_kinds.class_of(command))
    return "\n".join(
        f"  {path}: {kind}{f'  # {comment}' if comment else ''}" for path, kind, comment in rows
    )


def _unknown_flag(name: str, values: absl_flags.FlagValues, config: ConfigDict) -> UserError:
    """The error for a flag that does not exist; names the nearest one."""
    known = [*values, "config"] if config else list(values)
    field = re.split(r"[.\[]", name)[0]
    if config and field in config:
        hint = f"did you mean --config.{name}?"
    elif close := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        hint = f"did you mean --{close[0]}?"
    else:
        hint = "--help lists the flags"
    return UserError(f"Unknown command line flag {name!r}; {hint}")


def _parse(values: absl_flags.FlagValues, argv: list[str], config: ConfigDict) -> list[str]:
    """Sets `values` and the fields of `config`; returns the positional arguments."""
    try:
        if config:
            config_flags.DEFINE_config_dict(
                "config", config, flag_values=values, lock_config=True, sys_argv=argv
            )
        return list(values(argv)[1:])
    except absl_flags.IllegalFlagValueError as error:
        for name, value in _flags_given(argv[1:]):
            if name.startswith("config.") and str(error).startswith(f"flag --{name}={value}:"):
                field = name.removeprefix("config.")
                current = config_path.get_value(field, config)
                expected = config_path.get_type(field, config).__name__
                example = "" if current is None else f", as {current!r}"
                raise UserError(
                    f"--{name}={value}: give a value of type {expected}{example}"
                ) from error
        raise UserError(str(error)) from error
    except absl_flags.UnrecognizedFlagError as error:
        raise _unknown_flag(error.flagname, values, config) from error
    except absl_flags.Error as error:
        raise UserError(str(error)) from error


def _flags_given(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yields the name and value of `--name=value` and `--name value`.

    After a switch, such as `--json`, the value is the next argument and has no meaning.
    """
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if argument == "--":
            return
        if argument.startswith("-"):
            name, equals, value = argument.lstrip("-").partition("=")
            yield name, value if equals else following
