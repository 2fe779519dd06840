"""Helpers of the tests: small configs, random parameters, and an independent numpy model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax import growth
from flm_jax.config import GrowthConfig, MeshConfig, OptimizerConfig, StageConfig, TransformerConfig
from flm_jax.params import axes, mup, sharding, trees
from flm_jax.params.dtypes import wide
from flm_jax.train import optim, schedules, train_step
from flm_jax.train.train_step import TrainState, init_state, make_train_step

SMALL = TransformerConfig(
    vocab_size=23,
    num_layers=2,
    d_model=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    d_ff=20,
    mup_base_width=8,
    input_mult=1.3,
    output_mult=0.7,
    matrix_init_std=0.3,
    vector_init_std=0.5,
    rms_norm_eps=1e-2,
    dtype="float64",
)
TABLE = axes.table(SMALL)
# With and without µP's multipliers, each with its own eps.
MUP = {
    "mup": {"mup_base_width": 8, "rms_norm_eps": 1e-2},
    "plain": {"mup_base_width": 0, "input_mult": 1.0, "output_mult": 1.0, "rms_norm_eps": 1e-5},
}

# A config that can be split over eight devices in several meshes, and the config it grows into.
TINY = TransformerConfig(
    vocab_size=32, num_layers=2, d_model=16, num_heads=4, head_dim=4, d_ff=24, mup_base_width=8
)
TINY_GROWN = dataclasses.replace(TINY, num_layers=3, d_model=32, num_heads=8, d_ff=48)


def changed(config: TransformerConfig, **values) -> TransformerConfig:
    """Returns the config with other values of some fields."""
    return dataclasses.replace(config, **values)


# Compiled once per config: without jit, small models spend most of their time in dispatch.
logits_of = jax.jit(train_step.logits_of, static_argnums=0)
gradients = jax.jit(train_step.gradients, static_argnums=(2, 4))
grow = jax.jit(growth.grow, static_argnums=1)


def random_params(config: TransformerConfig, seed: int):
    """Draws normal entries at the config's scales, biases of std 0.3, and gains in [0.5, 1.5].

    Biases of zero and gains of one would hide bugs. numpy draws them, because it compiles nothing.
    """
    rng = np.random.default_rng(seed)
    leaves, sizes = {}, axes.axis_sizes(config)
    for path, param in axes.table(config).items():
        shape, std = param.shape(sizes), 0.3 if param.bias else mup.init_std(param, config)
        values = rng.normal(0, std, shape) if std else rng.uniform(0.5, 1.5, shape)
        leaves[path] = jnp.asarray(values, wide(config.dtype))
    return trees.unflatten(leaves)


def packed_batch(config: TransformerConfig, seed: int = 0, batch: int = 2, length: int = 9):
    """Returns random tokens; each row holds two documents and a padded end."""
    rng = np.random.default_rng(seed)
    first = length // 2
    segments = np.array([1] * first + [2] * (length - first - 1) + [0])
    positions = np.concatenate([np.arange(first), np.arange(length - first - 1), [0]])
    tokens = rng.integers(0, config.vocab_size, (batch, length))
    return {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "targets": jnp.asarray(np.roll(tokens, -1, 1), jnp.int32),
        "segment_ids": jnp.asarray(np.tile(segments, (batch, 1)), jnp.int32),
        "positions": jnp.asarray(np.tile(positions, (batch, 1)), jnp.int32),
        "weights": jnp.asarray(np.tile(segments > 0, (batch, 1)), jnp.float32),
    }


def numpy_logits(config: TransformerConfig, params, tokens, segments, positions):
    """Computes logits in plain numpy, independently: one token, head and layer at a time."""
    p = {path: np.asarray(v, np.float64) for path, v in trees.flatten(params)}
    half = config.head_dim // 2
    frequency = 1.0 / config.rope_theta ** (np.arange(half) * 2 / config.head_dim)

    def norm(x, gain):
        return gain * x / np.sqrt(np.mean(x**2) + config.rms_norm_eps)

    def rope(x, position):
        out = np.empty_like(x)
        for i in range(half):
            c, s = np.cos(position * frequency[i]), np.sin(position * frequency[i])
            out[i] = x[i] * c - x[i + half] * s
            out[i + half] = x[i + half] * c + x[i] * s
        return out

    logits = np.zeros((*tokens.shape, config.vocab_size))
    for b in range(tokens.shape[0]):
        x = [p["embedding"][t] * config.input_mult for t in tokens[b]]
        for layer in range(config.num_layers):
            w = {k.removeprefix("layers/"): v[layer] for k, v in p.items() if "layers/" in k}
            y = [norm(h, w["attention/norm"]) for h in x]
            for t in range(len(x)):
                for k in range(config.kv_heads):
                    visible = [s for s in range(t + 1) if segments[b][s] == segments[b][t]]
                    keys = [rope(y[s] @ w["attention/key"][:, k], positions[b][s]) for s in visible]
                    values = [y[s] @ w["attention/value"][:, k] for s in visible]
                    for g in range(config.queries_per_kv):
                        q = rope(y[t] @ w["attention/query"][:, k, g], positions[b][t])
                        scores = np.array([q @ key for key in keys]) / np.sqrt(config.head_dim)
                        probs = np.exp(scores - scores.max())
                        probs /= probs.sum()
                        mixed = sum(a * v for a, v in zip(probs, values, strict=True))
                        x[t] = x[t] + mixed @ w["attention/out"][k, g]
            for t, h in enumerate(x):
                y_t = norm(h, w["mlp/norm"])
                gate = y_t @ w["mlp/gate"]
                x[t] = h + (gate / (1 + np.exp(-gate)) * (y_t @ w["mlp/up"])) @ w["mlp/down"]
        for t, h in enumerate(x):
            scale = config.output_mult / (config.d_model / config.mup_base_width)
            logits[b, t] = norm(h, p["final_norm"]) @ p["head"] * scale
    return logits


def trained(model, state, batches, growth=None, grown_at=None):
    """Returns the state after one step per batch, with decay and without clipping.

    `state` None: starts from random parameters. `growth`: the settings of a growth at this step.
    """
    stage = StageConfig("a", model, 100, 1, 0.01, 0.02, growth=growth or GrowthConfig())
    settings = OptimizerConfig(clip_norm=1e9, eps=1e-3, weight_decay=0.1)
    tx = optim.optimizer(stage, settings, schedules.steady, grown_at)
    if state is None:
        params = random_params(model, 5)
        state = TrainState(jnp.int32(0), params, tx.init(params))
    mesh = sharding.one_device()
    with jax.set_mesh(mesh):
        step = make_train_step(stage, tx, mesh)
        state = jax.tree.map(jnp.copy, state)  # the step donates its state
        for batch in batches:
            state, _ = step(state, batch)
    return state


def farthest(a, b):
    """Returns the largest absolute difference between two parameter trees."""
    pairs = zip(trees.flatten(a), trees.flatten(b), strict=True)
    return max(float(jnp.max(jnp.abs(x - y))) for (_, x), (_, y) in pairs)


def stage_of(model):
    """Returns a stage of eight steps with eight sequences each."""
    return StageConfig("a", model, 8, 8, learning_rate=1e-2, matrix_learning_rate=1e-2)


def optimizer(stage):
    """Returns the stage's optimizer at a constant learning rate."""
    return optim.optimizer(stage, OptimizerConfig(), schedules.steady)


def losses_on(mesh_config: MeshConfig, model: TransformerConfig, steps: int = 4):
    """Trains a few steps on one batch from a fixed state; returns losses and the last state."""
    stage = stage_of(model)
    tx = optimizer(stage)
    mesh, rules = sharding.make_mesh(mesh_config), mesh_config.rules
    sharding.check_divisible(model, mesh, rules)
    batch = jax.tree.map(np.asarray, packed_batch(model, batch=stage.batch_size))
    with jax.set_mesh(mesh):
        state = init_state(model, tx, jax.random.key(0))
        state = jax.device_put(state, sharding.shardings(state, axes.table(model), mesh, rules))
        step = make_train_step(stage, tx, mesh, None, rules)
        losses = []
        for _ in range(steps):
            state, metrics = step(state, sharding.place_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
    return losses, state
