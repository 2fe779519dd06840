r"""Makes an archive of a run by this version that was stopped inside the ramp of its growth.

  JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1 python -m tests.stored.make tests/stored/NAME.tar.xz

Call it without XLA_FLAGS, in the repository's root. README.md says what each archive holds.
"""

from __future__ import annotations

import pathlib
import shutil
import signal
import sys
import tarfile
import tempfile
from typing import Any
from unittest import mock

from flm_jax.commands import config_files
from flm_jax.errors import RunStopped
from flm_jax.runs import chain, hooks
from tests.stored import chain as stored_chain

STOP_AT = 14  # the step whose results come with the signal; it stops at the next one or two
LEFT_OUT = ("compiled", "report", "tensorboard")


def make(archive: pathlib.Path) -> None:
    """Trains the stored chain, stops it, finishes a copy, and packs the run and the end."""
    config = config_files.experiment(stored_chain.get_config())
    report = hooks.Report.__call__

    def stops(self: hooks.Report, dispatched: hooks.Dispatched | None) -> int:
        if dispatched and dispatched.step == STOP_AT:
            signal.raise_signal(signal.SIGTERM)
        return report(self, dispatched)

    with tempfile.TemporaryDirectory() as folder:
        stopped, whole = (pathlib.Path(folder) / name for name in ("stopped", "run"))
        with mock.patch.object(hooks.Report, "__call__", stops):
            try:
                chain.run(config, str(stopped))
            except RunStopped as error:
                print(error)
        shutil.copytree(stopped, whole)
        chain.run(config, str(whole))
        with tarfile.open(archive, "w:xz", preset=9) as packed:
            packed.add(stopped, "stopped", filter=_anonymous)
            # Of the finished run what it measured is enough.
            for file in ("lineage.json", "stages/1-large/metrics.jsonl"):
                packed.add(whole / file, f"run/{file}", filter=_anonymous)


def _anonymous(member: tarfile.TarInfo) -> Any:
    """The member without owner and time; None: it is left out."""
    if set(pathlib.PurePath(member.name).parts[1:2]) & set(LEFT_OUT):
        return None
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    make(pathlib.Path(sys.argv[1]))
