"""Opens what a run left on disk: a finished stage's train state, or the model of any checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from flm_jax import interop
from flm_jax.config import DataConfig, ExperimentConfig, TransformerConfig
from flm_jax.data.tokenizer import Tokenizer, open_tokenizer
from flm_jax.errors import UserError
from flm_jax.params import axes, sharding
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.store.lineage import RunFolder
from flm_jax.train import optim, schedules
from flm_jax.train.train_step import TrainState, abstract_state


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
      UserError: there is no such run or stage, or it was fine-tuned on conversations.
    """
    folder = RunFolder(workdir)
    entry = folder.finished_stage(stage)
    stage_folder = folder.stage(entry["index"], entry["name"])
    if "sft" in json.loads(stage_folder.config.read_text()):
        raise UserError(
            f"{workdir}: stage {entry['name']} learned from conversations and has no place in a "
            "text; give a run that ends with a stage trained on text"
        )
    config = stage_folder.experiment()
    model = config.stages[0].model
    tx = optim.optimizer(config.stages[0], config.optimizer, schedules.steady)
    like = _on_one_device(abstract_state(model, tx), axes.table(model))
    path = pathlib.Path(folder.path / entry["checkpoint"])
    checkpoints = Checkpoints(path.parent, keep=None)
    try:
        state, progress = checkpoints.restore(int(path.name), like)
    finally:
        checkpoints.close()
    return Opened(config, state, progress["data"])


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """Parameters on one device, and what they are parameters of.

    Attributes:
      params: nested dicts as the axis table names them.
      data: what a run was trained on, in the stage's sequence length; None for weights from
        elsewhere.
      name: of the stage or the folder.
      path: what was opened: a checkpoint of a run, or a folder of Hugging Face files.
      context: tokens that the model was trained to read at once; 0: its files do not say.
      trained: by this library, where a start token precedes every document.
    """

    params: Any
    config: TransformerConfig
    data: DataConfig | None
    name: str
    path: pathlib.Path
    context: int
    trained: bool

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """What it was trained with. Raises UserError if it is not there or does not fit."""
        found = open_tokenizer(self.data.vocabulary if self.data else str(self.path))
        if found.vocab_size > self.config.vocab_size:
            raise UserError(
                f"{found.name} has {found.vocab_size} tokens, but the model {self.path} has "
                f"vocab_size {self.config.vocab_size}; give the tokenizer of this model"
            )
        return found

    def prompt(self, text: str) -> list[int]:
        """The text's tokens as the model reads a document's beginning."""
        return self.begun(self.tokenizer.encode(text))

    def begun(self, ids: Sequence[int]) -> list[int]:
        """With the start token before them, as in training.

        Without it if the model comes from elsewhere and its tokenizer adds none.
        """
        start = self.trained or self.tokenizer.adds_start or not ids
        return [*([self.tokenizer.start_id] if start else []), *ids]


def open_model(path: str, stage: str = "") -> OpenedModel:
    """Reads a model, whatever wrote it, onto one device.

    Args:
      path: a run's folder, a checkpoint's folder inside one, or a folder of Hugging Face files.
      stage: of a run's folder: the index or name of a finished stage; "": the last one.

    Raises:
      UserError: there is no such model, or it is not what its config says.
    """
    source = interop.open_source(path, stage)
    config = source.weights.config
    data, trained = None, False
    if source.config is not None:
        data = dataclasses.replace(source.config.data_of(0), window_length=0)
        stage_config = source.config.stages[0]
        trained = not stage_config.source or stage_config.steps > 0
    placed = sharding.shardings(
        axes.nested_table(config), axes.table(config), sharding.one_device()
    )
    params = interop.place(source.weights, placed)
    return OpenedModel(params, config, data, source.name, source.path, source.context, trained)


def _on_one_device(abstract: Any, table: axes.Table) -> Any:
    """The same shapes, with shardings."""
    placed = sharding.shardings(abstract, table, sharding.one_device())
    return jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), abstract, placed
    )
