"""The error that a user can fix: one clear line, no traceback."""


class UserError(ValueError):
    """A mistake in what the user gave: config, data, folder.

    The message is one line that names the field, both values and what to do next.
    Commands print it on standard error and exit with status 2.

    Attributes:
      argument: the name of the wrong argument or field; a command whose flag has this name says so.
    """

    def __init__(self, message: str, *, argument: str = "") -> None:
        super().__init__(_one_line(message))
        self.argument = argument


def _one_line(message: str) -> str:
    """The message without control characters, which may come from a file, and not endless.

    >>> _one_line("no tensor a\\nb")
    'no tensor a\\\\nb'
    """
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 4 :]}"
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)


_LONGEST = 4000  # characters


class RunStopped(Exception):
    """A signal stopped the run; its state is on disk, and the same command resumes from there."""
