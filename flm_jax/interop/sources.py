"""Finds a model on disk, whatever wrote it: a run, one of its checkpoints, Hugging Face files."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import numpy as np

from flm_jax.config import ExperimentConfig, StageConfig
from flm_jax.errors import UserError
from flm_jax.growth._plan import Plan
from flm_jax.growth.folding import masks_of
from flm_jax.interop.tokenizer_files import Vocabulary
from flm_jax.interop.weights import Checkpoint, HuggingFace, Weights, folded, scaled
from flm_jax.params import axes
from flm_jax.store.leaves import CheckpointReader
from flm_jax.store.lineage import RunFolder, StageFolder


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
      path: what was read: a checkpoint, or a folder of Hugging Face files.
      name: of the stage or the folder.
      weights: the plain model: masks are folded in.
      vocabulary: its tokenizer's files.
      config: of a run, with this stage alone; None for Hugging Face files.
      dtype: of the parameters on disk.
      num_bytes: of the parameters on disk.
      context: the longest sequence, in tokens; 0: not said.
      masks: the value of run-time masks that were folded in; None: there were none.
    """

    path: pathlib.Path
    name: str
    weights: Weights
    vocabulary: Vocabulary
    config: ExperimentConfig | None
    dtype: np.dtype
    num_bytes: int
    context: int
    masks: float | None


# What decides the function that a model computes.
_FUNCTION = ("vocab_size", "num_layers", "d_model", "num_heads", "kv_heads", "head_dim", "d_ff",
             "rope_theta", "rms_norm_eps", "input_mult", "logit_mult")  # fmt: skip


def source_of(stage: StageConfig) -> Source:
    """What `stage.source` names.

    Raises UserError if it is not there, or is another model than the stage's.
    """
    source = open_source(stage.source)
    found = source.weights.config
    for name in _FUNCTION:
        have, want = getattr(found, name), getattr(stage.model, name)
        if not math.isclose(have, want, rel_tol=1e-12):
            raise UserError(
                f"stage {stage.name}: model.{name} is {want}, but source {stage.source} has "
                f"{have}; set it to {have}"
            )
    return source


def is_huggingface(folder: pathlib.Path) -> bool:
    """Whether it holds a config.json that is not a stage's."""
    file = folder / "config.json"
    if not file.is_file():
        return False
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return True  # its reader says what is wrong
    return not (isinstance(values, dict) and "stage" in values)


def open_source(path: str, stage: str = "", step: int | None = None) -> Source:
    """Opens a model; reads no parameter yet.

    Args:
      path: a run's folder, a checkpoint's folder inside one, or a folder of Hugging Face files.
      stage: of a run: the index or name of a finished stage; "": the last one.
      step: of a run: of that stage's checkpoints; None: its last.

    Raises:
      UserError: there is no such model, or it is not what its config says.
    """
    folder = pathlib.Path(path).expanduser()
    run = RunFolder(folder)
    if run.lineage.exists():
        entry = run.finished_stage(stage)
        checkpoint = run.path / entry["checkpoint"]
        return _checkpoint(checkpoint if step is None else checkpoint.with_name(str(step)))
    if stage or step is not None:
        raise UserError(f"{path} is no run's folder (no lineage.json): leave stage and step out")
    if folder.parent.name == "checkpoints":
        return _checkpoint(folder)
    if is_huggingface(folder):
        return open_huggingface(folder)
    raise UserError(
        f"{path} holds no model; give a run's folder (with lineage.json), a checkpoint inside one "
        "(.../checkpoints/STEP), or a folder of Hugging Face files (with config.json)"
    )


def open_huggingface(folder: pathlib.Path) -> Source:
    """Raises UserError naming file, tensor or key that is missing, damaged or unknown."""
    files = HuggingFace(folder)
    tensors = files.tensors
    return Source(
        path=folder,
        name=folder.resolve().name,
        weights=scaled(files, files.config, files.described.scales),
        vocabulary=Vocabulary(str(folder)),
        config=None,
        dtype=tensors.dtype,
        num_bytes=tensors.num_bytes,
        context=files.described.values.get("max_position_embeddings") or 0,
        masks=None,
    )


def _checkpoint(path: pathlib.Path) -> Source:
    folder = StageFolder.of_checkpoint(path)
    reader = CheckpointReader(path)
    config = folder.experiment()
    stage = config.stages[0]
    weights: Weights = Checkpoint(reader, stage.model)
    masks = _mask(folder, stage, int(path.name))
    if masks is not None:
        plan = Plan.from_json(folder.plan.read_text())
        weights = folded(weights, masks_of(plan, masks))
    leaves = [reader.leaves[f"params/{leaf}"] for leaf in axes.table(stage.model)]
    return Source(
        path=path,
        name=stage.name,
        weights=weights,
        vocabulary=Vocabulary(config.data.vocabulary),
        config=config,
        dtype=max((leaf.dtype for leaf in leaves), key=lambda dtype: dtype.itemsize),
        num_bytes=sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves),
        context=config.data_of(0).sequence_length,
        masks=masks,
    )


def _mask(folder: StageFolder, stage: StageConfig, step: int) -> float | None:
    """The value that masks had after that step, None where there are none or they are at 1."""
    if not folder.plan.exists() or not Plan.from_json(folder.plan.read_text()).masked:
        return None
    return stage.growth.mask_at(step - folder.start())
