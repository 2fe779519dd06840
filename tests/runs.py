"""A run's folder without training: what `open_model` reads; and what a run wrote."""

import json

import jax.numpy as jnp

from flm_jax.config import DataConfig, ExperimentConfig, StageConfig
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.store.files import write_json
from flm_jax.store.lineage import RunFolder, identity
from tests.models import SMALL, changed, random_params

# Bytes, and one token that no byte has.
BYTES = changed(SMALL, vocab_size=260, dtype="float32")


def lineage(workdir):
    """The finished stages of a run."""
    return json.loads((workdir / "lineage.json").read_text())["stages"]


def save(path, models, data=None, seed=0):
    """Stages `s0`, `s1`, .. with random parameters; returns the folder and the parameters."""
    stages = tuple(
        StageConfig(f"s{i}", model, steps=100, batch_size=1, learning_rate=1.0,
                    matrix_learning_rate=1.0)
        for i, model in enumerate(models)
    )  # fmt: skip
    config = ExperimentConfig(stages, data or DataConfig(sequence_length=32))
    folder, all_params = RunFolder(path), []
    for index, stage in enumerate(stages):
        about = folder.stage(index, stage.name)
        write_json(about.config, identity(config, index, "fingerprint"))
        params = random_params(stage.model, seed + index)
        all_params.append(params)
        checkpoints = Checkpoints(about.checkpoints)
        # A whole state in the first stage, parameters alone in the others.
        checkpoints.save(7, {"params": params, **({} if index else {"step": jnp.int32(7)})}, {})
        checkpoints.wait()
        checkpoints.close()
        folder.add_stage(
            {
                "index": index,
                "name": stage.name,
                "checkpoint": str((about.checkpoints / "7").relative_to(folder.path)),
            }
        )
    return str(folder.path), all_params
