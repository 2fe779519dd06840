"""Helpers of the tests: run folders without training, and full forward passes of a model."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.config import DataConfig, ExperimentConfig, StageConfig
from flm_jax.models import Transformer
from flm_jax.store.checkpoint import Checkpoints
from flm_jax.store.files import write_json
from flm_jax.store.lineage import RunFolder, identity
from tests.models import SMALL, changed, random_params

# The vocabulary "bytes" has 259 tokens; the model has one more.
BYTES = changed(SMALL, vocab_size=260, dtype="float32")
LONG = 64  # tokens; every text is padded to it, so that one program is compiled


def lineage(workdir):
    """Returns the entries of a run's finished stages."""
    return json.loads((workdir / "lineage.json").read_text())["stages"]


def entry(index, name, step=7):
    """The entry in lineage.json of a stage that was not measured."""
    return {
        "index": index,
        "name": name,
        "parent": None,
        "config_digest": "",
        "plan_digest": None,
        "params": 0,
        "tokens": 0,
        "flops": 0,
        "wall_s": 0.0,
        "steps": step,
        "eval": {"bpb_start": None, "bpb_end": None},
        "receipt": None,
        "params_digest": "",
        "data_fingerprint": "fingerprint",
        "checkpoint": f"stages/{index}-{name}/checkpoints/{step}",
    }


def save(path, models, data=None, seed=0):
    """Writes a run with stages `s0`, `s1`, .. of random parameters, which `open_model` can read.

    Returns the folder and each stage's parameters.
    """
    stages = tuple(
        StageConfig(
            f"s{i}",
            model,
            steps=100,
            batch_size=1,
            learning_rate=1.0,
            matrix_learning_rate=1.0,
        )
        for i, model in enumerate(models)
    )
    config = ExperimentConfig(stages, data or DataConfig(sequence_length=32))
    folder, all_params = RunFolder(path), []
    for index, stage in enumerate(stages):
        stage_folder = folder.stage(index, stage.name)
        write_json(stage_folder.config, identity(config, index, "fingerprint"))
        params = random_params(stage.model, seed + index)
        all_params.append(params)
        checkpoints = Checkpoints(stage_folder.checkpoints)
        # The first stage has a step beside its parameters, the others have only parameters.
        checkpoints.save(7, {"params": params, **({} if index else {"step": jnp.int32(7)})}, {})
        checkpoints.wait()
        checkpoints.close()
        folder.add_stage(entry(index, stage.name))
    return str(folder.path), all_params


@functools.partial(jax.jit, static_argnames="config")
def full_logits(params, tokens, config):
    """Returns the logits [B, T, V] of whole texts, without a cache."""
    return Transformer(config).apply({"params": params}, tokens)


def next_token(params, config, tokens):
    """Returns the most likely token after a text."""
    row = np.zeros((1, LONG), np.int32)
    row[0, : len(tokens)] = tokens
    return int(np.argmax(full_logits(params, row, config)[0, len(tokens) - 1]))


def nats_of(params, config, tokens, vocabulary=None):
    """Computes -log P of each of tokens[1:], given the tokens before it, by one forward pass.

    Only the first `vocabulary` ids are in the softmax (None: all). Returns these, and whether each
    token is the most likely one.
    """
    row = np.zeros((1, LONG), np.int32)
    row[0, : len(tokens)] = tokens
    logits = np.asarray(full_logits(params, row, config), np.float64)[0, :, :vocabulary]
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    logps = [logp[i, t] for i, t in enumerate(tokens[1:])]
    greedy = all(logits[i].argmax() == t for i, t in enumerate(tokens[1:]))
    return -np.array(logps), greedy
