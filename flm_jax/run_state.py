"""Opens what a run left on disk: a finished stage's config, train state and place in the data."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax

from flm_jax import config as config_lib
from flm_jax import optim, sharding
from flm_jax.checkpoint import Checkpoints
from flm_jax.config import ExperimentConfig
from flm_jax.errors import UserError
from flm_jax.lineage import RunFolder
from flm_jax.state import TrainState
from flm_jax.train import init_state


@dataclasses.dataclass(frozen=True)
class Opened:
    """A finished stage: its config (as the only stage), its last state, its place in the data."""

    config: ExperimentConfig
    state: TrainState
    data: dict[str, object]


def open_stage(workdir: str, stage: str = "") -> Opened:
    """Reads a finished stage of a run onto one device.

    Args:
      workdir: the run's folder.
      stage: its index or name; "": the last one.

    Raises:
      UserError: there is no such run or stage.
    """
    folder = RunFolder(workdir)
    finished = folder.stages()
    if not finished:
        raise UserError(f"{workdir} has no finished stage (no lineage.json); train one first")
    chosen = [s for s in finished if stage in (str(s["index"]), s["name"])] or (
        [] if stage else finished
    )
    if not chosen:
        names = ", ".join(s["name"] for s in finished)
        raise UserError(f"{workdir} has no finished stage {stage!r}; it has {names}")
    entry = chosen[-1]
    about = json.loads(folder.stage(entry["index"], entry["name"]).config.read_text())
    del about["data_fingerprint"]
    config = config_lib.experiment({"stages": [about.pop("stage")], **about})
    model = config.stages[0].model
    tx = optim.optimizer(config.stages[0], config.optimizer, optim.steady)
    abstract = jax.eval_shape(lambda: init_state(model, tx, jax.random.key(0)))
    placed = sharding.shardings(abstract, sharding.one_device())
    like = jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), abstract, placed
    )
    path = pathlib.Path(folder.path / entry["checkpoint"])
    checkpoints = Checkpoints(path.parent, keep=None)
    try:
        state, progress = checkpoints.restore(int(path.name), like)
    finally:
        checkpoints.close()
    return Opened(config, state, progress["data"])
