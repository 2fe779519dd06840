"""The error that a user can mend: one clear line, no traceback."""


class UserError(ValueError):
    """A mistake in what the user gave: config, data, folder.

    The message is one line that names the field, both values and what to do next.
    Commands print it on standard error and exit with status 2.
    """


class RunStopped(Exception):
    """A signal stopped the run; its state is on disk, and the same command goes on from there."""
