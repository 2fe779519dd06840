"""The error that a user can fix: one clear line, no traceback."""


class UserError(ValueError):
    """A mistake in what the user gave: config, data, folder.

    The message is one line that names the field, both values and what to do next.
    Commands print it on standard error and exit with status 2.

    Attributes:
      argument: the name of the wrong argument or field; a command whose flag has this name says so.
    """

    def __init__(self, message: str, *, argument: str = "") -> None:
        super().__init__(message)
        self.argument = argument


class RunStopped(Exception):
    """A signal stopped the run; its state is on disk, and the same command resumes from there."""
