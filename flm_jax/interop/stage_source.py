"""What a chain takes from the source of its first stage: its model and its vocabulary."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

from flm_jax.config import (
    BLOCK_FIELDS,
    DataConfig,
    ExperimentConfig,
    StageConfig,
    TransformerConfig,
)
from flm_jax.data.tokenizer import open_tokenizer
from flm_jax.errors import UserError
from flm_jax.interop.opening import StoredModel, open_stored_model
from flm_jax.mapping import base_of, replaced

SOURCE = "source"

# What sets the function that a model computes, and the fields that it follows from. Fields with
# equal functions may differ: a source may be trained with another base width, for example.
_FUNCTION: dict[str, tuple[str, ...]] = {
    **{
        name: (name,)
        for name in (
            "vocab_size", "num_layers", "d_model", "num_heads", "head_dim", "d_ff", "rope_theta",
            "rms_norm_eps", "input_mult",
        )
    },
    "kv_heads": ("num_kv_heads",),
    **{name: (name,) for name in BLOCK_FIELDS if name != "attention_mult"},
    "score_mult": ("attention_mult",),
    "kinds": ("layer_kinds",),
    "logit_mult": ("output_mult", "mup_base_width", "parametrisation"),
    "branch_mult": ("residual_mult", "mup_base_depth", "parametrisation"),
    "head_norm_eps": ("qk_norm_eps",),
}  # fmt: skip


def resolved(config: ExperimentConfig) -> ExperimentConfig:
    """Gives a chain the models and the vocabulary that it takes from its first stage's source.

    A stage's model is its own config, or "source" (the model in the source), or "previous" (that of
    the stage before), or a mapping with one of these as `base` and the fields that differ.
    `data.vocabulary` may be "source": the source's tokenizer. A model whose `vocab_size` is 0 gets
    the size of the vocabulary.

    Returns:
      The chain with a `TransformerConfig` in every stage, and a vocabulary that can be opened.

    Raises:
      UserError: there is no source, it cannot be opened, or it has no tokenizer; or a changed field
        is unknown or has a wrong value.
    """
    source = functools.cache(functools.partial(_source_of, config))
    stages: list[StageConfig] = []
    for index, stage in enumerate(config.stages):
        where = f"config.stages[{index}].model"
        if relative := base_of(stage.model):
            base, changes = relative
            if base == SOURCE:
                model = source(where).weights.config
            elif stages:
                model = stages[-1].model
            else:
                raise UserError(f"{where} is {base!r}, but no stage is before it; give 'source'")
            stage = dataclasses.replace(stage, model=replaced(model, changes, where))
        stages.append(stage)
    data = config.data
    if data.vocabulary == SOURCE:
        data = with_vocabulary(data, source("config.data.vocabulary"))
    if any(stage.model.vocab_size == 0 for stage in stages):
        size = data.train_vocabulary or open_tokenizer(data.vocabulary).vocab_size
        stages = [_with_vocab_size(stage, size) for stage in stages]
    return dataclasses.replace(config, stages=tuple(stages), data=data)


def _with_vocab_size(stage: StageConfig, size: int) -> StageConfig:
    """Gives a stage's model the size of the vocabulary, unless its own is given."""
    model = dataclasses.replace(stage.model, vocab_size=stage.model.vocab_size or size)
    return dataclasses.replace(stage, model=model)


def with_vocabulary(data: DataConfig, stored: StoredModel) -> DataConfig:
    """Gives data the tokenizer of a stored model, if its vocabulary is "source".

    Raises:
      UserError: the model has no tokenizer.
    """
    if data.vocabulary != SOURCE:
        return data
    if stored.vocabulary.num_tokens() is None:
        raise UserError(
            f"data.vocabulary is 'source', but {stored.path} has no tokenizer; give a tokenizer's "
            "file or folder"
        )
    return dataclasses.replace(data, vocabulary=stored.vocabulary.path)


def _source_of(config: ExperimentConfig, where: str) -> StoredModel:
    """Opens the first stage's source, for the field `where`."""
    first = config.stages[0]
    if not first.source:
        raise UserError(
            f"{where} follows the source of stage {first.name}, which has none; set its source to "
            "a run, a checkpoint, or a folder of Hugging Face files"
        )
    return open_stored_model(first.source)


def open_stage_source(config: ExperimentConfig) -> StoredModel:
    """Opens the source of a chain's first stage.

    Raises:
      UserError: there is no such model, or its function differs from the stage's model, or its
        tokenizer from the chain's vocabulary.
    """
    stage = config.stages[0]
    stored = open_stored_model(stage.source)
    check_function(stage, stored)
    check_vocabulary(config.data, stored)
    return stored


def check_function(stage: StageConfig, stored: StoredModel) -> None:
    """Raises UserError unless a stage's model computes the function of the stored one."""
    have, want = stored.weights.config, stage.model
    for quantity, fields in _FUNCTION.items():
        if _equal(_value(have, quantity), _value(want, quantity)):
            continue
        stored_fields, stage_fields = _parts(have, fields), _parts(want, fields)
        differing = [f for f, value in stage_fields.items() if value != stored_fields[f]]
        wanted = " and ".join(f"model.{f} is {stage_fields[f]!r}" for f in differing)
        had = " and ".join(f"{stored_fields[f]!r}" for f in differing)
        raise UserError(
            f"stage {stage.name}: {wanted}, but source {stage.source} has {had}; set "
            f"{'it' if len(differing) == 1 else 'them'} to {had}, or model to 'source'"
        )


def _value(config: TransformerConfig, quantity: str) -> Any:
    """A quantity of `_FUNCTION`."""
    if quantity == "head_norm_eps":
        return (config.qk_norm_eps or config.rms_norm_eps) if config.qk_norm != "none" else 0.0
    return getattr(config, quantity)


def _parts(config: TransformerConfig, fields: Iterable[str]) -> dict[str, Any]:
    """The values of fields by their names, with the fields of nested configs one by one."""
    parts: dict[str, Any] = {}
    for name in fields:
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            parts |= {f"{name}.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)}
        else:
            parts[name] = value
    return parts


def _equal(a: Any, b: Any) -> bool:
    numbers = all(isinstance(x, int | float) for x in (a, b))
    return math.isclose(a, b, rel_tol=1e-12) if numbers else bool(a == b)


def check_vocabulary(data: DataConfig, stored: StoredModel) -> None:
    """Raises UserError if the vocabulary is not that of a stored model's tokenizer.

    A model without a tokenizer takes any, and so does `data.other_vocabulary`.
    """
    own, given = stored.vocabulary, data.vocabulary
    if data.other_vocabulary or own.path == given or (tokens := own.num_tokens()) is None:
        return
    if not _same_tokens(own.path, given):
        raise UserError(
            f"data.vocabulary is {given!r}, but source {stored.path} has a tokenizer of {tokens} "
            f"tokens, {own.path!r}; set data.vocabulary to 'source', or data.other_vocabulary to "
            "True to train on other tokens"
        )


def _same_tokens(one: str, other: str) -> bool:
    """Whether the ids of two vocabularies mean the same, also where their files differ."""
    second = open_tokenizer(other)
    try:
        first = open_tokenizer(one)
    except UserError:  # not a tokenizer that this library can train on
        return False
    return first.digest == second.digest or (
        first.pieces == second.pieces and first.eos_id == second.eos_id
    )
