"""Workers: each takes the next piece that is ready and that nobody else trains.

A worker is a process on one core. Several machines may share the folder, if its file system has
locks (flock). Everything a worker knows it reads from the folder, so any of them may stop.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from flm_jax import mapping
from flm_jax.errors import RunStopped, UserError
from flm_jax.runtime import host, paths
from flm_jax.runtime.stop import SIGNALS, StopRequest, heeded
from flm_jax.store.files import write_json
from flm_jax.studies.growth_study import analysis, corpus, phases
from flm_jax.studies.growth_study.config import GrowthStudyConfig
from flm_jax.studies.growth_study.corpus import Corpus
from flm_jax.studies.growth_study.histories import History, Lab, closure, parent
from flm_jax.studies.growth_study.phases import Frozen, Trial
from flm_jax.studies.growth_study.store import Pieces, StudyFolder
from flm_jax.studies.growth_study.training import Trainer

POLL_SECONDS = 2.0  # while others train what this worker waits for
Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A study that was begun: its settings, corpus and results."""

    config: GrowthStudyConfig
    folder: StudyFolder
    corpus: Corpus
    pieces: Pieces

    @property
    def lab(self) -> Lab:
        """Turns histories into numbers."""
        return self.pieces.lab

    def bits(self, history: History) -> float | None:
        """Bits per byte of a finished history; None if it diverged."""
        row = self.pieces.result(history)
        if row is None:
            raise UserError(
                f"{self.pieces.path(history)}: the result of {history.name()} is missing; run the "
                "study again, which trains it"
            )
        value: float | None = row["bpb"]
        return value

    def finished(self, trials: Sequence[Trial]) -> bool:
        """Whether all trials have results."""
        return all(self.pieces.result(t.history) is not None for t in trials)

    def frozen(self) -> Frozen | None:
        """The decisions of tuning; None before."""
        path = self.folder.frozen
        if not path.exists():
            return None
        values: dict[str, Any] = json.loads(path.read_text())
        return Frozen(**{**values, "edges": tuple(values["edges"])})

    def known(self) -> list[Trial]:
        """The trials of all phases that are known so far."""
        return [
            t
            for trials in phases.wanted(self.lab, self.bits, self.finished, self.frozen())
            for t in trials
        ]


def begin(config: GrowthStudyConfig, workdir: str, other_machine: bool = False) -> Opened:
    """Starts or continues a study: builds its corpus, and checks that all fits.

    Args:
      config: the study.
      workdir: its folder.
      other_machine: see `StudyFolder.begin`.

    Raises:
      UserError: the folder belongs to another study, or the corpus cannot feed the budgets.
    """
    folder = _folder(workdir)
    if not folder.corpus.exists():
        fresh = not folder.path.exists()
        try:
            with folder.building():
                if not folder.corpus.exists():
                    corpus.build(config.corpus, folder.corpus)
                opened = Corpus(folder.corpus, config.sequence_length)
                _check(config, opened)
        except UserError:
            if fresh:
                shutil.rmtree(folder.path)
            raise
    opened = Corpus(folder.corpus, config.sequence_length)
    _check(config, opened)
    folder.begin(config, opened.digest, other_machine)
    environments = tuple(folder.read()["environments"])
    pieces = Pieces(folder, Lab(config, opened.digest), environments)
    return Opened(config, folder, opened, pieces)


def _check(config: GrowthStudyConfig, opened: Corpus) -> None:
    """Raises UserError if corpus and models do not fit each other."""
    for named in config.models:
        if named.model.vocab_size < opened.tokenizer.vocab_size:
            raise UserError(
                f"model {named.name}: vocab_size is {named.model.vocab_size}, but the corpus's "
                f"vocabulary has {opened.tokenizer.vocab_size} tokens; set vocab_size to it or more"
            )
    lab = Lab(config, opened.digest)
    for arm in config.arms:  # raises if a recipe cannot do its growth
        lab.model_of(lab.grown(arm, 0, (1.0,) * len(arm.chain), 1.0))
    phases.check_corpus(lab, opened.available, config.budget or None)


def _folder(workdir: str) -> StudyFolder:
    """A study's folder. Raises UserError for one on a bucket, which cannot lock a piece."""
    path = paths.of(workdir, "workdir")
    paths.check_local(path, "studies")
    return StudyFolder(path)


def reopen(workdir: str) -> Opened:
    """Opens a study to read it, from any machine."""
    folder = _folder(workdir)
    study = folder.read()
    config = mapping.from_mapping(GrowthStudyConfig, study["config"])
    opened = Corpus(folder.corpus, config.sequence_length)
    pieces = Pieces(folder, Lab(config, opened.digest), tuple(study["environments"]))
    return Opened(config, folder, opened, pieces)


def work(study: Opened, note: Note, until: str = "") -> None:
    """Trains pieces until nothing is left.

    Args:
      study: the study.
      note: shows a line.
      until: stop after this phase; "": after the last one.

    Raises:
      UserError: the gate or tuning failed, or a piece cannot be trained.
      RunStopped: after SIGINT or SIGTERM; the next call continues.
    """
    trainer = Trainer(study.config, study.corpus, study.pieces)
    with StopRequest() as stop:
        while True:
            trials = _phase(study, until, note)
            if trials is None:
                return
            if not _train_one(study, trainer, trials, stop, note):
                time.sleep(POLL_SECONDS)
            if stop.requested:
                raise RunStopped(
                    f"{signal.Signals(stop.requested).name}: stopped; the same command continues",
                    stop.requested,
                )


def _phase(study: Opened, until: str, note: Note) -> list[Trial] | None:
    """The first unfinished phase; None if the study is complete. Freezes after tuning."""
    complete: list[Trial] = []
    for trials in phases.wanted(study.lab, study.bits, study.finished, study.frozen()):
        if not study.finished(trials):
            return trials
        complete = trials or complete
        if until and trials and trials[0].phase == until:
            return None
    if study.frozen() is not None:
        return None
    with study.folder.building():
        if study.frozen() is None:
            found = phases.gate(study.lab, study.bits)
            if found and not found.passed:
                at = (
                    "outside the gate's budgets"
                    if found.margin is None
                    else (f"{found.margin:+.3f} bits per byte")
                )
                raise UserError(
                    f"gate: at C = {found.budget:.3g} FLOPs {study.config.target} is ahead of "
                    f"{study.config.source} by {at}, and gate_margin is "
                    f"{study.config.gate_margin}; raise the budgets, or change the sizes"
                )
            frozen = phases.freeze(study.lab, study.bits, found, analysis.digest())
            phases.check_corpus(study.lab, study.corpus.available, frozen.budget)
            write_json(study.folder.frozen, dataclasses.asdict(frozen))
            note(f"frozen: C = {frozen.budget:.3g} FLOPs, primary arm {frozen.primary}")
    return _phase(study, until, note)


def _train_one(
    study: Opened, trainer: Trainer, trials: Sequence[Trial], stop: StopRequest, note: Note
) -> bool:
    """Trains one piece that is ready; returns False if others train all that are."""
    nodes = closure(t.history for t in trials)
    done = {node for node in nodes if study.pieces.result(node) is not None}
    # The longest work first, so that no core is left waiting at the end.
    remaining = dict.fromkeys(nodes, 0.0)
    for node in reversed(nodes):
        start = parent(node, nodes)
        mine = remaining[node] + study.lab.flops(node) - (study.lab.flops(start) if start else 0)
        if start is not None:
            remaining[start] = max(remaining[start], mine)
        remaining[node] = mine
    for node in sorted(set(nodes) - done, key=lambda n: -remaining[n]):
        start = parent(node, nodes)
        if start is not None and start not in done:
            continue
        with study.pieces.lock(node) as mine_now:
            if not mine_now:
                continue
            if study.pieces.result(node) is not None:
                return True
            note(f"training {node.name()}")
            row = trainer.run(node, start, stop)
            value = "diverged" if row["bpb"] is None else f"{row['bpb']:.4f} bits per byte"
            note(f"finished {node.name()}: {value}, {row['seconds']:.0f} s")
            return True
    return False


def run(study: Opened, processes: int, argv: Sequence[str], note: Note) -> None:
    """Runs workers as processes, each on a core of its own, and waits for them.

    Args:
      study: the study, which was begun.
      processes: how many workers.
      argv: the command line that starts one, without its core.
      note: shows a line.

    Raises:
      UserError: a worker failed.
      RunStopped: after SIGINT or SIGTERM; the workers wrote checkpoints.
    """
    cores = sorted(os.sched_getaffinity(0))
    if processes > len(cores):
        raise UserError(
            f"--processes is {processes}, but this process may use {len(cores)} cores; lower it",
            argument="processes",
        )
    command = [sys.executable, "-m", "flm_jax.commands", "study", *argv]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # In groups of their own: Ctrl-C reaches them once, from here, and a second signal would kill.
    workers = [
        subprocess.Popen(
            [*command, f"--core={core}"], env={**os.environ, **threads}, process_group=0
        )
        for core in cores[:processes]
    ]

    def forward(number: int, _: Any) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    before = {s: signal.signal(s, forward) for s in heeded()}
    try:
        statuses = [worker.wait() for worker in workers]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    stopped = [number for number in SIGNALS if 128 + number in statuses]
    if stopped:
        raise RunStopped("the workers stopped; the same command continues", stopped[0])
    if any(statuses):
        raise UserError(f"workers ended with status {statuses}; see the lines above")
    note("the study is complete")


def pin(core: int) -> None:
    """Puts this process on one core. Call it before JAX starts: its threads follow."""
    os.sched_setaffinity(0, {core})
    host.keep_freed()
