"""An independent decoder with its gradient, in plain numpy and float64.

Written from the equations of docs/architecture.md; it imports nothing from the code that it checks.
`chain_oracle.py` builds on it.

Shapes: B batch, T length, D embed, F mlp, K key/value heads, G queries per key/value head, H head
size, V vocab.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray
Tree = dict[str, Array]  # by path
Config = Mapping[str, Any]  # the fields of the decoder's config

# Path -> axes, and what the parameter does on each.
_KEYS = "layers:stack embed:in kv_heads:out head_dim:out"
_TEXT = {
    "embedding": "vocab:in embed:out",
    "final_norm": "embed:gain",
    "head": "embed:in vocab:out",
    "layers/attention/key": _KEYS,
    "layers/attention/norm": "layers:stack embed:gain",
    "layers/attention/out": "layers:stack kv_heads:in q_per_kv:in head_dim:in embed:out",
    "layers/attention/query": "layers:stack embed:in kv_heads:out q_per_kv:out head_dim:out",
    "layers/attention/value": _KEYS,
    "layers/mlp/down": "layers:stack mlp:in embed:out",
    "layers/mlp/gate": "layers:stack embed:in mlp:out",
    "layers/mlp/norm": "layers:stack embed:gain",
    "layers/mlp/up": "layers:stack embed:in mlp:out",
}
PARAMS: dict[str, tuple[tuple[str, str], ...]] = {
    path: tuple((a, r) for a, r in (item.split(":") for item in text.split()))
    for path, text in _TEXT.items()
}
VECTORS = ("embedding", "head", "final_norm", "layers/attention/norm", "layers/mlp/norm")
RESIDUAL_WRITERS = ("layers/attention/out", "layers/mlp/down")


# The decoder's numbers.


def sizes(config: Config) -> dict[str, int]:
    """The size of every axis."""
    kv_heads = config["num_kv_heads"] or config["num_heads"]
    return {
        "vocab": config["vocab_size"],
        "embed": config["d_model"],
        "mlp": config["d_ff"],
        "kv_heads": kv_heads,
        "q_per_kv": config["num_heads"] // kv_heads,
        "head_dim": config["head_dim"],
        "layers": config["num_layers"],
    }


def shape_of(path: str, config: Config) -> tuple[int, ...]:
    """The shape of a parameter."""
    of = sizes(config)
    return tuple(of[axis] for axis, _ in PARAMS[path])


def _width(config: Config) -> float:
    return float(config["d_model"] / (config["mup_base_width"] or config["d_model"]))


def _depth(config: Config) -> float:
    """Depth over the base depth; it scales nothing in a model without layers."""
    layers = config["num_layers"]
    return float(layers / (config.get("mup_base_depth", 0) or layers)) if layers else 1.0


def _branches(config: Config) -> float:
    """Factor on every layer's two branches."""
    return 1 / _depth(config) if config["parametrisation"] == "completep" else 1.0


def std(path: str, config: Config) -> float:
    """Standard deviation of initial entries; 0 for a norm's gain, whose entries are 1."""
    if "norm" in path:
        return 0.0
    root = math.sqrt(_width(config))
    if path in VECTORS:
        scaled = path == "head" and config["parametrisation"] == "sp"
        return float(config["vector_init_std"] / (root if scaled else 1))
    deviation = config["matrix_init_std"] / root
    if config["depth_scaled_init"] and path in RESIDUAL_WRITERS:
        deviation /= math.sqrt(2 * max(config["num_layers"], 1))
    return float(deviation)


def rate(path: str, config: Config) -> float:
    """Factor on the learning rate: 1 / width for matrices, unless the parametrisation is "sp"."""
    follows = path not in VECTORS and config["parametrisation"] != "sp"
    return 1 / _width(config) if follows else 1.0


def decay(path: str, config: Config) -> float:
    """Factor on the weight decay: none for norms, else the inverse of the rate's."""
    return 0.0 if "norm" in path else 1 / rate(path, config)


def eps(path: str, config: Config) -> float:
    """Factor on Adam's eps: CompleteP's gradients fall with width, and in layers with depth."""
    if config["parametrisation"] != "completep":
        return 1.0
    return 1 / (_width(config) * (_depth(config) if "/" in path else 1))


def multiplier(path: str, config: Config) -> float:
    """Factor that the model applies to the parameter's output."""
    if path == "embedding":
        return float(config["input_mult"])
    if path in RESIDUAL_WRITERS:
        return _branches(config)
    if path == "head":
        divided = 1.0 if config["parametrisation"] == "sp" else _width(config)
        return float(config["output_mult"] / divided)
    return 1.0


# The decoder.

Batch = Mapping[str, Array]  # tokens, targets, segment_ids, positions, weights: [B, T]
Masks = Mapping[str, Array]  # by axis


def _norm(x: Array, gain: Array, eps: float, mask: Array) -> tuple[Array, Any]:
    scale = 1 / np.sqrt((x**2 @ mask / mask.sum())[..., None] + eps)
    return x * scale * gain * mask, (x, gain, scale, mask)


def _norm_back(dy: Array, saved: Any) -> tuple[Array, Array]:
    x, gain, scale, mask = saved
    d_gain = np.einsum("btd,btd->d", dy, x * scale) * mask
    d_unit = dy * gain * mask
    inner = np.sum(d_unit * x, axis=-1, keepdims=True)
    return d_unit * scale - x * scale**3 * inner * mask / mask.sum(), d_gain


def _rotate(x: Array, positions: Array, theta: float, sign: float) -> Array:
    """Rotary embedding of [B, T, .., H]; sign -1 is its transpose."""
    half = x.shape[-1] // 2
    angle = positions[..., None] * theta ** (-np.arange(half) / half)
    angle = angle.reshape(*positions.shape, *(1,) * (x.ndim - 3), half)
    cos, sin = np.cos(angle), sign * np.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@dataclasses.dataclass
class Forward:
    """Logits [B, T, V], and what the gradient needs."""

    logits: Array
    layers: list[dict[str, Any]]
    last: tuple[Array, Any]


def _all_masks(config: Config, masks: Masks | None) -> dict[str, Array]:
    given = dict(masks or {})
    return {
        axis: np.asarray(given.get(axis, np.ones(n)), float) for axis, n in sizes(config).items()
    }


def forward(config: Config, p: Tree, batch: Batch, masks: Masks | None = None) -> Forward:
    """Computes the logits.

    Args:
      config: the model.
      p: its parameters.
      batch: tokens, segment_ids and positions.
      masks: run-time masks by axis; an axis that is left out is not masked.
    """
    mask = _all_masks(config, masks)
    norm_eps, theta, H = config["rms_norm_eps"], config["rope_theta"], config["head_dim"]
    branches = mask["layers"] * _branches(config)
    segments, positions = batch["segment_ids"], batch["positions"]
    T = segments.shape[1]
    seen = np.tril(np.ones((T, T), bool)) & (segments[:, :, None] == segments[:, None, :])
    x = p["embedding"][batch["tokens"]] * config["input_mult"]
    layers = []
    for n in range(config["num_layers"]):
        w = {path.split("/", 1)[1]: leaf[n] for path, leaf in p.items() if "/" in path}
        s: dict[str, Any] = {"w": w}
        y, s["norm1"] = _norm(x, w["attention/norm"], norm_eps, mask["embed"])
        q = _rotate(np.einsum("btd,dkgh->btkgh", y, w["attention/query"]), positions, theta, 1)
        k = _rotate(np.einsum("btd,dkh->btkh", y, w["attention/key"]), positions, theta, 1)
        v = np.einsum("btd,dkh->btkh", y, w["attention/value"])
        scores = np.einsum("btkgh,bskh->bkgts", q, k) / math.sqrt(H)
        scores = np.where(seen[:, None, None], scores, -np.inf)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        heads = mask["kv_heads"][:, None, None] * mask["q_per_kv"][:, None]
        o = np.einsum("bkgts,bskh->btkgh", probs, v) * heads
        h = x + np.einsum("btkgh,kghd->btd", o, w["attention/out"]) * branches[n]
        z, s["norm2"] = _norm(h, w["mlp/norm"], norm_eps, mask["embed"])
        gate, up = z @ w["mlp/gate"], z @ w["mlp/up"]
        sigmoid = 1 / (1 + np.exp(-gate))
        a = gate * sigmoid * up * mask["mlp"]
        s |= {"y": y, "q": q, "k": k, "v": v, "probs": probs, "heads": heads, "o": o}
        s |= {"z": z, "gate": gate, "up": up, "sigmoid": sigmoid, "a": a}
        x = h + a @ w["mlp/down"] * branches[n]
        layers.append(s)
    last, saved = _norm(x, p["final_norm"], norm_eps, mask["embed"])
    logits = last @ p["head"] * multiplier("head", config)
    # A token's probability is multiplied by its mask. A large negative number stands for log(0).
    hidden = np.log(np.maximum(mask["vocab"], 1e-300)) + np.where(mask["vocab"] > 0, 0, -1e300)
    return Forward(logits + hidden, layers, (last, saved))


def gradient(
    config: Config, p: Tree, batch: Batch, masks: Masks | None = None
) -> tuple[float, Tree]:
    """The mean loss in nats per token, and its gradient. Arguments as in `forward`."""
    mask, of = _all_masks(config, masks), forward(config, p, batch, masks)
    theta, H = config["rope_theta"], config["head_dim"]
    branches = mask["layers"] * _branches(config)
    positions, weights = batch["positions"], batch["weights"] / batch["weights"].sum()
    shifted = of.logits - of.logits.max(-1, keepdims=True)
    probs = np.exp(shifted)
    total = probs.sum(-1, keepdims=True)
    target = batch["targets"][..., None]
    losses = np.log(total)[..., 0] - np.take_along_axis(shifted, target, -1)[..., 0]
    d_logits = probs / total
    np.put_along_axis(d_logits, target, np.take_along_axis(d_logits, target, -1) - 1, -1)
    d_logits *= weights[..., None] * multiplier("head", config)
    last, saved = of.last
    grads = {path: np.zeros_like(leaf) for path, leaf in p.items()}
    grads["head"] = np.einsum("btd,btv->dv", last, d_logits)
    dx, grads["final_norm"] = _norm_back(d_logits @ p["head"].T, saved)
    for n in reversed(range(config["num_layers"])):
        s, w = of.layers[n], of.layers[n]["w"]
        g: Tree = {}
        branch = dx * branches[n]
        g["mlp/down"] = np.einsum("btf,btd->fd", s["a"], branch)
        d_a = branch @ w["mlp/down"].T * mask["mlp"]
        d_up = d_a * s["gate"] * s["sigmoid"]
        slope = s["sigmoid"] * (1 + s["gate"] * (1 - s["sigmoid"]))
        d_gate = d_a * s["up"] * slope
        g["mlp/gate"] = np.einsum("btd,btf->df", s["z"], d_gate)
        g["mlp/up"] = np.einsum("btd,btf->df", s["z"], d_up)
        d_h, g["mlp/norm"] = _norm_back(d_gate @ w["mlp/gate"].T + d_up @ w["mlp/up"].T, s["norm2"])
        dx = dx + d_h
        branch = dx * branches[n]
        g["attention/out"] = np.einsum("btkgh,btd->kghd", s["o"], branch)
        d_o = np.einsum("btd,kghd->btkgh", branch, w["attention/out"]) * s["heads"]
        d_v = np.einsum("bkgts,btkgh->bskh", s["probs"], d_o)
        d_probs = np.einsum("btkgh,bskh->bkgts", d_o, s["v"])
        inner = np.sum(d_probs * s["probs"], axis=-1, keepdims=True)
        d_scores = s["probs"] * (d_probs - inner) / math.sqrt(H)
        d_q = _rotate(np.einsum("bkgts,bskh->btkgh", d_scores, s["k"]), positions, theta, -1)
        d_k = _rotate(np.einsum("bkgts,btkgh->bskh", d_scores, s["q"]), positions, theta, -1)
        g["attention/query"] = np.einsum("btd,btkgh->dkgh", s["y"], d_q)
        g["attention/key"] = np.einsum("btd,btkh->dkh", s["y"], d_k)
        g["attention/value"] = np.einsum("btd,btkh->dkh", s["y"], d_v)
        d_y = np.einsum("btkgh,dkgh->btd", d_q, w["attention/query"])
        d_y += np.einsum("btkh,dkh->btd", d_k, w["attention/key"])
        d_y += np.einsum("btkh,dkh->btd", d_v, w["attention/value"])
        d_x, g["attention/norm"] = _norm_back(d_y, s["norm1"])
        dx = dx + d_x
        for name, leaf in g.items():
            grads[f"layers/{name}"][n] = leaf
    np.add.at(grads["embedding"], batch["tokens"], dx * config["input_mult"])
    return float(np.sum(losses * weights)), grads
