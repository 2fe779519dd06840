"""What surrounds a run: signals, the watchdog, and a last word on every error."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import platform
import socket
import sys
import traceback
from collections.abc import Iterator

import jax

from flm_jax.config import WatchdogConfig
from flm_jax.errors import RunStopped, UserError
from flm_jax.runtime import exhausted, watch
from flm_jax.runtime.stop import StopRequest
from flm_jax.store.files import write_atomically
from flm_jax.store.lineage import RunFolder
from flm_jax.version import __version__


@contextlib.contextmanager
def guarded(folder: RunFolder, name: str, watchdog: WatchdogConfig) -> Iterator[None]:
    """Runs the block as the only writer of a run's folder.

    A bug's traceback is kept in `RUN/crashes/`, and so are the stacks of a run that hangs. An error
    that the machine's limits cause (a full disk) becomes one line.

    Args:
      folder: the run's folder.
      name: of what runs, for these files.
      watchdog: when a run counts as hanging.

    Raises:
      UserError: the folder cannot be used, or a limit of the machine ended the run.
    """

    def keep(kind: str, text: str) -> pathlib.Path | None:
        path = folder.crashes / watch.file_name(kind)
        try:
            write_atomically(path, f"{_circumstances(name)}\n\n{text}")
        except Exception:  # what is told already must not be lost to a second error
            return None
        return path

    # Orbax logs there, also from threads that outlast the run: the filter stays.
    logging.getLogger("absl").addFilter(_is_news)
    try:
        with (
            StopRequest(bounded=True),
            folder.writing(),
            watch.Watchdog(60 * watchdog.minutes, watchdog.ends, keep),
        ):
            try:
                yield
            except (UserError, RunStopped):
                raise
            except Exception as error:
                if exhausted.explained(error, "") is None and (
                    path := keep("crash", "".join(traceback.format_exception(error)))
                ):
                    error.add_note(f"This traceback is kept in {path}")
                raise
    except Exception as error:
        told = exhausted.explained(error, f"workdir {folder.path}")
        # A mistake that a limit caused, such as a folder that cannot be written, has its status.
        if told is None or isinstance(error, RunStopped) or type(error) is type(told):
            raise
        raise told from error


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a logged error is not one that `guarded` tells in one line."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or exhausted.explained(error, "") is None


def _circumstances(name: str) -> str:
    """Describes this process and where it is."""
    return "\n".join(
        (
            f"flm_jax {__version__}, jax {jax.__version__}, Python {platform.python_version()}",
            f"{name}: {watch.HERE}",
            f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}, "
            f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.platform()}",
            f"command: {' '.join(sys.argv)}",
        )
    )
