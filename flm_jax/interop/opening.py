"""Opens models on disk: a run, one of its checkpoints, or Hugging Face files.

`open_model` returns a model on one device, `open_state` the whole train state of a finished stage.
`open_stored_model` finds a model on disk and does not read its parameters yet.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from flm_jax.config import DataConfig, ExperimentConfig, StageConfig, TransformerConfig
from flm_jax.data import chat_template, json_text, special_tokens
from flm_jax.data.chat_template import TemplateConfig
from flm_jax.data.tokenizer import Tokenizer, open_tokenizer
from flm_jax.errors import UserError
from flm_jax.growth._plan import Plan
from flm_jax.growth.folding import masks_of
from flm_jax.interop import gguf_files
from flm_jax.interop.gguf_files import GgufFile, is_gguf
from flm_jax.interop.tokenizer_files import GgufVocabulary, Vocabulary
from flm_jax.interop.weights import Checkpoint, HuggingFace, Weights, folded, place
from flm_jax.params import axes, sharding
from flm_jax.params.sharding import Layout
from flm_jax.runtime import paths, regular
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.store.chunked import CheckpointReader
from flm_jax.store.lineage import RunFolder, StageFolder
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import TrainState, abstract_state


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model on one device.

    Attributes:
      params: nested dicts with the paths of the axis table.
      config: config of the model.
      data: the run's training data, at the stage's sequence length; None for Hugging Face files.
      name: name of the stage or the folder.
      path: the opened checkpoint of a run, or the folder of Hugging Face files.
      context: the sequence length of the training, in tokens; 0: not known.
      trained: whether this library trained it, so that a start token precedes every document.
      stage_template: the chat template of its fine-tuning; None: it was not fine-tuned.
    """

    params: Any
    config: TransformerConfig
    data: DataConfig | None
    name: str
    path: pathlib.Path
    context: int
    trained: bool
    stage_template: TemplateConfig | None = None

    @functools.cached_property
    def template(self) -> TemplateConfig:
        """The chat template: of its fine-tuning, or else its tokenizer's own, or else Tele-FLM's.

        Raises:
          UserError: the tokenizer's files are damaged.
        """
        if self.stage_template is not None:
            return self.stage_template
        own = chat_template.own(self._vocabulary) or chat_template.own(str(self.path))
        return TemplateConfig(jinja=own)

    @property
    def _vocabulary(self) -> str:
        return self.data.vocabulary if self.data else str(self.path)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
          UserError: the tokenizer is missing, or has more tokens than the model.
        """
        tokenizer = open_tokenizer(self._vocabulary)
        # The model's files may lie in another folder than its tokenizer.
        ends = special_tokens.model_ids(self.path, "eos_token_id")
        stops = tuple(dict.fromkeys((*tokenizer.stop_ids, *ends)))
        tokenizer = dataclasses.replace(tokenizer, stop_ids=stops)
        if tokenizer.vocab_size > self.config.vocab_size:
            raise UserError(
                f"{tokenizer.name} has {tokenizer.vocab_size} tokens, but the model {self.path} "
                f"has vocab_size {self.config.vocab_size}; give the tokenizer of this model"
            )
        return tokenizer

    @functools.cached_property
    def token_config(self) -> TransformerConfig:
        """The model's config with the number of its tokens, to generate and to score with."""
        return self.config.with_tokens(self.tokenizer.vocab_size)

    @property
    def starts(self) -> tuple[int, ...]:
        """The tokens before every document that the model reads.

        Every document of this library's training begins with the start token. Another model reads
        what its tokenizer puts before a text. All callers rely on this rule.
        """
        return (self.tokenizer.start_id,) if self.trained else self.tokenizer.starts

    def prompt(self, text: str) -> list[int]:
        """Encodes a text as the beginning of a document, with the start token where needed."""
        return self.with_start(self.tokenizer.encode(text))

    def with_data(self, data: DataConfig) -> OpenedModel:
        """Returns the model with other data, and therefore with that data's tokenizer."""
        return dataclasses.replace(self, data=data)

    def with_template(self, template: TemplateConfig) -> OpenedModel:
        """Returns the model with another chat template."""
        return dataclasses.replace(self, stage_template=template)

    def with_start(self, ids: Sequence[int]) -> list[int]:
        """Puts `starts` before a document's tokens, unless the document begins with them.

        A model always reads one token or more: without `ids` and `starts`, the start token.

        Args:
          ids: the document's tokens; a chat template may begin with the start token itself.

        Returns:
          The tokens that the model reads.
        """
        starts = self.starts or (() if ids else (self.tokenizer.start_id,))
        begun = tuple(ids[: len(starts)]) == starts
        return [*(() if begun else starts), *ids]


def open_model(path: str, stage: str = "") -> OpenedModel:
    """Reads a model onto one device: a run, a checkpoint, or Hugging Face files.

    Args:
      path: a run's folder, a checkpoint's folder inside one, or a folder of Hugging Face files.
      stage: for a run's folder, the index or name of a finished stage; "": the last one.

    Returns:
      The model without run-time masks: they are folded into its parameters.

    Raises:
      UserError: there is no such model, or it does not match its config.
    """
    stored = open_stored_model(path, stage)
    data, trained = None, False
    if stored.config is not None:
        data = dataclasses.replace(stored.config.data_of(0), window_length=0)
        stage_config = stored.config.stages[0]
        trained = not stage_config.source or stage_config.steps > 0
    config = stored.weights.config
    placed = sharding.shardings(
        axes.nested_table(config), axes.table(config), sharding.one_device()
    )
    params = place(stored.weights, placed)
    return OpenedModel(
        params, stored.weights.config, data, stored.name, stored.path, stored.context, trained,
        stored.template,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OpenedState:
    """The end of a finished stage.

    Attributes:
      config: config of the run, with this stage alone.
      state: the train state of the stage's checkpoint, on one device.
      data: the position in the training data.
    """

    config: ExperimentConfig
    state: TrainState
    data: dict[str, object]


def open_state(path: str, stage: str = "") -> OpenedState:
    """Reads the train state at the end of a run's finished stage onto one device.

    Args:
      path: the run's folder.
      stage: its index or name; "": the last one.

    Raises:
      UserError: there is no such run or stage, or the stage was fine-tuned on conversations.
    """
    folder = RunFolder(path)
    entry = folder.finished_stage(stage)
    stage_folder = folder.stage(entry["index"], entry["name"])
    if "sft" in stage_folder.saved():
        raise UserError(
            f"{path}: stage {entry['name']} was trained on conversations and has no position in a "
            "text; give a run that ends with a stage trained on text"
        )
    stage_folder.recorded()
    config = stage_folder.experiment()
    tx = optim.optimizer(config.stages[0], config.optimizer, schedules.steady)
    like = abstract_state(config.stages[0].model, tx, Layout(sharding.one_device()))
    checkpoint = folder.path / entry["checkpoint"]
    checkpoints = Checkpoints(checkpoint.parent, keep=None)
    try:
        state, progress = checkpoints.restore(int(checkpoint.name), like)
    finally:
        checkpoints.close()
    return OpenedState(config, state, progress["data"])


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model on disk.

    Attributes:
      path: the opened checkpoint, or the folder of Hugging Face files.
      name: name of the stage or the folder.
      weights: the parameters, with run-time masks folded in.
      vocabulary: files of its tokenizer.
      config: config of the run, with this stage alone; None for Hugging Face files.
      dtype: dtype of the parameters on disk.
      num_bytes: size of the parameters on disk.
      context: the longest sequence, in tokens; 0: not known.
      masks: value of the run-time masks that were folded in; None if there were none.
      notes: what is unusual about the files.
      template: the chat template of its fine-tuning; None: it was not fine-tuned.
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
    notes: tuple[str, ...] = ()
    template: TemplateConfig | None = None


def open_stored_model(path: str, stage: str = "", step: int | None = None) -> StoredModel:
    """Opens a model on disk; does not read its parameters yet.

    Args:
      path: a run's folder, a checkpoint's folder inside one, a folder of Hugging Face files, or a
        GGUF file or a folder with one.
      stage: for a run, the index or name of a finished stage; "": the last one.
      step: for a run, the step of one of this stage's checkpoints; None: the stage's result.

    Raises:
      UserError: there is no such model, or it does not match its config.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"path is {path!r} of type {type(path).__name__}; give a folder's path")
    folder = paths.of(path)
    paths.check_bucket(folder)
    run = RunFolder(folder)
    if run.lineage.exists():
        entry = run.finished_stage(stage)
        checkpoint = run.path / entry["checkpoint"]
        return _checkpoint(checkpoint if step is None else checkpoint.with_name(str(step)))
    run.stages()  # raises if the file is missing beside finished stages
    if stage or step is not None:
        raise UserError(f"{path} is no run's folder (no lineage.json); leave stage and step out")
    if folder.parent.name == "checkpoints":
        return _checkpoint(folder)
    if file := gguf_files.find(folder):
        return open_huggingface(file)
    if _is_huggingface(folder):
        return open_huggingface(folder)
    raise UserError(
        f"{path} holds no model; give a run's folder (with lineage.json), a checkpoint inside one "
        "(.../checkpoints/STEP), a folder of Hugging Face files (with config.json), or a GGUF file"
    )


def open_huggingface(folder: pathlib.Path) -> StoredModel:
    """Opens a folder of Hugging Face files or a GGUF file; does not read the parameters yet.

    Raises:
      UserError: a file, tensor or key is missing, damaged or unknown; the message names it.
    """
    files = HuggingFace(folder)
    tensors, notes, vocabulary = files.tensors, files.notes, Vocabulary(str(folder))
    if is_gguf(folder):
        file = GgufFile(folder)
        vocabulary = GgufVocabulary(file)
        if file.quantised:
            kinds = ", ".join(f"{count} in {kind}" for kind, count in file.quantised.items())
            notes = [*notes, f"quantised tensors are read as float32: {kinds}"]
    return StoredModel(
        path=folder,
        name=folder.name if paths.remote(folder) else folder.resolve().name,
        weights=files,
        vocabulary=vocabulary,
        config=None,
        dtype=tensors.dtype,
        num_bytes=tensors.num_bytes,
        context=files.described.context,
        masks=None,
        notes=tuple(notes),
    )


def _is_huggingface(folder: pathlib.Path) -> bool:
    """Says whether the folder has a config.json that does not belong to a stage."""
    file = folder / "config.json"
    if not file.is_file():
        return False
    try:
        values = json_text.parse(regular.read(file))
    except ValueError:
        return True  # `open_huggingface` reports the error
    return not (isinstance(values, dict) and "stage" in values)


def _checkpoint(path: pathlib.Path) -> StoredModel:
    """Opens a checkpoint of a run; folds masks that are below 1."""
    folder = StageFolder.of_checkpoint(path)
    reader = CheckpointReader(path)
    grown = folder.recorded()
    config = folder.experiment()
    stage = config.stages[0]
    weights: Weights = Checkpoint(reader, stage.model)
    masks = _mask(folder, stage, int(path.name)) if grown else None
    if masks is not None:
        plan = Plan.from_json(folder.plan_text())
        weights = folded(weights, masks_of(plan, masks))
    leaves = [reader.leaves[f"params/{leaf}"] for leaf in axes.table(stage.model)]
    return StoredModel(
        path=path,
        name=stage.name,
        weights=weights,
        vocabulary=Vocabulary(config.data.vocabulary),
        config=config,
        dtype=max((leaf.dtype for leaf in leaves), key=lambda dtype: dtype.itemsize),
        num_bytes=sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves),
        context=config.data_of(0).sequence_length,
        masks=masks,
        template=folder.template(),
    )


def _mask(folder: StageFolder, stage: StageConfig, step: int) -> float | None:
    """Returns the masks' value after that step; None if there are none, or if they are at 1."""
    if not Plan.from_json(folder.plan_text()).masked:
        return None
    return stage.growth.mask_at(step - folder.start())
