"""Opens what a run left on disk: a finished stage's train state, or the model of any checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from flm_jax import config as config_lib
from flm_jax import optim, sharding
from flm_jax.checkpoint import Checkpoints
from flm_jax.config import DataConfig, ExperimentConfig, StageConfig, TransformerConfig
from flm_jax.errors import UserError
from flm_jax.lineage import RunFolder
from flm_jax.models import Transformer
from flm_jax.state import TrainState
from flm_jax.tokenizer import Tokenizer, open_tokenizer
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
      UserError: there is no such run or stage, or it was fine-tuned on conversations.
    """
    folder, entry = _finished(workdir, stage)
    about = json.loads(folder.stage(entry["index"], entry["name"]).config.read_text())
    if "sft" in about:
        raise UserError(
            f"{workdir}: stage {entry['name']} learned from conversations and has no place in a "
            "text; give a run that ends with a stage trained on text"
        )
    del about["data_fingerprint"]
    config = config_lib.experiment({"stages": [about.pop("stage")], **about})
    model = config.stages[0].model
    tx = optim.optimizer(config.stages[0], config.optimizer, optim.steady)
    like = _on_one_device(jax.eval_shape(lambda: init_state(model, tx, jax.random.key(0))))
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
      params: nested dicts as in `axes.PARAMS`.
      data: what a run was trained on, in the stage's sequence length; None for weights from
        elsewhere.
      name: of the stage or the folder.
      path: what was opened: a checkpoint of a run, or a folder of Hugging Face files.
      context: tokens that the model was trained to read at once; 0: its files do not say.
    """

    params: Any
    config: TransformerConfig
    data: DataConfig | None
    name: str
    path: pathlib.Path
    context: int

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

    def prompt(self, text: str, special: bool = False) -> list[int]:
        """The text's tokens as the model reads a document's beginning.

        With the start token, unless the model comes from elsewhere and its tokenizer adds none.
        `special` is that of `Tokenizer.encode`.
        """
        ids = self.tokenizer.encode(text, special)
        start = self.data is not None or self.tokenizer.adds_start or not ids
        return [self.tokenizer.start_id] * start + ids


def open_model(path: str, stage: str = "") -> OpenedModel:
    """Reads a model, whatever wrote it, onto one device.

    Args:
      path: a run's folder, a checkpoint's folder inside one, or a folder of Hugging Face files.
      stage: of a run's folder: the index or name of a finished stage; "": the last one.

    Raises:
      UserError: there is no such model, or it is not what its config says.
    """
    folder = pathlib.Path(path).expanduser()
    if (folder / "config.json").is_file() and "model_type" in _read_json(folder / "config.json"):
        if stage:
            raise UserError(f"stage is {stage!r}, but {path} holds one model; leave stage empty")
        from flm_jax import interop

        params, model = interop.load_hf(str(folder))
        context = _read_json(folder / "config.json").get("max_position_embeddings", 0)
        return OpenedModel(params, model, None, folder.resolve().name, folder, context)
    if folder.parent.name == "checkpoints" and folder.is_dir():
        if stage:
            raise UserError(f"stage is {stage!r}, but {path} is one checkpoint; leave stage empty")
        return _open_checkpoint(folder)
    if not (folder / "stages").is_dir():
        raise UserError(
            f"{path} holds no model; give a run's folder (with lineage.json), a checkpoint inside "
            "one, or a folder of Hugging Face files (with config.json)"
        )
    run, entry = _finished(str(folder), stage)
    return _open_checkpoint(run.path / entry["checkpoint"])


def _open_checkpoint(path: pathlib.Path) -> OpenedModel:
    """A checkpoint of a stage: `.../checkpoints/<step>`, beside the stage's config.json."""
    config_file = path.parent.parent / "config.json"
    if not config_file.is_file() or not path.name.isdigit():
        raise UserError(f"{path} is no checkpoint of a stage; give .../checkpoints/STEP of a run")
    about = _read_json(config_file)
    stage = config_lib.from_mapping(StageConfig, about["stage"], "stage")
    data = config_lib.from_mapping(DataConfig, about["data"], "data")
    length = stage.sequence_length or data.sequence_length
    data = dataclasses.replace(data, sequence_length=length, window_length=0)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = Transformer(stage.model).init
    like = _on_one_device(jax.eval_shape(init, jax.random.key(0), tokens)["params"])
    checkpoints = Checkpoints(path.parent, keep=None)
    try:
        params = checkpoints.restore_params(int(path.name), like)
    finally:
        checkpoints.close()
    return OpenedModel(params, stage.model, data, stage.name, path, length)


def _finished(workdir: str, stage: str) -> tuple[RunFolder, dict[str, Any]]:
    """A run's folder, and the entry of its last finished stage, or of the one that is named."""
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
    return folder, chosen[-1]


def _on_one_device(abstract: Any) -> Any:
    """The same shapes, with shardings."""
    placed = sharding.shardings(abstract, sharding.one_device())
    return jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), abstract, placed
    )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; restore the file") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object; restore the file")
    return values
